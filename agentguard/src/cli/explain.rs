//! `agentguard explain`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::exit::Exit;
use super::output::{Console, Format, Tone, clean, tint};
use super::{Context, Result};
use crate::api::types::{ExplainRequest, Explanation, Mode, Protocol, Target, Verdict};

/// Say whether a request is permitted, why, and what would permit it
///
/// Without a target: why the last denied request was denied.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("target"))]
pub(super) struct Arguments {
    /// The name, SPIFFE ID or cgroup of a workload
    #[arg(long)]
    workload: Option<String>,
    /// The last denied request (of the workload, or of any)
    #[arg(long, group = "target")]
    last: bool,
    /// Connecting, as `192.0.2.7:443/TCP`, `[2001:db8::1]:53/UDP` or `192.0.2.7/ICMP`
    #[arg(long, group = "target", requires = "workload", value_name = "HOST:PORT/PROTO")]
    #[arg(value_parser = parse_connect)]
    connect: Option<Target>,
    /// Sending a datagram
    #[arg(long, group = "target", requires = "workload", value_name = "HOST:PORT/PROTO")]
    #[arg(value_parser = parse_send)]
    send: Option<Target>,
    /// Binding to a local port, as `8080/TCP`
    #[arg(long, group = "target", requires = "workload", value_name = "PORT/PROTO")]
    #[arg(value_parser = parse_bind)]
    bind: Option<Target>,
    /// Letting others connect to a local port, as `8080/TCP`
    #[arg(long, group = "target", requires = "workload", value_name = "PORT/PROTO")]
    #[arg(value_parser = parse_listen)]
    listen: Option<Target>,
    /// Connecting to somebody else's unix socket at a path, as its server sees it
    #[arg(long, group = "target", requires = "workload", value_name = "PATH")]
    #[arg(value_parser = parse_unix)]
    unix: Option<Target>,
    /// Connecting to somebody else's unix socket with an abstract name
    #[arg(long = "abstract", group = "target", requires = "workload", value_name = "NAME")]
    #[arg(value_parser = parse_abstract)]
    abstract_name: Option<Target>,
    /// Running a file, as the workload sees it
    #[arg(long, group = "target", requires = "workload", value_name = "PATH")]
    #[arg(value_parser = parse_exec)]
    exec: Option<Target>,
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let targets = [
        &arguments.connect,
        &arguments.send,
        &arguments.bind,
        &arguments.listen,
        &arguments.unix,
        &arguments.abstract_name,
        &arguments.exec,
    ];
    let target = targets.into_iter().flatten().next();
    let (Some(target), Some(workload)) = (target, &arguments.workload) else {
        let last = context.client.explain_last(arguments.workload.as_deref())?;
        match context.format {
            Format::Json => context.console.json(&last)?,
            Format::Table => {
                let executable =
                    last.executable.as_ref().map_or("-".into(), |path| path.to_string_lossy());
                writeln!(
                    context.console.out,
                    "{}, process {}, {}",
                    last.time,
                    last.pid,
                    clean(&executable)
                )?;
                show(&last.explanation, context.console)?;
            }
        }
        return Ok(Exit::Done);
    };
    let request = ExplainRequest { workload: workload.clone(), target: target.clone() };
    let explanation = context.client.explain(&request)?;
    match context.format {
        Format::Json => context.console.json(&explanation)?,
        Format::Table => show(&explanation, context.console)?,
    }
    Ok(Exit::Done)
}

fn show(explanation: &Explanation, console: &mut Console<'_>) -> std::io::Result<()> {
    let (word, tone) = match (explanation.verdict, explanation.refused, explanation.mode) {
        (Verdict::Allow, ..) => ("allowed", Tone::Good),
        (Verdict::Unmanaged, ..) => ("not an agent: let through", Tone::Careful),
        (Verdict::Deny, true, _) => ("denied and refused", Tone::Bad),
        (Verdict::Deny, false, Mode::Audit) => ("denied, let through (mode audit)", Tone::Careful),
        (Verdict::Deny, false, Mode::Enforce) => {
            ("denied, but no active hook refuses it", Tone::Bad)
        }
    };
    writeln!(
        console.out,
        "{}: {} by {}",
        tint(word, tone, console.colour),
        clean(&explanation.target.to_string()),
        clean(&explanation.workload)
    )?;
    writeln!(console.out, "because {}\n", clean(&explanation.because))?;
    let expires = explanation.expires_at.map(|expiry| expiry.to_string());
    let optional = [
        ("identity", explanation.identity.as_ref()),
        ("reason", explanation.reason.as_ref()),
        ("scope", explanation.scope.as_ref()),
        ("grant", explanation.grant.as_ref()),
        ("expires", expires.as_ref()),
        ("hook", explanation.hook.as_ref()),
        ("layer", explanation.layer.as_ref()),
    ];
    let mut fields = vec![("mode", explanation.mode.to_string(), Tone::Neutral)];
    fields.extend(
        optional
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?.clone(), Tone::Neutral))),
    );
    console.fields(&fields)?;
    super::status::list(console, "to permit it:", &explanation.remedy)
}

fn parse_connect(text: &str) -> std::result::Result<Target, String> {
    let (host, port, protocol) = parse_destination(text)?;
    Ok(Target::Connect { host, port, protocol })
}

fn parse_send(text: &str) -> std::result::Result<Target, String> {
    let (host, port, protocol) = parse_destination(text)?;
    Ok(Target::Send { host, port, protocol })
}

fn parse_bind(text: &str) -> std::result::Result<Target, String> {
    let (port, protocol) = split_protocol(text)?;
    Ok(Target::Bind { port: parse_port(port)?, protocol })
}

fn parse_listen(text: &str) -> std::result::Result<Target, String> {
    let (port, protocol) = split_protocol(text)?;
    Ok(Target::Listen { port: parse_port(port)?, protocol })
}

fn parse_unix(text: &str) -> std::result::Result<Target, String> {
    let path = PathBuf::from(text);
    match (path.is_absolute(), path.file_name()) {
        (true, Some(_)) => Ok(Target::Unix { path }),
        (true, None) => Err("is a directory; name the socket".into()),
        (false, _) => Err("is not absolute; name the socket as its server sees it".into()),
    }
}

fn parse_abstract(text: &str) -> std::result::Result<Target, String> {
    if text.is_empty() {
        return Err("is empty; write the name without its leading NUL (or `@`)".into());
    }
    Ok(Target::Abstract { name: text.to_owned() })
}

fn parse_exec(text: &str) -> std::result::Result<Target, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() {
        Ok(Target::Exec { path })
    } else {
        Err("is not absolute; name the file as the workload sees it".into())
    }
}

fn parse_destination(text: &str) -> std::result::Result<(String, u16, Protocol), String> {
    let (address, protocol) = split_protocol(text)?;
    let (host, port) = if protocol.has_ports() {
        let (host, port) = address.rsplit_once(':').ok_or("has no port; write HOST:PORT/PROTO")?;
        (host, parse_port(port)?)
    } else {
        (address, 0)
    };
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if inner.is_none() && protocol.has_ports() && host.contains(':') {
        return Err("is ambiguous; write an IPv6 address in brackets, as [2001:db8::1]:443".into());
    }
    let host = inner.unwrap_or(host);
    if host.is_empty() {
        return Err("has no host; write HOST:PORT/PROTO".into());
    }
    Ok((host.to_owned(), port, protocol))
}

fn split_protocol(text: &str) -> std::result::Result<(&str, Protocol), String> {
    let (rest, word) = text.rsplit_once('/').unwrap_or((text, "TCP"));
    let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Icmp]
        .into_iter()
        .find(|protocol| protocol.to_string().eq_ignore_ascii_case(word))
        .ok_or_else(|| format!("{word:?} is no protocol; write TCP, UDP, SCTP or ICMP"))?;
    Ok((rest, protocol))
}

fn parse_port(text: &str) -> std::result::Result<u16, String> {
    match text.parse() {
        Ok(port) if port > 0 => Ok(port),
        Ok(_) | Err(_) => Err(format!("{text:?} is no port; write a number from 1 to 65535")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_as_people_write_them() {
        for (text, host, port, protocol) in [
            ("192.0.2.7:443/TCP", "192.0.2.7", 443, Protocol::Tcp),
            ("192.0.2.7:443", "192.0.2.7", 443, Protocol::Tcp),
            ("[2001:db8::1]:53/udp", "2001:db8::1", 53, Protocol::Udp),
            ("api.example.org:1/sctp", "api.example.org", 1, Protocol::Sctp),
            ("192.0.2.7/ICMP", "192.0.2.7", 0, Protocol::Icmp),
            ("2001:db8::1/ICMP", "2001:db8::1", 0, Protocol::Icmp),
        ] {
            assert_eq!(parse_destination(text), Ok((host.into(), port, protocol)), "{text}");
        }
        for text in ["", "192.0.2.7", "192.0.2.7:0", "192.0.2.7:65536", "a:1/GRE", ":443", "::1:80"]
        {
            assert!(parse_destination(text).is_err(), "{text}");
        }
    }
}
