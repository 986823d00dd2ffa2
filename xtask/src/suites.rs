//! The test programs of `tests/`, and which of their tests count where.
//!
//! Its one job is to know each program and its tests by name, and to sort the names by what a
//! kernel is promised to give. A test that needs what is not promised is not run, and is told of by
//! name: it is neither passed nor silently left out. The same programs run on this kernel and in
//! every virtual machine.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    promise::{Promise, VARIABLE},
    run::{cargo, output, root},
};

/// The package whose tests these are.
pub(crate) const PACKAGE: &str = "agentguard-tests";

/// What this kernel is promised to give, if nothing else is said: what every supported one has.
pub(crate) const THIS_KERNEL: &[Promise] = &[Promise::Portable, Promise::Containers];

/// By which the tests are told what a kernel has beyond what is promised of all, in words of the harness
/// (`facility.rs`): an attack that needs it is then made, or fails.
pub(crate) const FACILITIES: &str = "AGENTGUARD_KERNEL_HAS";

/// A test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Suite {
    pub(crate) name: String,
    program: PathBuf,
    /// Names of its tests, without the entries that tests start as child processes.
    tests: Vec<String>,
}

/// What of a suite is run somewhere, and what is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selection<'a> {
    pub(crate) suite: &'a Suite,
    pub(crate) run: Vec<&'a str>,
    /// Tests that need what is not promised there.
    pub(crate) not_promised: Vec<&'a str>,
}

/// Builds the test programs, and asks each for its tests.
///
/// # Errors
///
/// The build fails, or a program does not list its tests.
pub(crate) fn build() -> Result<Vec<Suite>> {
    let messages = output(&mut cargo(&[
        "test",
        "--locked",
        "--no-run",
        "--message-format",
        "json-render-diagnostics",
    ]))?;
    let directory = directory();
    let mut suites = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line)?;
        // Test programs of the crates have sources elsewhere, and a library is one of them.
        let is_suite = message["target"]["kind"][0] == "test"
            && message["target"]["src_path"]
                .as_str()
                .is_some_and(|source| Path::new(source).starts_with(&directory));
        if !is_suite {
            continue;
        }
        let (true, Some(program)) =
            (message["profile"]["test"] == true, message["executable"].as_str())
        else {
            continue;
        };
        let name = message["target"]["name"].as_str().context("a target has a name")?;
        suites.push(Suite::ask(name, Path::new(program))?);
    }
    ensure!(!suites.is_empty(), "{PACKAGE} has no test programs");
    suites.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(suites)
}

impl Suite {
    fn ask(name: &str, program: &Path) -> Result<Self> {
        let list = |more: &[&str]| {
            output(Command::new(program).args(["--list", "--format", "terse"]).args(more))
        };
        let children = names(&list(&["--ignored"])?);
        let mut tests = names(&list(&[])?);
        tests.retain(|test| !children.contains(test));
        Ok(Self { name: name.to_owned(), program: program.to_owned(), tests })
    }

    /// Whether `is_it` holds for one of its tests.
    pub(crate) fn has(&self, is_it: impl Fn(&str) -> bool) -> bool {
        self.tests.iter().any(|test| is_it(test))
    }

    pub(crate) fn tests(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().map(String::as_str)
    }

    /// Sorts its tests by what is promised, of those that `wanted` holds for.
    pub(crate) fn select(
        &self,
        promises: &[Promise],
        wanted: impl Fn(&str) -> bool,
    ) -> Selection<'_> {
        let (run, not_promised) = self
            .tests
            .iter()
            .map(String::as_str)
            .filter(|test| wanted(test))
            .partition(|test| Promise::of_test(test).all(|needed| promises.contains(&needed)));
        Selection { suite: self, run, not_promised }
    }
}

impl Selection<'_> {
    /// The program and its arguments.
    pub(crate) fn arguments(&self) -> impl Iterator<Item = &str> {
        let program = self.suite.program.to_str().unwrap_or_default();
        [program, "--test-threads=1", "--exact"].into_iter().chain(self.run.iter().copied())
    }

    /// The command that runs it on this kernel, which has `facilities` as well.
    pub(crate) fn command(&self, promises: &[Promise], facilities: &str, daemon: &Path) -> Command {
        let mut arguments = self.arguments();
        let mut command = Command::new(arguments.next().unwrap_or_default());
        command
            .args(arguments)
            .current_dir(directory())
            .env(VARIABLE, names_of(promises))
            .env(FACILITIES, facilities)
            .env("AGENTGUARD_BIN", daemon);
        command
    }
}

/// Where cargo would run them.
pub(crate) fn directory() -> PathBuf {
    root().join("tests")
}

/// Promises as the tests read them.
pub(crate) fn names_of(promises: &[Promise]) -> String {
    promises.iter().map(|promise| promise.as_str()).collect::<Vec<_>>().join(",")
}

/// The lines `<name>: test` of a terse list.
fn names(list: &str) -> Vec<String> {
    list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suite(tests: &[&str]) -> Suite {
        Suite {
            name: "datapath".into(),
            program: "/target/datapath".into(),
            tests: tests.iter().map(|test| (*test).to_owned()).collect(),
        }
    }

    #[test]
    fn a_test_that_needs_what_is_not_promised_is_told_of_and_not_run() {
        let suite = suite(&["doors::one", "lsm::two", "lsm::end_others::three"]);
        let portable = suite.select(&[Promise::Portable], |_| true);
        assert_eq!(portable.run, ["doors::one"]);
        assert_eq!(portable.not_promised, ["lsm::two", "lsm::end_others::three"]);
        let both = suite.select(&[Promise::Portable, Promise::Lsm], |test| test.contains("lsm"));
        assert_eq!(both.run, ["lsm::two"]);
        assert_eq!(both.not_promised, ["lsm::end_others::three"]);
    }

    #[test]
    fn a_list_of_tests_is_read() {
        assert_eq!(names("a::b: test\nc: benchmark\nd: test\n"), ["a::b", "d"]);
    }
}
