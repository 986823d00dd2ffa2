//! `agentguard grant`.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::{ArgGroup, Args};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::exit::Exit;
use super::output::{Format, clean};
use super::{Context, Result};
use crate::api::ttl::parse_ttl;

/// Grant scopes to a workload identity
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("end").required(true))]
pub(super) struct Arguments {
    /// To whom: a SPIFFE ID, or a prefix that ends with '/'
    #[arg(long, value_name = "SPIFFE-ID")]
    to: String,
    /// A scope; may be given many times
    #[arg(long = "scope", value_name = "SCOPE", required = true)]
    scopes: Vec<String>,
    /// For how long, as 90m, 8h or 2d
    #[arg(long, group = "end", value_parser = checked_ttl)]
    ttl: Option<String>,
    /// Until when, as 2026-11-22T17:00:00Z
    #[arg(long, group = "end", value_name = "TIME")]
    until: Option<Timestamp>,
    /// For ever: a standing grant, which is counted and shown as such
    #[arg(long, group = "end")]
    never: bool,
    /// From when on, as 2026-11-22T09:00:00Z [default: now]
    #[arg(long, value_name = "TIME")]
    from: Option<Timestamp>,
    /// Who grants it [default: who called]
    #[arg(long, value_name = "WHO")]
    by: Option<String>,
    /// Why
    #[arg(long)]
    reason: String,
    /// The grant's name [default: one that is not in use]
    #[arg(long)]
    name: Option<String>,
}

fn checked_ttl(text: &str) -> std::result::Result<String, String> {
    parse_ttl(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let name = arguments.name.clone().unwrap_or_else(unused_name);
    let by = arguments.by.clone().unwrap_or_else(caller);
    let grant = context.client.add_grant(&manifest(arguments, &name, &by))?;
    match context.format {
        Format::Json => context.console.json(&grant)?,
        Format::Table => writeln!(context.console.out, "{}", clean(&grant.id))?,
    }
    Ok(Exit::Done)
}

/// The same document that a file would hold.
fn manifest(arguments: &Arguments, name: &str, by: &str) -> Value {
    let subject = if arguments.to.ends_with('/') { "spiffeIdPrefix" } else { "spiffeId" };
    let mut spec = json!({
        "subject": {subject: arguments.to},
        "scopes": arguments.scopes,
        "grantedBy": by,
        "reason": arguments.reason,
    });
    if let Some(ttl) = &arguments.ttl {
        spec["ttl"] = json!(ttl);
    }
    if let Some(until) = arguments.until {
        spec["expiresAt"] = json!(until);
    }
    if arguments.never {
        spec["expiresAt"] = json!("never");
    }
    if let Some(from) = arguments.from {
        spec["notBefore"] = json!(from);
    }
    json!({
        "apiVersion": "agentguard.dev/v1alpha1",
        "kind": "Grant",
        "metadata": {"name": name},
        "spec": spec,
    })
}

/// Of the time and this process; a clash is refused by the daemon, never overwritten.
fn unused_name() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("cli-{:x}-{:x}", since.as_millis(), std::process::id())
}

/// Who called, through sudo or directly.
fn caller() -> String {
    std::env::var("SUDO_USER").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| {
        let uid = nix::unistd::getuid();
        match nix::unistd::User::from_uid(uid) {
            Ok(Some(user)) => user.name,
            Ok(None) | Err(_) => format!("uid {uid}"),
        }
    })
}
