//! `agentguard run`.

use std::path::PathBuf;

use clap::Args;

use super::backend::RunOptions;
use super::exit::Exit;
use super::{Context, Result};
use crate::api::types::ProtectionLevel;

/// Run the daemon
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Refuse to start where this kernel gives less protection
    #[arg(long, value_enum, value_name = "LEVEL")]
    require: Option<ProtectionLevel>,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    context.backend.run(&RunOptions {
        config: arguments.config.clone(),
        socket: context.socket,
        require: arguments.require,
    })?;
    Ok(Exit::Done)
}
