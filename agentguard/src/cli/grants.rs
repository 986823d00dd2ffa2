//! `agentguard grants`.

use clap::Args;

use super::exit::Exit;
use super::output::{Format, Rows, Tone, plain};
use super::{Context, Result};
use crate::api::types::{Expiry, GrantState};

/// List the grants
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Only those in this state
    #[arg(long, value_enum)]
    state: Option<GrantState>,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let mut grants = context.client.grants()?;
    grants.retain(|grant| arguments.state.is_none_or(|state| grant.state == state));
    match context.format {
        Format::Json => context.console.json(&grants)?,
        Format::Table => {
            let mut rows = Rows::new(&[
                "ID",
                "STATE",
                "SUBJECT",
                "SCOPES",
                "EXPIRES",
                "SOURCE",
                "GRANTED BY",
                "REASON",
            ]);
            for grant in &grants {
                let state = match grant.state {
                    GrantState::Active => Tone::Good,
                    GrantState::Pending => Tone::Careful,
                    GrantState::Expired | GrantState::Revoked => Tone::Neutral,
                };
                let expires = match grant.expires_at {
                    Expiry::At(_) => Tone::Neutral,
                    Expiry::Never => Tone::Careful,
                };
                rows.push([
                    plain(&grant.id),
                    (grant.state.to_string(), state),
                    plain(&grant.subject),
                    plain(grant.scopes.join(",")),
                    (grant.expires_at.to_string(), expires),
                    plain(&grant.source),
                    plain(&grant.granted_by),
                    plain(&grant.reason),
                ]);
            }
            context.console.table(&rows, "no grants")?;
        }
    }
    Ok(Exit::Done)
}
