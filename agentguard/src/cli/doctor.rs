//! `agentguard doctor`.

use clap::Args;

use super::backend::{CheckState, DoctorReport};
use super::exit::Exit;
use super::output::{Console, Format, Rows, Tone, or_dash, plain};
use super::status::{list, show_layers, tone_of};
use super::{Context, Result};
use crate::api::types::ProtectionLevel;

/// Say what this kernel can and can not enforce, why, and how to get the rest
#[derive(Debug, Args)]
pub(super) struct Arguments {}

pub(super) fn run(_: &Arguments, context: Context<'_, '_>) -> Result {
    let report = context.backend.doctor(context.config.as_deref())?;
    match context.format {
        Format::Json => context.console.json(&report)?,
        Format::Table => show(&report, context.console)?,
    }
    Ok(match report.protection.level {
        ProtectionLevel::Full | ProtectionLevel::Partial => Exit::Done,
        ProtectionLevel::None => Exit::Failed,
    })
}

fn show(report: &DoctorReport, console: &mut Console<'_>) -> std::io::Result<()> {
    let level = report.protection.level;
    console.fields(&[
        ("kernel", format!("{} {}", report.kernel, report.architecture), Tone::Neutral),
        ("protection", level.to_string(), tone_of(level)),
    ])?;
    writeln!(console.out)?;
    let mut rows = Rows::new(&["CHECK", "STATE", "FOUND", "REMEDY"]);
    for check in &report.checks {
        let state = match check.state {
            CheckState::Ok => ("ok".to_owned(), Tone::Good),
            CheckState::Warning => ("warning".to_owned(), Tone::Careful),
            CheckState::Failed => ("failed".to_owned(), Tone::Bad),
        };
        rows.push([plain(&check.name), state, plain(&check.found), or_dash(check.remedy.as_ref())]);
    }
    console.table(&rows, "no checks")?;
    writeln!(console.out)?;
    show_layers(&report.protection, console)?;
    list(console, "documented gaps:", &report.gaps)
}
