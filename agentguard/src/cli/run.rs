//! `agentguard run`.

use clap::Args;

use super::backend::RunOptions;
use super::exit::Exit;
use super::{Context, Result};
use crate::config::Require;
use crate::config::value::NodeName;

/// Run the daemon
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Refuse to start where this kernel gives less protection
    #[arg(long, value_name = "full|portable|none")]
    require: Option<Require>,

    /// The name of this node in records
    #[arg(long, value_name = "NAME", env = "AGENTGUARD_NODE")]
    node: Option<NodeName>,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    context.backend.run(&RunOptions {
        config: context.config,
        socket: context.socket,
        require: arguments.require,
        node: arguments.node.clone(),
    })?;
    Ok(Exit::Done)
}
