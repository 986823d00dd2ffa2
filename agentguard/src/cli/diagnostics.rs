//! `agentguard diagnostics`.

use clap::{Args, ValueEnum};

use super::exit::Exit;
use super::{Context, Result};

/// Switch what the kernel programs say of themselves in the daemon's log
#[derive(Debug, Args)]
pub(super) struct Arguments {
    state: Switch,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Switch {
    On,
    Off,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let enabled = match arguments.state {
        Switch::On => true,
        Switch::Off => false,
    };
    context.client.set_diagnostics(enabled)?;
    Ok(Exit::Done)
}
