//! The kernels that the tests run on, and what each is promised to give.
//!
//! Its one job is the table. A row declares; nothing here looks at a kernel. Whether one keeps what
//! its row promises is found by [`verdict`](super::verdict) and by the tests themselves.

use super::image::Manager;
use crate::promise::Promise;

/// A kernel, how it is booted, and what it gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// As `--kernel` and the output name it.
    pub(super) name: &'static str,
    /// The suite of Debian whose cloud kernel it is.
    pub(super) suite: Suite,
    pub(super) boot: Boot,
    pub(super) manager: Manager,
    /// What fails the run when it is missing.
    pub(super) promises: &'static [Promise],
    /// What attacks are made by that not every kernel has, in words of the harness (`facility.rs`): what
    /// is missing of it fails the run.
    pub(super) has: &'static str,
    pub(super) tests: Tests,
    /// Tests beside those, by suite.
    pub(super) also: &'static [(&'static str, &'static str)],
}

impl Row {
    /// Whether a test is among this row's.
    pub(super) fn include(&self, suite: &str, test: &str) -> bool {
        self.tests.include(suite, test) || self.also.contains(&(suite, test))
    }
}

/// Where a kernel comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suite {
    Bullseye,
    Bookworm,
    Trixie,
    /// Whatever is newest there.
    TrixieBackports,
}

impl Suite {
    /// The archive, its path below the mirror's root, and its name there.
    pub(super) const fn archive(self) -> (&'static str, &'static str) {
        match self {
            Self::Bullseye => ("debian-security", "bullseye-security"),
            Self::Bookworm => ("debian-security", "bookworm-security"),
            Self::Trixie => ("debian", "trixie"),
            Self::TrixieBackports => ("debian", "trixie-backports"),
        }
    }
}

/// Whether the BPF LSM is among those that the kernel is booted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Boot {
    /// The kernel's own list holds it.
    ByDefault,
    /// It does not, and is told to.
    WithBpfLsm,
    /// It does not, and is left as it is.
    WithoutBpfLsm,
}

impl Boot {
    /// What this adds to the kernel's command line.
    pub(super) const fn parameters(self) -> &'static str {
        match self {
            Self::ByDefault => "",
            Self::WithBpfLsm => "lsm=landlock,lockdown,yama,bpf",
            Self::WithoutBpfLsm => "lsm=landlock,lockdown,yama",
        }
    }
}

/// Which tests a row runs of those that its promises allow; `--all` runs them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tests {
    /// Those by which a kernel is known: every hook and table of the kernel half, that each of
    /// [`ATTACKS`] is refused, and that both layers may be required. Floods are counted on this kernel.
    Kernel,
    /// As `Kernel`, without those that load a kernel for long, are the same everywhere, or have the programs
    /// of a second build verified.
    Hooks,
    /// Those that need this, which nothing else promises.
    Of(Promise),
}

impl Tests {
    /// Whether a test is among them.
    pub(super) fn include(self, suite: &str, test: &str) -> bool {
        let floods = || test.starts_with("counting::");
        let loads = || test.starts_with("generations::") || OF_TWO_BUILDS.contains(&test);
        match (self, suite) {
            (Self::Of(promise), _) => Promise::of_test(test).any(|needed| needed == promise),
            (Self::Kernel, "datapath") => !floods(),
            (Self::Hooks, "datapath") => !floods() && !loads(),
            (Self::Kernel, "daemon") => test == BOTH_LAYERS_REQUIRED,
            (Self::Kernel, "full") if test.starts_with("lsm::") => true,
            // Up to a minute: the oldest kernel names one.
            (Self::Hooks, "upgrade") => false,
            (Self::Kernel | Self::Hooks, "guard") if test == TELLS_WHAT_IT_GIVES => true,
            (Self::Kernel | Self::Hooks, "harness") => test == HAS_WHAT_IT_DECLARES,
            (Self::Kernel | Self::Hooks, _) => is_attack(suite, test) && !is_other_run(test),
        }
    }
}

/// Tests that only `--all` runs, by suite: each loads an emulated kernel for long. On this kernel their like
/// is run without the LSM layer.
const LEFT_TO_ALL: [(&str, &str); 3] = [
    ("upgrade", "lsm::a_daemon_that_is_killed_and_started_leaves_no_gap"),
    ("upgrade", "lsm::a_daemon_that_dies_while_it_takes_over_leaves_one_program_to_each_request"),
    ("upgrade", "lsm::tables_of_another_size_take_over_without_a_gap"),
];

/// Whether a test is among [`LEFT_TO_ALL`].
pub(super) fn is_left_to_all(suite: &str, test: &str) -> bool {
    LEFT_TO_ALL.contains(&(suite, test))
}

/// Tests of the kernel half with programs of a build of their own beside the others'.
const OF_TWO_BUILDS: [&str; 3] = [
    "doors::exec_stays_with_the_tracepoint_where_another_build_had_it_judge",
    "doors::a_build_that_can_not_have_the_lsm_judge_exec_does_not_begin_beside_one_that_does",
    "lsm::exec_is_left_to_the_tracepoint_where_the_check_can_not_be_attached",
];

/// The test of `run --require full` where a kernel gives it.
const BOTH_LAYERS_REQUIRED: &str = "lsm::both_layers_may_be_required";
/// The test of a daemon without `CAP_NET_ADMIN`, which starts several in turn: for one kernel that asks for
/// it to attach `cgroup_skb` programs, and one that does not.
const WITHOUT_A_CAPABILITY: (&str, &str) =
    ("daemon", "a_daemon_that_may_not_attach_a_hook_anywhere_says_so_before_it_holds_anything");
/// One daemon in the place of another while both layers decide, for the oldest kernel and the newest.
const OF_ANOTHER_VERSION: (&str, &str) =
    ("upgrade", "lsm::a_daemon_of_another_version_takes_over_and_gives_back_without_a_gap");
/// The test that what is told of protection is what the row promises.
const TELLS_WHAT_IT_GIVES: &str = "what_is_told_of_protection_is_what_this_machine_is_to_give";
/// The test that the kernel has the facilities of its row.
const HAS_WHAT_IT_DECLARES: &str = "this_kernel_has_what_is_declared_of_it";

/// Whether a test is among [`ATTACKS`].
pub(super) fn is_attack(suite: &str, test: &str) -> bool {
    ATTACKS.iter().any(|(_, of, attack)| *of == suite && is_of(test, attack))
}

/// Whether it is a run of an attack that shows something else than that it is refused: what it can do
/// without the guard, and in audit mode.
fn is_other_run(test: &str) -> bool {
    ["works_without_the_guard", "is_recorded_in_audit_mode"]
        .iter()
        .any(|run| test.ends_with(&format!("::{run}")))
}

/// Whether `test` is `attack`, or one of the runs that make it up.
pub(super) fn is_of(test: &str, attack: &str) -> bool {
    test.strip_prefix(attack).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The attacks that each kernel refuses, and meets in all of their runs with `--attacks`: for each row of
/// the threat model that is tested, at least one, and where the LSM layer has a door of its own for it, one
/// that comes to that door. An emulated machine takes too long for the others, which are run there by
/// `--all`.
///
/// The row of the threat model, the suite, and the test or the module of its three runs.
pub(super) const ATTACKS: [(&str, &str, &str); 36] = [
    ("N1", "network", "tcp_connect_to_a_forbidden_v4_address"),
    ("N2", "network", "tcp_to_the_v4_mapped_form"),
    ("N3", "network", "sendto"),
    ("N4", "network", "fast_open_by_sendto"),
    ("N5", "network", "connect_by_a_worker_of_a_ring"),
    ("N6", "families", "multipath_tcp"),
    ("N6", "families", "sctp_connectx"),
    ("N7", "families", "raw_socket"),
    ("N7", "families", "packet_socket"),
    ("N8", "network", "received_stream_by_sendfile"),
    ("N9", "network", "stream_handed_to_a_helper_outside"),
    ("N10", "network", "a_stream_stops_when_its_grant_expires_and_the_daemon_is_dead"),
    ("N11", "network", "address_rewritten_during_connect"),
    ("N12", "network", "the_metadata_service"),
    ("N13", "network", "the_nodes_loopback"),
    ("N14", "network", "listener_on_a_port_that_is_not_granted"),
    ("N16", "families", "network_namespace_of_its_own"),
    ("E1", "exec", "absolute_path"),
    ("E2", "exec", "hard_link"),
    ("E4", "exec", "memfd"),
    ("E5", "exec", "script_that_is_not_granted"),
    ("E7", "exec", "thread_that_is_not_the_first"),
    ("E8", "exec", "set_user_id"),
    ("T1", "leaving", "child_cgroup"),
    ("T2", "leaving", "moving_a_child_to_another_cgroup"),
    ("T3", "leaving", "double_fork"),
    ("T4", "unix", "daemon_by_its_path"),
    ("T4", "unix", "connected_unix_socket_from_outside"),
    ("T5", "unix", "datagram_by_sendto"),
    ("G1", "guard", "a_revocation_and_a_workload_outlive_a_daemon_that_is_killed"),
    ("G3", "guard", "identical_denials_are_folded_and_counted"),
    ("G4", "guard", "hostile_arguments"),
    (
        "G5",
        "datapath",
        "leaving::whoever_makes_cgroups_until_the_table_is_full_is_stopped_and_counted",
    ),
    ("G6", "restart", "whatever_was_given_or_taken_stays_so_over_many_restarts"),
    ("G6", OF_ANOTHER_VERSION.0, OF_ANOTHER_VERSION.1),
    ("G8", "guard", "an_invalid_manifest_changes_nothing_that_is_enforced_and_is_shown"),
];

/// Rows of the threat model that every kernel meets.
#[cfg(test)]
const MET: [&str; 32] = [
    "N1", "N2", "N3", "N4", "N5", "N6", "N7", "N8", "N9", "N10", "N11", "N12", "N13", "N14", "N16",
    "E1", "E2", "E4", "E5", "E7", "E8", "T1", "T2", "T3", "T4", "T5", "G1", "G3", "G4", "G5", "G6",
    "G8",
];

const WITHOUT_LSM: &[Promise] = &[Promise::Portable];
const BOTH_LAYERS: &[Promise] = &[Promise::Portable, Promise::Lsm];
const END_OTHERS: &[Promise] = &[Promise::Portable, Promise::Lsm, Promise::EndOthers];
const SYSTEMD: &[Promise] =
    &[Promise::Portable, Promise::Lsm, Promise::Systemd, Promise::Containers];

/// The matrix, oldest first.
pub(super) const ROWS: [Row; 6] = [
    Row {
        name: "5.10",
        suite: Suite::Bullseye,
        boot: Boot::WithBpfLsm,
        manager: Manager::None,
        promises: BOTH_LAYERS,
        has: "io-uring-send veth",
        tests: Tests::Hooks,
        also: &[OF_ANOTHER_VERSION],
    },
    Row {
        name: "5.10-nolsm",
        suite: Suite::Bullseye,
        boot: Boot::WithoutBpfLsm,
        manager: Manager::None,
        promises: WITHOUT_LSM,
        has: "io-uring-send veth",
        tests: Tests::Hooks,
        also: &[],
    },
    Row {
        name: "6.1",
        suite: Suite::Bookworm,
        boot: Boot::ByDefault,
        manager: Manager::None,
        promises: BOTH_LAYERS,
        has: "io-uring-send io-uring-socket veth",
        tests: Tests::Hooks,
        also: &[WITHOUT_A_CAPABILITY],
    },
    Row {
        name: "6.12",
        suite: Suite::Trixie,
        boot: Boot::ByDefault,
        manager: Manager::None,
        promises: BOTH_LAYERS,
        has: "io-uring-send io-uring-socket io-uring-listen veth",
        tests: Tests::Hooks,
        also: &[],
    },
    Row {
        name: "newest",
        suite: Suite::TrixieBackports,
        boot: Boot::ByDefault,
        manager: Manager::None,
        promises: END_OTHERS,
        has: "io-uring-send io-uring-socket io-uring-listen veth",
        tests: Tests::Kernel,
        also: &[WITHOUT_A_CAPABILITY],
    },
    Row {
        name: "systemd",
        suite: Suite::Bookworm,
        boot: Boot::ByDefault,
        manager: Manager::Systemd,
        promises: SYSTEMD,
        has: "",
        tests: Tests::Of(Promise::Systemd),
        also: &[],
    },
];

/// The rows by how long they take, longest first: who runs several at a time begins with those, so that
/// none of them is what runs alone in the end.
const BY_LENGTH: [&str; 6] = ["newest", "systemd", "6.1", "6.12", "5.10", "5.10-nolsm"];

/// Puts rows into the order in which they are best begun.
pub(super) fn longest_first(rows: &mut [&Row]) {
    rows.sort_by_key(|row| BY_LENGTH.iter().position(|name| *name == row.name));
}

/// The machine in which Debian packages are installed; no row of the matrix, whose runs need none.
pub(super) const PACKAGES: Row = Row {
    name: "packages",
    suite: Suite::Bookworm,
    boot: Boot::ByDefault,
    manager: Manager::Systemd,
    promises: &[Promise::Portable, Promise::Lsm, Promise::Systemd, Promise::Package],
    has: "",
    tests: Tests::Of(Promise::Package),
    also: &[],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_meets_an_attack_of_each_row_of_the_threat_model() {
        for row in MET {
            assert!(ATTACKS.iter().any(|(of, _, _)| *of == row), "{row}");
        }
    }

    #[test]
    fn each_row_has_its_place_by_length() {
        for row in ROWS {
            assert_eq!(
                BY_LENGTH.iter().filter(|name| **name == row.name).count(),
                1,
                "{}",
                row.name
            );
        }
    }

    #[test]
    fn an_attack_is_its_runs_and_not_one_whose_name_goes_on() {
        assert!(is_of("sendto::is_refused_in_enforce_mode", "sendto"));
        assert!(!is_of("sendto_over_v6::is_refused_in_enforce_mode", "sendto"));
        assert!(is_of("a_stream_stops", "a_stream_stops"));
        assert!(is_attack("network", "sendto::works_without_the_guard"));
        assert!(!is_attack("unix", "sendto::works_without_the_guard"));
        assert!(!Tests::Hooks.include("network", "sendto::works_without_the_guard"));
        assert!(!Tests::Hooks.include("network", "sendto::is_recorded_in_audit_mode"));
        assert!(Tests::Hooks.include("network", "sendto::is_refused_in_enforce_mode"));
        assert!(Tests::Hooks.include("guard", "hostile_arguments"));
        assert!(!Tests::Hooks.include("network", "sendto_over_v6::is_refused_in_enforce_mode"));
        assert!(Tests::Kernel.include("daemon", BOTH_LAYERS_REQUIRED));
        assert!(!Tests::Kernel.include("daemon", "events_are_followed"));
        assert!(!Tests::Hooks.include("daemon", BOTH_LAYERS_REQUIRED));
        let rows_of = |(suite, test)| -> Vec<&str> {
            ROWS.iter().filter(|row| row.include(suite, test)).map(|row| row.name).collect()
        };
        assert_eq!(rows_of(WITHOUT_A_CAPABILITY), ["6.1", "newest"]);
        assert_eq!(rows_of(OF_ANOTHER_VERSION), ["5.10", "newest"]);
        assert!(!Tests::Kernel.include("datapath", "counting::a_flood"));
        for (suite, test) in LEFT_TO_ALL {
            assert!(!Tests::Kernel.include(suite, test));
        }
        for test in OF_TWO_BUILDS {
            assert!(Tests::Kernel.include("datapath", test));
            assert!(!Tests::Hooks.include("datapath", test));
        }
        for tests in [Tests::Hooks, Tests::Kernel] {
            assert!(tests.include("guard", TELLS_WHAT_IT_GIVES));
            assert!(tests.include("harness", HAS_WHAT_IT_DECLARES));
            assert!(!tests.include("harness", "a_world_leaves_nothing_behind"));
        }
        let under_systemd = Tests::Of(Promise::Systemd);
        assert!(under_systemd.include("systemd", "systemd::a_unit"));
        assert!(under_systemd.include("containers", "containers::held::systemd::a_pod"));
        assert!(!under_systemd.include("network", "sendto::is_refused_in_enforce_mode"));
    }
}
