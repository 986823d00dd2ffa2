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
    pub(super) tests: Tests,
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

/// Which tests a row runs of those that its promises allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tests {
    /// Those by which a kernel is known: every hook and table of the kernel half. The attacks are run
    /// there by `--all`, which takes longer than a run of every test may.
    Kernel,
    /// As `Kernel`, without those that load a kernel for long.
    Hooks,
    /// Those of one suite.
    Of(&'static str),
}

impl Tests {
    /// Whether a test is among them.
    pub(super) fn include(self, suite: &str, test: &str) -> bool {
        let loads = || test.starts_with("counting::") || test.starts_with("generations::");
        match (self, suite) {
            (Self::Of(name), _) => suite == name,
            (Self::Kernel, "datapath") => true,
            (Self::Hooks, "datapath") => !loads(),
            (Self::Kernel | Self::Hooks, _) => false,
        }
    }
}

const WITHOUT_LSM: &[Promise] = &[Promise::Portable];
const BOTH_LAYERS: &[Promise] = &[Promise::Portable, Promise::Lsm];
const END_OTHERS: &[Promise] = &[Promise::Portable, Promise::Lsm, Promise::EndOthers];
const SYSTEMD: &[Promise] = &[Promise::Portable, Promise::Lsm, Promise::Systemd];

/// The matrix, oldest first.
pub(super) const ROWS: [Row; 6] = [
    Row {
        name: "5.10",
        suite: Suite::Bullseye,
        boot: Boot::WithBpfLsm,
        manager: Manager::None,
        promises: BOTH_LAYERS,
        tests: Tests::Hooks,
    },
    Row {
        name: "5.10-nolsm",
        suite: Suite::Bullseye,
        boot: Boot::WithoutBpfLsm,
        manager: Manager::None,
        promises: WITHOUT_LSM,
        tests: Tests::Hooks,
    },
    Row {
        name: "6.1",
        suite: Suite::Bookworm,
        boot: Boot::ByDefault,
        manager: Manager::None,
        promises: BOTH_LAYERS,
        tests: Tests::Hooks,
    },
    Row {
        name: "6.12",
        suite: Suite::Trixie,
        boot: Boot::ByDefault,
        manager: Manager::None,
        promises: BOTH_LAYERS,
        tests: Tests::Hooks,
    },
    Row {
        name: "newest",
        suite: Suite::TrixieBackports,
        boot: Boot::ByDefault,
        manager: Manager::None,
        promises: END_OTHERS,
        tests: Tests::Kernel,
    },
    Row {
        name: "systemd",
        suite: Suite::Bookworm,
        boot: Boot::ByDefault,
        manager: Manager::Systemd,
        promises: SYSTEMD,
        tests: Tests::Of("systemd"),
    },
];
