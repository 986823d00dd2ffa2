//! `agentguard refresh`.

use clap::Args;

use super::exit::Exit;
use super::output::Format;
use super::{Context, Result};

/// Grant the executables that are in place now, after an upgrade replaced some
///
/// A scope grants the files its paths meant when it was granted. One that is replaced later is not
/// granted, whoever replaced it, until this says so; `agentguard status` lists them.
#[derive(Debug, Args)]
pub(super) struct Arguments {}

pub(super) fn run(_: &Arguments, context: Context<'_, '_>) -> Result {
    let refreshed = context.client.refresh_executables()?;
    match context.format {
        Format::Json => context.console.json(&refreshed)?,
        Format::Table => writeln!(
            context.console.out,
            "{} executables are granted, generation {}",
            refreshed.executables, refreshed.generation
        )?,
    }
    Ok(Exit::Done)
}
