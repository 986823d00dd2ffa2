//! `agentguard audit`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::exit::Exit;
use super::output::{Format, Rows, Tone, or_dash, plain};
use super::{Context, Result};

/// Work with the audit log
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Follow the hash chain of a log and say whether a line is missing or was changed
    Verify {
        /// The files of the log, the oldest first
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let Command::Verify { files } = &arguments.command;
    let logs = context.backend.audit_verify(files)?;
    match context.format {
        Format::Json => context.console.json(&logs)?,
        Format::Table => {
            let mut rows = Rows::new(&["FILE", "RECORDS", "CHAIN", "LAST HASH"]);
            for log in &logs {
                let chain = match &log.broken {
                    None => ("whole".to_owned(), Tone::Good),
                    Some(broken) => {
                        (format!("broken at line {}: {}", broken.line, broken.reason), Tone::Bad)
                    }
                };
                rows.push([
                    plain(log.file.display()),
                    plain(log.records),
                    chain,
                    or_dash(log.last_hash.as_ref()),
                ]);
            }
            context.console.table(&rows, "no logs")?;
        }
    }
    let whole = logs.iter().all(|log| log.broken.is_none());
    Ok(if whole { Exit::Done } else { Exit::Failed })
}
