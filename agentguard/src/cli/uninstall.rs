//! `agentguard uninstall`.

use std::io;

use clap::Args;
use nix::sys::signal::{SigSet, Signal};

use super::exit::Exit;
use super::output::{Format, Tone, clean};
use super::{Context, Result};

/// Remove all protection from this machine: programs, tables and what keeps them
///
/// Nothing else does: a daemon that stops leaves what it enforces in place.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Then stay until a signal asks for the end: what runs containers starts one again that ends
    #[arg(long)]
    and_stay: bool,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let mut ends = SigSet::empty();
    if arguments.and_stay {
        // The first process of a container is ended by no signal that it has not asked for.
        ends.extend([Signal::SIGTERM, Signal::SIGINT]);
        ends.thread_block().map_err(io::Error::from)?;
    }
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
    if !report.left.is_empty() {
        return Ok(Exit::Failed);
    }
    if arguments.and_stay {
        context.console.out.flush()?;
        let _signal = ends.wait().map_err(io::Error::from)?;
    }
    Ok(Exit::Done)
}
