//! `cargo xtask test`: every test, with its own set-up.
//!
//! Its one job is to run them in the right order with what they need, and to close with one
//! honest line. Unit, property and documentation tests of the crates run in parallel; those
//! in `tests/` own the kernel's state while they run and go one after the other, against a
//! daemon of the same build.

use std::{
    env,
    io::{BufRead as _, BufReader},
    ops::AddAssign,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    dist::{daemon_binary, next_daemon_binary},
    run::{cargo, heading, run},
    setup::{self, Purpose},
};

/// Arguments of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Leave out the tests that load programs into this kernel, and say so
    #[arg(long)]
    without_kernel: bool,
}

/// Runs every test.
///
/// # Errors
///
/// The set-up or a build fails, a test fails, or a test was ignored: a test that is not run
/// proves nothing, and must not look as if it did.
pub(crate) fn test(arguments: &Arguments) -> Result<()> {
    let begin = Instant::now();
    setup::setup(if arguments.without_kernel { Purpose::Build } else { Purpose::Test })?;
    // All at once: cargo chooses the features of what is shared by what is built together, and
    // would build it again for each part.
    heading("build");
    run(&mut cargo(&["test", "--locked", "--no-run"]))?;
    let next = next_daemon_binary()?;
    let daemon = daemon_binary()?;

    let filter = arguments.filter.as_slice();
    let mut total = Total::default();
    heading("crates");
    let mut crates = cargo(&["test", "--locked", "--no-fail-fast"]);
    crates.args(["--package", "agentguard-common", "--package", "agentguard"]);
    crates.args(["--package", "xtask", "--"]).args(filter);
    total += counted(&mut crates)?;

    if !arguments.without_kernel {
        heading("this kernel");
        let mut kernel = cargo(&["test", "--locked", "--no-fail-fast"]);
        kernel.args(["--package", "agentguard-tests", "--", "--test-threads=1"]).args(filter);
        kernel.env("AGENTGUARD_BIN", daemon).env("AGENTGUARD_NEXT_BIN", next);
        total += counted(&mut kernel)?;
    }

    let Total { passed, failed, ignored, broken } = total;
    let seconds = begin.elapsed().as_secs();
    println!("\ntests: {passed} passed, {failed} failed, {ignored} ignored, in {seconds} s");
    if arguments.without_kernel {
        println!("the tests that need this kernel were left out, as was asked");
    }
    if failed > 0 || ignored > 0 || broken > 0 {
        bail!("not every test passed");
    }
    if passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// What the closing lines of the test programs add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Total {
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Runs of cargo that ended badly, also where no test is to blame.
    broken: u64,
}

impl AddAssign for Total {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.broken += other.broken;
    }
}

/// Runs `cargo test`, shows what it prints, and adds up its closing lines.
fn counted(command: &mut Command) -> Result<Total> {
    // Colours would hide the closing lines from the reader below; a terminal asks for them.
    command.stdout(Stdio::piped()).env("CARGO_TERM_COLOR", "never");
    if env::var_os("CI").is_some() {
        command.stdin(Stdio::null());
    }
    let mut child = command.spawn().context("cargo test: cannot be started")?;
    let stdout = child.stdout.take().context("cargo test: has no standard output")?;
    let mut total = Total::default();
    let mut children = 0;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cargo test: its output cannot be read")?;
        println!("{line}");
        total += closing_line(&line).unwrap_or_default();
        children += u64::from(is_child_entry(&line));
    }
    if !child.wait()?.success() {
        total.broken += 1;
    }
    // They do run: other tests start them.
    total.ignored = total.ignored.saturating_sub(children);
    Ok(total)
}

/// Whether a line is of an entry that other tests start as a child process, not of a test.
fn is_child_entry(line: &str) -> bool {
    line.starts_with("test ") && line.contains("... ignored, started by other tests")
}

/// What `test result: ok. 3 passed; 0 failed; 0 ignored; …` says.
fn closing_line(line: &str) -> Option<Total> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |word: &str| {
        counts.split("; ").find_map(|part| part.strip_suffix(word)?.trim().parse::<u64>().ok())
    };
    Some(Total {
        passed: count("passed")?,
        failed: count("failed")?,
        ignored: count("ignored")?,
        broken: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_both_kinds_are_read() {
        let ok = "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; \
                  finished in 0.02s";
        let failed = "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered \
                      out; finished in 1.00s";
        assert_eq!(closing_line(ok), Some(Total { passed: 12, failed: 0, ignored: 1, broken: 0 }));
        assert_eq!(
            closing_line(failed),
            Some(Total { passed: 2, failed: 1, ignored: 0, broken: 0 })
        );
    }

    #[test]
    fn an_entry_that_other_tests_start_is_told_from_a_test_that_is_left_out() {
        let entry = "test a_caller ... ignored, started by other tests as a child process";
        assert!(is_child_entry(entry));
        assert!(!is_child_entry("test port_is_denied ... ignored, needs a newer kernel"));
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(closing_line("test port_outside_the_scope_is_denied ... ok"), None);
    }
}
