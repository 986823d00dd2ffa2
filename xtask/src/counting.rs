//! What the test programs say of themselves, added up.
//!
//! Its one job is to read their lines. That a program ended badly without saying so is counted by
//! whoever ran it.

use std::ops::AddAssign;

/// What the closing lines of the test programs add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Total {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
    /// Programs that ended badly, also where no test is to blame.
    pub(crate) broken: u64,
    /// Tests that were not run, since the kernel is not promised to give what they need.
    pub(crate) not_promised: u64,
    /// Tests that found that the kernel lacks what they attack by: neither passed nor failed.
    pub(crate) inapplicable: u64,
}

impl AddAssign for Total {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.broken += other.broken;
        self.not_promised += other.not_promised;
        self.inapplicable += other.inapplicable;
    }
}

impl Total {
    /// Whether every test that was to run did, and passed.
    pub(crate) const fn is_good(&self) -> bool {
        self.failed == 0 && self.ignored == 0 && self.broken == 0
    }
}

/// Reads what test programs print.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    total: Total,
    children: u64,
}

impl Reader {
    /// Takes one line.
    pub(crate) fn line(&mut self, line: &str) {
        self.total += closing_line(line).unwrap_or_default();
        self.children += u64::from(is_child_entry(line));
        self.total.inapplicable += u64::from(is_inapplicable(line));
    }

    /// The sum of all lines.
    pub(crate) fn total(&self) -> Total {
        Total {
            // The test programs take them for passed.
            passed: self.total.passed.saturating_sub(self.total.inapplicable),
            // They do run: other tests start them.
            ignored: self.total.ignored.saturating_sub(self.children),
            ..self.total
        }
    }
}

/// Whether a line is of an entry that other tests start as a child process, not of a test.
fn is_child_entry(line: &str) -> bool {
    line.starts_with("test ") && line.contains("... ignored, started by other tests")
}

/// Whether a line says that a test could not be made on this kernel (`facility.rs` of the harness).
/// It may stand behind what the test program had begun to print.
fn is_inapplicable(line: &str) -> bool {
    line.contains("not applicable: ") && line.contains(": this kernel has no ")
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
        ..Total::default()
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
        assert_eq!(closing_line(ok), Some(Total { passed: 12, ignored: 1, ..Total::default() }));
        assert_eq!(closing_line(failed), Some(Total { passed: 2, failed: 1, ..Total::default() }));
    }

    #[test]
    fn an_entry_that_other_tests_start_is_told_from_a_test_that_is_left_out() {
        let entry = "test a_caller ... ignored, started by other tests as a child process";
        assert!(is_child_entry(entry));
        assert!(!is_child_entry("test port_is_denied ... ignored, needs a newer kernel"));
    }

    #[test]
    fn a_test_without_what_it_attacks_by_is_not_counted_as_passed() {
        let mut reader = Reader::default();
        reader.line("test sctp::is_refused ... not applicable: sctp: this kernel has no SCTP");
        reader.line("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured");
        let total = reader.total();
        assert_eq!((total.passed, total.inapplicable), (2, 1));
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(closing_line("test port_outside_the_scope_is_denied ... ok"), None);
    }
}
