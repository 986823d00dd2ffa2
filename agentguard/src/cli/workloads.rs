//! `agentguard workloads`.

use clap::Args;

use super::exit::Exit;
use super::output::{Format, Rows, Tone, or_dash, plain};
use super::status::tone_of;
use super::{Context, Result};

/// List the workloads on this node
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Only the one of this name, SPIFFE ID or cgroup
    workload: Option<String>,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let workloads = match &arguments.workload {
        Some(name) => vec![context.client.workload(name)?],
        None => context.client.workloads()?,
    };
    match context.format {
        Format::Json => context.console.json(&workloads)?,
        Format::Table => {
            let mut rows = Rows::new(&[
                "NAME",
                "IDENTITY",
                "MODE",
                "PROTECTION",
                "SOURCE",
                "PROCESSES",
                "DENIED",
                "CGROUP",
            ]);
            for workload in &workloads {
                let denied = if workload.denied > 0 { Tone::Careful } else { Tone::Neutral };
                rows.push([
                    plain(&workload.name),
                    or_dash(workload.identity.as_ref()),
                    plain(workload.mode),
                    (workload.protection.to_string(), tone_of(workload.protection)),
                    plain(&workload.source),
                    plain(workload.processes),
                    (workload.denied.to_string(), denied),
                    plain(&workload.cgroup),
                ]);
            }
            context.console.table(&rows, "no workloads")?;
        }
    }
    Ok(Exit::Done)
}
