//! What would permit a denied request, as commands to paste.
//!
//! Pure. Everything that came from outside is quoted for the shell: a workload chooses the names
//! of its files, and what is printed here is meant to be run by root.

use std::net::IpAddr;

use super::caller::Viewer;
use super::types::{Explanation, Protocol, Target, Verdict};

/// What `viewer` can do about a denial, best first; empty where nothing is denied.
#[must_use]
pub fn remedies(viewer: &Viewer, explanation: &Explanation) -> Vec<String> {
    match explanation.verdict {
        Verdict::Allow | Verdict::Unmanaged => return Vec::new(),
        Verdict::Deny => {}
    }
    let Some(identity) = &explanation.identity else {
        return vec![
            "the workload is denied everything until its identity is known; see agentguard status"
                .into(),
        ];
    };
    if let Target::Socket { family, .. } = &explanation.target {
        return vec![format!(
            "no scope can grant a socket of family {family}; have what needs one run outside of \
             the workload"
        )];
    }
    let mut remedies: Vec<String> = Vec::new();
    for scope in &explanation.permitting_scopes {
        match viewer {
            Viewer::Everything => {}
            Viewer::Own { .. } => remedies
                .push(format!("agentguard exec --scope {} --ttl 1h -- COMMAND", quote(scope))),
        }
        let sudo = match viewer {
            Viewer::Everything => "",
            Viewer::Own { .. } => "sudo ",
        };
        remedies.push(format!(
            "{sudo}agentguard grant --to {} --scope {} --ttl 1h --reason 'REASON'",
            quote(identity),
            quote(scope)
        ));
    }
    if remedies.is_empty() {
        remedies.push(format!(
            "no scope permits it: add {} to the spec of a Scope, then grant that scope",
            permission(&explanation.target)
        ));
    }
    remedies
}

/// The smallest permission of a scope that covers the target, in the form of a manifest.
fn permission(target: &Target) -> String {
    match target {
        Target::Connect { host, port, protocol } | Target::Send { host, port, protocol } => {
            let to = match host.parse::<IpAddr>() {
                Ok(address @ IpAddr::V4(_)) => format!("ipBlock: {{cidr: {address}/32}}"),
                Ok(address @ IpAddr::V6(_)) => format!("ipBlock: {{cidr: \"{address}/128\"}}"),
                Err(_) => format!("dnsName: {}", json(host)),
            };
            format!("`egress: [{{to: [{{{to}}}], ports: [{}]}}]`", ports(*port, *protocol))
        }
        Target::Bind { port, protocol } | Target::Listen { port, protocol } => {
            format!("`listen: [{}]`", ports(*port, *protocol))
        }
        Target::Unix { path } if path.is_absolute() => {
            format!("`unixSockets: [{{path: {}}}]`", json(&path.to_string_lossy()))
        }
        // Bound by a path relative to where its server ran; the rest of it is known there only.
        Target::Unix { path } => format!(
            "`unixSockets: [{{path: …}}]` with the whole path of {}",
            json(&path.to_string_lossy())
        ),
        Target::Abstract { name } => format!("`unixSockets: [{{abstract: {}}}]`", json(name)),
        Target::Socket { family, .. } => format!("nothing, since {family} can not be granted,"),
        Target::Exec { path } => {
            format!("`exec: [{{path: {}}}]`", json(&path.to_string_lossy()))
        }
    }
}

fn ports(port: u16, protocol: Protocol) -> String {
    if protocol.has_ports() {
        format!("{{protocol: {protocol}, port: {port}}}")
    } else {
        format!("{{protocol: {protocol}}}")
    }
}

fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// `text` as one word of a shell.
#[must_use]
pub fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !text.is_empty() && !text.starts_with('-') && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::Mode;
    use crate::audit::family::Family;

    fn denied(target: Target, permitting_scopes: &[&str]) -> Explanation {
        Explanation {
            workload: "agent".into(),
            identity: Some("spiffe://example.org/user/1000/agent".into()),
            target,
            verdict: Verdict::Deny,
            reason: Some("not_granted".into()),
            mode: Mode::Enforce,
            refused: true,
            scope: None,
            grant: None,
            expires_at: None,
            hook: Some("cgroup/connect4".into()),
            layer: Some("portable".into()),
            because: "no grant covers 192.0.2.7".into(),
            permitting_scopes: permitting_scopes.iter().map(ToString::to_string).collect(),
            remedy: Vec::new(),
        }
    }

    fn connect() -> Target {
        Target::Connect { host: "192.0.2.7".into(), port: 443, protocol: Protocol::Tcp }
    }

    #[test]
    fn root_is_given_the_command_that_grants_it() {
        assert_eq!(
            remedies(&Viewer::Everything, &denied(connect(), &["github:read"])),
            ["agentguard grant --to spiffe://example.org/user/1000/agent --scope github:read \
              --ttl 1h --reason 'REASON'"]
        );
    }

    #[test]
    fn a_user_is_first_told_to_run_it_again_with_the_scope() {
        let found =
            remedies(&Viewer::own("example.org", 1000), &denied(connect(), &["github:read"]));
        assert_eq!(found[0], "agentguard exec --scope github:read --ttl 1h -- COMMAND");
        assert!(found[1].starts_with("sudo agentguard grant --to "));
    }

    #[test]
    fn without_a_scope_the_smallest_permission_is_named() {
        let text = &remedies(&Viewer::Everything, &denied(connect(), &[]))[0];
        assert!(
            text.contains(
                "`egress: [{to: [{ipBlock: {cidr: 192.0.2.7/32}}], ports: [{protocol: TCP, port: 443}]}]`"
            ),
            "{text}"
        );
    }

    #[test]
    fn a_unix_socket_is_granted_by_what_its_server_bound_and_a_family_never() {
        let remedy = |target| remedies(&Viewer::Everything, &denied(target, &[])).remove(0);
        for (target, text) in [
            (
                Target::Unix { path: "/run/docker.sock".into() },
                "add `unixSockets: [{path: \"/run/docker.sock\"}]` to the spec",
            ),
            (Target::Unix { path: "a.sock".into() }, "with the whole path of \"a.sock\""),
            (Target::Abstract { name: "a\"b".into() }, r#"[{abstract: "a\"b"}]`"#),
            (
                Target::Listen { port: 80, protocol: Protocol::Tcp },
                "`listen: [{protocol: TCP, port: 80}]`",
            ),
            (
                Target::Socket { family: Family(40), protocol: 0 },
                "no scope can grant a socket of family AF_VSOCK;",
            ),
        ] {
            let remedy = remedy(target);
            assert!(remedy.contains(text), "{remedy}");
        }
    }

    #[test]
    fn names_that_a_workload_chose_can_not_leave_their_word() {
        assert_eq!(quote("a'; rm -rf / #"), r"'a'\''; rm -rf / #'");
        assert_eq!(quote("$(id)"), "'$(id)'");
        assert_eq!(quote("--never"), "'--never'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn what_is_allowed_needs_no_remedy() {
        let mut allowed = denied(connect(), &["github:read"]);
        allowed.verdict = Verdict::Allow;
        assert!(remedies(&Viewer::Everything, &allowed).is_empty());
    }
}
