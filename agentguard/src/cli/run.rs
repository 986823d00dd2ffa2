//! `agentguard run`.

use clap::Args;

use super::backend::RunOptions;
use super::exit::Exit;
use super::{Context, Result};
use crate::config::Require;

/// Run the daemon
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Refuse to start where this kernel gives less protection
    #[arg(long, value_name = "full|portable|none")]
    require: Option<Require>,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    context.backend.run(&RunOptions {
        config: context.config,
        socket: context.socket,
        require: arguments.require,
    })?;
    Ok(Exit::Done)
}
