//! What came of a run of the matrix: its closing lines, the file that keeps it, and the table of
//! the README that is written from that file.
//!
//! Its one job is to tell. A table says what was found and counted, never what was promised.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::{image::Manager, verdict::Found};
use crate::{
    counting::Total,
    promise::Promise,
    run::{root, target_dir},
};

/// What the whole matrix may add to continuous integration. It is told of and fails nothing: a run on a
/// busy machine is no worse for what it found.
const MAY_TAKE: Duration = Duration::from_secs(600);

/// Between these lines of the README stands the table.
const BEGIN: &str = "<!-- begin: kernels, from `cargo xtask vm --write-table` -->\n";
const END: &str = "<!-- end: kernels -->\n";

/// All rows of a run.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) took: Duration,
}

/// What came of a row.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) row: String,
    pub(super) release: String,
    /// What the kernel was told about LSMs; empty: nothing.
    pub(super) lsm_parameter: String,
    pub(super) manager: Manager,
    pub(super) promises: Vec<Promise>,
    /// `None`: `doctor` did not say.
    pub(super) found: Option<Found>,
    pub(super) total: Total,
    /// Tests that this row could run and that other rows run.
    pub(super) left_to_others: u64,
    /// What is promised and missing, and what else keeps the row from being good.
    pub(super) shortfalls: Vec<String>,
    pub(super) took: Duration,
}

impl Outcome {
    fn is_good(&self) -> bool {
        self.total.is_good() && self.shortfalls.is_empty()
    }

    /// One line that holds everything that counts.
    pub(super) fn line(&self) -> String {
        let Total { passed, failed, ignored, broken: _, not_promised, inapplicable } = self.total;
        let verdict = if self.is_good() { "good" } else { "NOT GOOD" };
        let short = match self.shortfalls.len() {
            0 => String::new(),
            number => format!(", {number} shortfalls"),
        };
        format!(
            "{verdict}: {} ({}): {passed} passed, {failed} failed, {ignored} ignored, \
             {not_promised} not promised by this row, {inapplicable} without what they attack by, {} \
             left to other rows{short}, in {} s",
            self.row,
            self.release,
            self.left_to_others,
            self.took.as_secs()
        )
    }

    fn to_json(&self) -> Value {
        let hooks = |layer| {
            let (active, all) = self.found.as_ref().map_or((0, 0), |found| found.layer(layer));
            json!({"active": active, "all": all})
        };
        json!({
            "row": self.row,
            "kernel": self.release,
            "lsm": self.lsm_parameter,
            "systemd": self.manager == Manager::Systemd,
            "good": self.is_good(),
            "promises": self.promises.iter().map(|promise| promise.as_str()).collect::<Vec<_>>(),
            "protection": self.found.as_ref().map_or("none", |found| &found.protection),
            "portable": hooks("portable"),
            "lsm_hooks": hooks("lsm"),
            "end_others": self.found.as_ref().is_some_and(|found| found.gives(Promise::EndOthers)),
            "passed": self.total.passed,
            "failed": self.total.failed,
            "not_promised": self.total.not_promised,
            "left_to_others": self.left_to_others,
            "shortfalls": self.shortfalls,
            "seconds": self.took.as_secs(),
        })
    }
}

impl Matrix {
    /// Whether each row is.
    pub(crate) fn is_good(&self) -> bool {
        !self.outcomes.is_empty() && self.outcomes.iter().all(Outcome::is_good)
    }

    /// One line for each row, and one for all.
    pub(crate) fn closing_line(&self) -> String {
        let good = self.outcomes.iter().filter(|outcome| outcome.is_good()).count();
        let sum = |of: fn(&Total) -> u64| -> u64 {
            self.outcomes.iter().map(|outcome| of(&outcome.total)).sum()
        };
        let mut text: String =
            self.outcomes.iter().map(|outcome| format!("  {}\n", outcome.line())).collect();
        text.push_str(&format!(
            "matrix: {good} of {} rows good, {} passed, {} failed, in {} s",
            self.outcomes.len(),
            sum(|total| total.passed),
            sum(|total| total.failed),
            self.took.as_secs()
        ));
        if self.took > MAY_TAKE {
            text.push_str(&format!(", more than the {} s it is to take", MAY_TAKE.as_secs()));
        }
        text
    }

    /// Keeps it for the table.
    pub(super) fn keep(&self, file: &Path) -> Result<()> {
        let rows: Vec<_> = self.outcomes.iter().map(Outcome::to_json).collect();
        let text = format!("{:#}\n", json!({"rows": rows, "seconds": self.took.as_secs()}));
        fs::write(file, text).with_context(|| format!("{}: cannot be written", file.display()))
    }
}

/// Where the last run of the whole matrix is kept.
pub(super) fn file() -> PathBuf {
    target_dir().join("vm/results.json")
}

/// Writes the README's table from the last run of the whole matrix.
///
/// # Errors
///
/// There was none, or it was not good: a table of what does not hold is worse than an old one.
pub(super) fn write_table() -> Result<()> {
    let file = file();
    let text = fs::read_to_string(&file).with_context(|| {
        format!("{}: no run of the whole matrix yet; run `cargo xtask vm`", file.display())
    })?;
    let results: Value = serde_json::from_str(&text)?;
    let readme = root().join("README.md");
    let before = fs::read_to_string(&readme)?;
    let after = with_table(&before, &table(&results)?)?;
    if after != before {
        fs::write(&readme, after)?;
    }
    println!("the table of {} is that of the last run", readme.display());
    Ok(())
}

fn with_table(readme: &str, table: &str) -> Result<String> {
    let (before, rest) = readme.split_once(BEGIN).context("README.md: no line that begins it")?;
    let (_, after) = rest.split_once(END).context("README.md: no line that ends it")?;
    Ok(format!("{before}{BEGIN}{table}{END}{after}"))
}

fn table(results: &Value) -> Result<String> {
    let mut table = String::from(
        "| kernel | portable layer | LSM layer | ends tasks other than the caller | tests |\n\
         |---|---|---|---|---|\n",
    );
    let rows = results["rows"].as_array().context("a run has rows")?;
    for row in rows {
        if row["good"] != true {
            bail!(
                "the last run was not good ({}); its table would tell what does not hold",
                row["row"]
            );
        }
        let kernel = row["kernel"].as_str().unwrap_or_default();
        let booted = match row["lsm"].as_str().unwrap_or_default() {
            "" => String::new(),
            parameter => format!(", `{parameter}`"),
        };
        let booted = if row["systemd"] == true { ", under systemd".to_owned() } else { booted };
        let hooks = |hooks: &Value| match (hooks["active"].as_u64(), hooks["all"].as_u64()) {
            (Some(0) | None, _) | (_, Some(0) | None) => "–".to_owned(),
            (Some(active), Some(all)) if active == all => format!("all {all} hooks"),
            (Some(active), Some(all)) => format!("{active} of {all} hooks"),
        };
        let ends = if row["end_others"] == true { "yes" } else { "–" };
        table.push_str(&format!(
            "| {kernel}{booted} | {} | {} | {ends} | {} passed |\n",
            hooks(&row["portable"]),
            hooks(&row["lsm_hooks"]),
            row["passed"],
        ));
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(active: u64, good: bool) -> Value {
        json!({"row": "6.1", "kernel": "6.1.0", "lsm": "", "good": good, "end_others": false,
            "portable": {"active": 14, "all": 14}, "lsm_hooks": {"active": active, "all": 8},
            "passed": 100})
    }

    #[test]
    fn the_table_says_what_was_found() {
        let table = table(&json!({"rows": [row(8, true), row(0, true), row(3, true)]})).unwrap();
        let rows: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(rows[0], "| 6.1.0 | all 14 hooks | all 8 hooks | – | 100 passed |");
        assert!(rows[1].contains("| all 14 hooks | – |"), "{}", rows[1]);
        assert!(rows[2].contains("| 3 of 8 hooks |"), "{}", rows[2]);
    }

    #[test]
    fn a_run_that_was_not_good_makes_no_table() {
        assert!(table(&json!({"rows": [row(8, true), row(8, false)]})).is_err());
    }

    #[test]
    fn the_table_takes_the_place_of_the_old_one() {
        let readme = format!("a\n{BEGIN}old\n{END}b\n");
        assert_eq!(with_table(&readme, "new\n").unwrap(), format!("a\n{BEGIN}new\n{END}b\n"));
        assert!(with_table("a\n", "new\n").is_err());
    }

    #[test]
    fn the_readme_has_a_place_for_the_table() {
        let readme = fs::read_to_string(root().join("README.md")).unwrap();
        assert!(with_table(&readme, "").is_ok());
    }
}
