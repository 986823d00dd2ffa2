//! `agentguard completions` and `agentguard manual`: what packages ship beside the binary.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::exit::{Exit, Failure};
use super::{Cli, Context, Result};

/// Write completions for a shell
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct Completions {
    shell: Shell,
}

/// Write the man pages into a directory
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct Manual {
    directory: PathBuf,
}

pub(super) fn completions(arguments: &Completions, context: Context<'_, '_>) -> Result {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "agentguard", &mut text);
    context.console.out.write_all(&text)?;
    Ok(Exit::Done)
}

pub(super) fn manual(arguments: &Manual, _: Context<'_, '_>) -> Result {
    clap_mangen::generate_to(Cli::command(), &arguments.directory).map_err(|error| {
        let directory = arguments.directory.display();
        Failure::new(Exit::Failed, format!("man pages can not be written to {directory}: {error}"))
            .with_remedy("name a directory that is there and can be written to")
    })?;
    Ok(Exit::Done)
}
