//! How the target of a request is written for people, read leniently from a line of the log: what a
//! newer daemon adds is not shown, what is missing is a dash.

use serde_json::Value;

/// The target, as `192.0.2.7:443/TCP` or `/usr/bin/git`.
#[must_use]
pub fn target(request: &Value) -> String {
    let target = &request["target"];
    let source = if target.is_object() { target } else { request };
    let text = |name: &str| source[name].as_str();
    if let Some(target) = target.as_str() {
        return target.to_owned();
    }
    if let Some(path) = text("path") {
        return path.to_owned();
    }
    if let Some(name) = text("abstract") {
        // As `ss` and /proc/net/unix show the leading NUL.
        return format!("@{name}");
    }
    if let Some(family) = text("family") {
        return family.to_owned();
    }
    let port = source["port"].as_u64().filter(|port| *port > 0);
    let mut shown = match (text("address").or_else(|| text("host")), port) {
        (Some(host), Some(port)) if host.contains(':') => format!("[{host}]:{port}"),
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, Some(port)) => port.to_string(),
        (None, None) if target.is_null() => "-".to_owned(),
        (None, None) => target.to_string(),
    };
    if let (true, Some(protocol)) = (shown != "-", text("protocol")) {
        shown = format!("{shown}/{protocol}");
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_record_is_shown_whatever_form_its_target_has() {
        for (request, shown) in [
            (json!({"target": "192.0.2.7:443/TCP"}), "192.0.2.7:443/TCP"),
            (
                json!({"target": {"address": "2001:db8::1", "port": 53, "protocol": "UDP"}}),
                "[2001:db8::1]:53/UDP",
            ),
            (json!({"address": "192.0.2.7", "protocol": "ICMP", "port": 0}), "192.0.2.7/ICMP"),
            (json!({"target": {"path": "/usr/bin/git"}}), "/usr/bin/git"),
            (
                json!({"action": "unix_connect", "path": "/run/a", "abstract": null, "peer": "other"}),
                "/run/a",
            ),
            (json!({"action": "unix_send", "path": null, "abstract": "a", "peer": "other"}), "@a"),
            (json!({"action": "unix_connect", "path": null, "abstract": null}), "-"),
            (json!({"action": "socket", "family": "AF_VSOCK", "protocol": 0}), "AF_VSOCK"),
            (json!({"action": "leave"}), "-"),
            (json!(null), "-"),
        ] {
            assert_eq!(target(&request), shown);
        }
    }
}
