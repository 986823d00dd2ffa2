//! `agentguard status`.

use clap::Args;

use super::exit::Exit;
use super::output::{Console, Format, Rows, Tone, or_dash, plain};
use super::{Context, Result};
use crate::api::types::{LayerState, Protection, ProtectionLevel, Starts, StartsState, Status};

/// Show what the daemon is doing and what this kernel can enforce
#[derive(Debug, Args)]
pub(super) struct Arguments {}

pub(super) fn run(_: &Arguments, context: Context<'_, '_>) -> Result {
    let status = context.client.status()?;
    match context.format {
        Format::Json => context.console.json(&status)?,
        Format::Table => show(&status, context.console)?,
    }
    Ok(Exit::Done)
}

fn show(status: &Status, console: &mut Console<'_>) -> std::io::Result<()> {
    let neutral = Tone::Neutral;
    let level = status.protection.level;
    let mut fields = vec![
        ("version", status.version.clone(), neutral),
        ("node", status.node.clone(), neutral),
        ("up", uptime(status.uptime_seconds), neutral),
        ("mode", status.mode.to_string(), neutral),
        ("protection", level.to_string(), tone_of(level)),
        ("generation", status.generation.to_string(), neutral),
    ];
    if let Some(totals) = &status.totals {
        let (grants, events) = (&totals.grants, &totals.events);
        let standing = totals.standing_grants;
        fields.extend([
            ("workloads", totals.workloads.to_string(), neutral),
            (
                "grants",
                format!(
                    "{} active ({standing} standing), {} pending, {} expired, {} revoked",
                    grants.active, grants.pending, grants.expired, grants.revoked
                ),
                if standing > 0 { Tone::Careful } else { neutral },
            ),
            (
                "events",
                format!(
                    "{} decided = {} logged + {} aggregated + {} lost",
                    events.decided, events.logged, events.aggregated, events.lost
                ),
                if events.lost > 0 { Tone::Bad } else { neutral },
            ),
            (
                "manifests",
                format!(
                    "{}, read {}, {} errors",
                    totals.manifests.directory.display(),
                    totals.manifests.last_load.map_or_else(|| "never".into(), |t| t.to_string()),
                    totals.manifests.errors.len()
                ),
                if totals.manifests.errors.is_empty() { neutral } else { Tone::Bad },
            ),
        ]);
        fields.extend(totals.starts.as_ref().map(starts));
    }
    console.fields(&fields)?;
    if let Some(totals) = &status.totals {
        list(console, "errors in manifests:", &totals.manifests.errors)?;
        list(console, "held to what they said before:", &totals.manifests.held)?;
    }
    writeln!(console.out)?;
    show_layers(&status.protection, console)?;
    list(console, "documented gaps:", &status.gaps)
}

/// Whether the starts of containers wait for the daemon.
fn starts(starts: &Starts) -> (&'static str, String, Tone) {
    let (text, tone) = match (starts.state, &starts.runtime) {
        (StartsState::Wait, Some(runtime)) => {
            (format!("wait for the daemon (NRI of {runtime})"), Tone::Neutral)
        }
        (StartsState::Wait, None) => ("wait for the daemon (NRI)".to_owned(), Tone::Neutral),
        (StartsState::Absent, _) => {
            ("do not wait: no runtime offers NRI".to_owned(), Tone::Neutral)
        }
        (StartsState::Lost, _) => ("do not wait: NRI is lost".to_owned(), Tone::Bad),
    };
    ("starts", text, tone)
}

/// The hooks, one row each.
pub(super) fn show_layers(
    protection: &Protection,
    console: &mut Console<'_>,
) -> std::io::Result<()> {
    let mut rows = Rows::new(&["LAYER", "HOOK", "STATE", "REASON", "REMEDY"]);
    for layer in &protection.layers {
        let tone = match layer.state {
            LayerState::Active => Tone::Good,
            LayerState::Unavailable => Tone::Bad,
        };
        rows.push([
            plain(&layer.layer),
            plain(&layer.hook),
            (layer.state.to_string(), tone),
            or_dash(layer.reason.as_ref()),
            or_dash(layer.remedy.as_ref()),
        ]);
    }
    console.table(&rows, "no hooks")
}

/// A heading and indented lines; nothing where there are none.
pub(super) fn list(
    console: &mut Console<'_>,
    heading: &str,
    lines: &[impl ToString],
) -> std::io::Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    writeln!(console.out, "\n{heading}")?;
    for line in lines {
        writeln!(console.out, "  {}", super::output::clean(&line.to_string()))?;
    }
    Ok(())
}

pub(super) fn tone_of(level: ProtectionLevel) -> Tone {
    match level {
        ProtectionLevel::Full => Tone::Good,
        ProtectionLevel::Partial => Tone::Careful,
        ProtectionLevel::None => Tone::Bad,
    }
}

/// The two largest units.
fn uptime(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    if days > 0 {
        format!("{days}d {hours}h")
    } else if hours > 0 {
        format!("{hours}h {minutes}m")
    } else {
        format!("{minutes}m {}s", seconds % 60)
    }
}
