//! `agentguard events`.
//!
//! A record is read leniently: what a newer daemon adds is not shown, what is missing is a dash.

use clap::Args;
use serde_json::Value;

use super::exit::Exit;
use super::output::{Format, Rows, Tone, clean, tint};
use super::{Context, Result};
use crate::api::service::EventFilter;
use crate::audit::shown::target;

/// Show what workloads asked for and what was answered
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Go on with what happens from now on
    #[arg(short, long)]
    follow: bool,
    /// Only what was denied
    #[arg(long)]
    denied: bool,
    /// Only the workload of this name, SPIFFE ID or cgroup
    #[arg(long)]
    workload: Option<String>,
    /// How many records from before
    #[arg(short = 'n', long, default_value_t = 20, value_name = "NUMBER")]
    lines: usize,
}

/// Titles, and widths for a stream, where no row knows the next.
const COLUMNS: [(&str, usize); 9] = [
    ("TIME", 24),
    ("WORKLOAD", 20),
    ("ACTION", 10),
    ("TARGET", 30),
    ("VERDICT", 8),
    ("REASON", 16),
    ("SCOPE", 16),
    ("GRANT", 20),
    ("LAYER", 8),
];

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let filter = EventFilter {
        denied: arguments.denied,
        workload: arguments.workload.clone(),
        limit: arguments.lines,
    };
    let console = context.console;
    match (context.format, arguments.follow) {
        (Format::Json, follow) => context.client.events(&filter, follow, |line| {
            writeln!(console.out, "{line}")?;
            console.out.flush()
        })?,
        (Format::Table, true) => {
            let header = COLUMNS.map(|(title, _)| (title.to_owned(), Tone::Neutral));
            write_row(console, &header)?;
            context.client.events(&filter, true, |line| write_row(console, &row(line)))?;
        }
        (Format::Table, false) => {
            let mut rows = Rows::new(&COLUMNS.map(|(title, _)| title));
            context.client.events(&filter, false, |line| {
                rows.push(row(line));
                Ok(())
            })?;
            console.table(&rows, "no records")?;
        }
    }
    Ok(Exit::Done)
}

fn write_row(
    console: &mut super::output::Console<'_>,
    row: &[(String, Tone); 9],
) -> std::io::Result<()> {
    let mut text = String::new();
    for ((cell, tone), (_, width)) in row.iter().zip(COLUMNS) {
        // Padded before it is coloured: the colour takes no room.
        text.push_str(&tint(&format!("{:<width$}", clean(cell)), *tone, console.colour));
        text.push(' ');
    }
    writeln!(console.out, "{}", text.trim_end())?;
    console.out.flush()
}

/// One record as cells.
fn row(line: &str) -> [(String, Tone); 9] {
    let dash = || ("-".to_owned(), Tone::Neutral);
    let mut cells: [(String, Tone); 9] = std::array::from_fn(|_| dash());
    let Ok(record) = serde_json::from_str::<Value>(line) else {
        cells[3] = (line.to_owned(), Tone::Careful);
        return cells;
    };
    let word = |value: &Value| match value.as_str() {
        Some(text) if !text.is_empty() => (text.to_owned(), Tone::Neutral),
        Some(_) | None => dash(),
    };
    cells[0] = word(&record["time"]);
    if record["kind"] == "missed" {
        let text = format!("{} records were missed: read too slowly", record["records"]);
        cells[3] = (text, Tone::Careful);
        return cells;
    }
    cells[1] = word(&record["workload"]["name"]);
    cells[2] = word(&record["request"]["action"]);
    cells[3] = (target(&record["request"]), Tone::Neutral);
    cells[4] = verdict(&record);
    cells[5] = word(&record["reason"]);
    cells[6] = word(&record["scope"]);
    cells[7] = word(&record["grant"]);
    cells[8] = word(&record["layer"]);
    if record["kind"].as_str().is_some_and(|kind| kind != "verdict") {
        cells[2] = word(&record["kind"]);
    }
    cells
}

fn verdict(record: &Value) -> (String, Tone) {
    let refused = record["refused"].as_bool();
    match record["verdict"].as_str() {
        Some("allow") => ("allow".into(), Tone::Good),
        Some("deny") if refused == Some(false) => ("deny".into(), Tone::Careful),
        Some("deny") => ("deny".into(), Tone::Bad),
        Some(other) => (other.into(), Tone::Neutral),
        None => ("-".into(), Tone::Neutral),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_record_is_shown_as_it_is() {
        assert_eq!(row("not json")[3].0, "not json");
        assert_eq!(row("{}")[1].0, "-");
    }
}
