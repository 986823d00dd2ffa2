//! `agentguard check`.

use std::path::PathBuf;

use clap::Args;

use super::exit::Exit;
use super::output::{Format, Tone, clean, tint};
use super::{Context, Result};

/// Check manifests without a daemon
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Files, and directories with all below them
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let report = context.backend.check(&arguments.paths)?;
    let console = context.console;
    match context.format {
        Format::Json => console.json(&report)?,
        Format::Table => {
            for error in &report.errors {
                writeln!(console.out, "{}", clean(&error.to_string()))?;
            }
            let label = tint("warning:", Tone::Careful, console.colour);
            for warning in &report.warnings {
                writeln!(console.out, "{label} {}", clean(&warning.to_string()))?;
            }
            writeln!(
                console.out,
                "{} documents, {} errors, {} warnings",
                report.documents,
                report.errors.len(),
                report.warnings.len()
            )?;
        }
    }
    Ok(if report.errors.is_empty() { Exit::Done } else { Exit::InvalidManifest })
}
