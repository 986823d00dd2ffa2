//! `agentguard revoke`.

use clap::Args;

use super::exit::Exit;
use super::output::{Format, clean};
use super::{Context, Result};

/// Take a grant back
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The grant's id
    grant: String,
    /// Why
    #[arg(long)]
    reason: String,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let grant = context.client.revoke_grant(&arguments.grant, &arguments.reason)?;
    match context.format {
        Format::Json => context.console.json(&grant)?,
        Format::Table => {
            writeln!(context.console.out, "{} is {}", clean(&grant.id), grant.state)?;
        }
    }
    Ok(Exit::Done)
}
