//! `agentguard uninstall`.

use clap::Args;

use super::exit::Exit;
use super::output::{Format, Tone, clean};
use super::{Context, Result};

/// Remove all protection from this machine: programs, tables and what keeps them
///
/// Nothing else does: a daemon that stops leaves what it enforces in place.
#[derive(Debug, Args)]
pub(super) struct Arguments {}

pub(super) fn run(_: &Arguments, context: Context<'_, '_>) -> Result {
    let report = context.backend.uninstall(context.config.as_deref())?;
    match context.format {
        Format::Json => context.console.json(&report)?,
        Format::Table => {
            for line in &report.removed {
                writeln!(context.console.out, "removed {}", clean(line))?;
            }
            if report.removed.is_empty() && report.left.is_empty() {
                writeln!(context.console.out, "nothing was installed")?;
            }
            for line in &report.left {
                context.console.note("left:", Tone::Bad, line);
            }
        }
    }
    Ok(if report.left.is_empty() { Exit::Done } else { Exit::Failed })
}
