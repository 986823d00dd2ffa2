//! What a machine and its kernel are promised to give, and which tests count on it.
//!
//! Its one job is the vocabulary that the runner (`cargo xtask test`, `cargo xtask vm`) and the
//! tests share; the runner includes this file, so that there is one. A row of the matrix promises;
//! the promise is handed to the tests in the variable [`VARIABLE`]; what is promised and missing
//! fails. A test that needs more than the portable layer stands in a module of the promise's name
//! (`lsm::…`), at any depth: by that name the runner knows what to leave out on a row that does not
//! promise it, and reports each by name. A test that belongs there and stands elsewhere fails on
//! such a row, since `requires` of the harness asks the variable.

/// By which the runner tells the tests what their row promises.
pub const VARIABLE: &str = "AGENTGUARD_TEST_PROMISES";

/// Something that a kernel gives or does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// The layer of hooks that every supported kernel has.
    Portable,
    /// The layer that needs the BPF LSM as well.
    Lsm,
    /// Ending a task other than the one that asks, before it runs on: `bpf_send_signal_task`.
    EndOthers,
    /// A machine of its own whose first process is systemd.
    Systemd,
    /// A container runtime with its parts, which the runner installs.
    Containers,
    /// Debian packages of this build, which the runner makes.
    Package,
}

impl Promise {
    pub const ALL: [Self; 6] = [
        Self::Portable,
        Self::Lsm,
        Self::EndOthers,
        Self::Systemd,
        Self::Containers,
        Self::Package,
    ];

    /// Its name in [`VARIABLE`], and the module of the tests that need it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Lsm => "lsm",
            Self::EndOthers => "end_others",
            Self::Systemd => "systemd",
            Self::Containers => "containers",
            Self::Package => "package",
        }
    }

    /// Whether a kernel gives it, and not the machine around it.
    #[must_use]
    pub const fn is_of_the_kernel(self) -> bool {
        match self {
            Self::Portable | Self::Lsm | Self::EndOthers => true,
            Self::Systemd | Self::Containers | Self::Package => false,
        }
    }

    /// Those that a list of names holds, as [`VARIABLE`] does; `None` if one is unknown.
    #[must_use]
    pub fn list(text: &str) -> Option<Vec<Self>> {
        let named = |name: &str| Self::ALL.into_iter().find(|promise| promise.as_str() == name);
        text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(named).collect()
    }

    /// What a test needs, by its name.
    pub fn of_test(name: &str) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |promise| {
            *promise == Self::Portable || modules(name).any(|module| module == promise.as_str())
        })
    }
}

/// The modules that a test's name leads through; the last part is the test itself.
fn modules(name: &str) -> impl Iterator<Item = &str> {
    name.rsplit_once("::").map_or("", |(modules, _)| modules).split("::")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_what_its_tests_need() {
        let needs = |name| Promise::of_test(name).collect::<Vec<_>>();
        assert_eq!(needs("doors::connect4_is_denied"), [Promise::Portable]);
        assert_eq!(needs("lsm::a_family_is_denied"), [Promise::Portable, Promise::Lsm]);
        assert_eq!(
            needs("t2_move::end_others::lsm::is_refused"),
            [Promise::Portable, Promise::Lsm, Promise::EndOthers]
        );
        assert_eq!(needs("doors::lsm"), [Promise::Portable], "the last part is no module");
    }

    #[test]
    fn names_are_read_back() {
        let text = Promise::ALL.map(Promise::as_str).join(",");
        assert_eq!(Promise::list(&text), Some(Promise::ALL.to_vec()));
        assert_eq!(Promise::list(""), Some(vec![]));
        assert_eq!(Promise::list("portable,landlock"), None);
    }
}
