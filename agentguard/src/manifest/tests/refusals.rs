//! Everything that is refused, with the very lines that say so.

use super::*;

#[track_caller]
fn check_table(table: &[(String, &[&str])]) {
    let mut wrong = String::new();
    for (text, expected) in table {
        let found = errors(text);
        if found != *expected {
            wrong.push_str(&format!("for {text}\nexpected {expected:#?}\nfound    {found:#?}\n"));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn the_example_of_the_contract_is_the_line_it_promises() {
    let text = format!("---\n{}", cidr("192.0.2.1/24"));
    assert_eq!(
        errors(&text),
        ["f:10:27: spec.egress[0].to[0].ipBlock.cidr: \"192.0.2.1/24\" has host bits set; \
          write 192.0.2.0/24 for the network or 192.0.2.1/32 for the host"]
    );
}

#[test]
fn every_refusal_of_the_envelope_has_its_line() {
    let spec = "metadata: {name: a}\nspec: {scope: a, description: d, exec: [{path: /a}]}\n";
    check_table(&[
        (
            format!("apiVersion: agentguard.dev/v1\nkind: Scope\n{spec}"),
            &[
                "f:1:13: apiVersion: \"agentguard.dev/v1\" is not a version this agentguard reads; write agentguard.dev/v1alpha1",
            ],
        ),
        (
            format!("{HEAD}kind: Scpoe\n{spec}"),
            &["f:2:7: kind: \"Scpoe\" is not known here; did you mean Scope?"],
        ),
        (
            format!("{HEAD}kind: Pod\n{spec}"),
            &[
                "f:2:7: kind: \"Pod\" is not known here; write Scope, Grant, ClusterGrant or Workload",
            ],
        ),
        (format!("kind: Scope\n{spec}"), &["f:1:1: apiVersion: is missing; add it"]),
        (
            format!("{HEAD}kind: Scope\nmetadata: {{name: a}}\n"),
            &["f:1:1: spec: is missing; add it"],
        ),
        (
            format!("{HEAD}kind: Scope\nstatus: {{}}\n{spec}"),
            &[
                "f:3:1: status: is not a known field; remove it, known here: apiVersion, kind, metadata and spec",
            ],
        ),
        (
            format!("{HEAD}kind: Scope\nkind: Scope\n{spec}"),
            &["f:3:1: kind: is given twice, first on line 2; keep one of the two"],
        ),
        (
            format!("{HEAD}kind: Scope\nmetadata: {{name: a, labels: {{}}}}\nspec: {{}}\n"),
            &[
                "f:3:21: metadata.labels: is not a known field; remove it, known here: name and namespace",
                "f:4:7: spec: has neither egress, exec, unixSockets nor listen; write at least one of them",
                "f:4:7: spec.scope: is missing; add it",
                "f:4:7: spec.description: is missing; add it",
            ],
        ),
        (
            format!("{HEAD}kind: Scope\nmetadata: {{name: A_b}}\nspec: \n"),
            &[
                "f:3:18: metadata.name: \"A_b\" contains '_'; a name has only a-z, 0-9, `-` and `.`",
                "f:4:1: spec: is empty; write a value, or remove the field",
            ],
        ),
        (
            "- a\n".to_owned(),
            &[
                "f:1:1: is a list where a map of fields is expected; write apiVersion, kind, metadata and spec",
            ],
        ),
        (
            "a text\n".to_owned(),
            &[
                "f:1:1: \"a text\" is one value where a map of fields is expected; write apiVersion, kind, metadata and spec",
            ],
        ),
    ]);
}
#[test]
fn every_refusal_of_yaml_that_reads_differently_has_its_line() {
    let long = format!("# {}\n", "x".repeat(MAX_DOCUMENT_BYTES));
    check_table(&[
        (
            exec("&a /bin/sh"),
            &["f:8:13: spec.exec[0].path: anchors are not allowed; remove the `&` and its name"],
        ),
        (
            exec("&a /bin/sh\n    - path: *a"),
            &[
                "f:8:13: spec.exec[0].path: anchors are not allowed; remove the `&` and its name",
                "f:9:13: spec.exec[1].path: aliases are not allowed; write the value out",
            ],
        ),
        (
            exec("!!str /bin/sh"),
            &["f:8:13: spec.exec[0].path: tags are not allowed; remove the `!` and its name"],
        ),
        (
            exec("!mine /bin/sh"),
            &["f:8:13: spec.exec[0].path: tags are not allowed; remove the `!` and its name"],
        ),
        (
            exec("/bin/sh\n      <<: {path: /bin/ls}"),
            &["f:9:7: spec.exec[0]: merge keys are not allowed; write the fields out"],
        ),
        (
            exec("/bin/sh\n      path: /bin/ls"),
            &["f:9:7: spec.exec[0].path: is given twice, first on line 8; keep one of the two"],
        ),
        (
            exec("/bin/sh\n      ? [a]\n      : b"),
            &["f:9:9: spec.exec[0]: a field has no plain name; write `name: value`"],
        ),
        (
            exec("/bin/sh\n\t- path: /bin/ls"),
            &[
                "f:8:13: is not valid YAML: while scanning a plain scalar, found a tab; indent with spaces, not with tabs",
            ],
        ),
        (
            exec("/bin/sh\n      bad: [a"),
            &[
                "f:10:1: is not valid YAML: while parsing a flow sequence, expected ',' or ']'; correct the syntax here",
            ],
        ),
        (
            format!("%YAML 1.1\n---\n{}", exec("/a")),
            &["f:1:1: YAML directives are not allowed; remove the line with `%`"],
        ),
        (exec("/bin/\u{1}sh"), &["f:8:18: has a control character (U+0001); remove it"]),
        (exec("/bin/\u{0}sh"), &["f:8:18: has a control character (U+0000); remove it"]),
        (exec("/bin/\u{202e}sh"), &["f:8:18: has a control character (U+202E); remove it"]),
        (
            exec("\"/bin/\\u0007sh\""),
            &[
                "f:8:13: spec.exec[0].path: \"/bin/\\u{7}sh\" has a control character (U+0007); remove it and write the text on one line",
            ],
        ),
        (
            exec("\"/bin/\\nsh\""),
            &[
                "f:8:13: spec.exec[0].path: \"/bin/\\nsh\" has a control character (U+000A); remove it and write the text on one line",
            ],
        ),
        (
            long,
            &["f:1:1: a document of 1048579 bytes is over 1 MiB; split it into several documents"],
        ),
        (
            format!("{}{}", "[".repeat(33), "]".repeat(33)),
            &["f:1:33: is nested deeper than 32 levels; write it flatter"],
        ),
        (
            format!("{}1", "- ".repeat(40)),
            &["f:1:65: is nested deeper than 32 levels; write it flatter"],
        ),
    ]);
}
#[test]
fn every_refusal_of_a_scope_has_its_line() {
    let listen =
        |listen: &str| scope(&format!("  scope: a\n  description: d\n  listen: {listen}\n"));
    check_table(&[
        (
            scope("  scope: a\n  description: d\n"),
            &[
                "f:5:3: spec: has neither egress, exec, unixSockets nor listen; write at least one of them",
            ],
        ),
        (
            scope("  scope: GitHub:read\n  description: d\n  exec: [{path: /a}]\n"),
            &["f:5:10: spec.scope: \"GitHub:read\" has upper-case letters; write github:read"],
        ),
        (
            scope("  scope: a\n  description: ''\n  exec: [{path: /a}]\n"),
            &["f:6:16: spec.description: is empty; write a value, or remove the field"],
        ),
        (
            scope("  scope: a\n  description:\n  exec: [{path: /a}]\n"),
            &["f:6:3: spec.description: is empty; write a value, or remove the field"],
        ),
        (
            scope("  scope: a\n  description: 12\n  exec: [{path: /a}]\n"),
            &[
                "f:6:16: spec.description: \"12\" is a number where text is expected; put it in quotes if it is meant as text",
            ],
        ),
        (
            scope("  scope: a\n  description: no\n  exec: [{path: /a}]\n"),
            &[
                "f:6:16: spec.description: \"no\" is a truth value where text is expected; put it in quotes if it is meant as text",
            ],
        ),
        (
            scope("  scope: a\n  description: [d]\n  exec: [{path: /a}]\n"),
            &["f:6:16: spec.description: is a list where text is expected; write one value"],
        ),
        (
            scope("  scope: a\n  description: |\n    one\n    two\n  exec: [{path: /a}]\n"),
            &[
                "f:7:5: spec.description: \"one\\ntwo\\n\" has a control character (U+000A); remove it and write the text on one line",
            ],
        ),
        (
            scope("  scope: a\n  exec: [{path: /a}]\n"),
            &["f:5:3: spec.description: is missing; add it"],
        ),
        (
            scope("  scope: a\n  description: d\n  egres: []\n  exec: [{path: /a}]\n"),
            &["f:7:3: spec.egres: is not a known field; did you mean egress?"],
        ),
        (
            scope("  scope: a\n  description: d\n  exec: []\n"),
            &["f:7:9: spec.exec: is an empty list; write at least one item, or remove the field"],
        ),
        (
            scope("  scope: a\n  description: d\n  exec:\n"),
            &["f:7:3: spec.exec: is empty; write a value, or remove the field"],
        ),
        (
            scope("  scope: a\n  description: d\n  exec: {path: /a}\n"),
            &[
                "f:7:9: spec.exec: is a map of fields where a list is expected; begin each item with `- `",
            ],
        ),
        (
            scope("  scope: a\n  description: d\n  exec: [/a]\n"),
            &[
                "f:7:10: spec.exec[0]: \"/a\" is one value where a map of fields is expected; write path",
            ],
        ),
        (
            scope("  scope: a\n  description: d\n  exec: [{path: /a}, {path: '/a'}]\n"),
            &["f:7:22: spec.exec[1]: repeats spec.exec[0]; remove one of the two"],
        ),
        (
            egress("ipBlock: {cidr: 192.0.2.1}", "{protocol: TCP}"),
            &[
                "f:9:27: spec.egress[0].to[0].ipBlock.cidr: \"192.0.2.1\" has no prefix length; write 192.0.2.1/32 for this one address",
            ],
        ),
        (
            cidr("192.0.2.0/33"),
            &[
                "f:9:27: spec.egress[0].to[0].ipBlock.cidr: \"192.0.2.0/33\" is no block of IPv4 or IPv6 addresses; write one such as 192.0.2.0/24 or 2001:db8::/32",
            ],
        ),
        (
            cidr("example.org"),
            &[
                "f:9:27: spec.egress[0].to[0].ipBlock.cidr: \"example.org\" is no block of IPv4 or IPv6 addresses; write one such as 192.0.2.0/24 or 2001:db8::/32",
            ],
        ),
        (
            cidr("\"2001:db8::1/64\""),
            &[
                "f:9:27: spec.egress[0].to[0].ipBlock.cidr: \"2001:db8::1/64\" has host bits set; write 2001:db8::/64 for the network or 2001:db8::1/128 for the host",
            ],
        ),
        (
            cidr("\"::ffff:192.0.2.0/120\""),
            &[
                "f:9:27: spec.egress[0].to[0].ipBlock.cidr: \"::ffff:192.0.2.0/120\" is a block of IPv4 addresses written as IPv6; write 192.0.2.0/24",
            ],
        ),
        (
            egress("ipBlock: {except: [192.0.2.0/25]}", "{protocol: TCP}"),
            &["f:9:20: spec.egress[0].to[0].ipBlock.cidr: is missing; add it"],
        ),
        (
            egress("ipBlock: {cidr: 192.0.2.0/24, except: []}", "{protocol: TCP}"),
            &[
                "f:9:49: spec.egress[0].to[0].ipBlock.except: is an empty list; write at least one item, or remove the field",
            ],
        ),
        (
            egress("ipBlock: {cidr: 192.0.2.0/24, except: [198.51.100.0/25]}", "{protocol: TCP}"),
            &[
                "f:9:50: spec.egress[0].to[0].ipBlock.except[0]: \"198.51.100.0/25\" is not inside 192.0.2.0/24; write a smaller block of 192.0.2.0/24, or remove it",
            ],
        ),
        (
            egress("ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.0/24]}", "{protocol: TCP}"),
            &[
                "f:9:50: spec.egress[0].to[0].ipBlock.except[0]: \"192.0.2.0/24\" covers all of 192.0.2.0/24; write a smaller block, or remove the ipBlock",
            ],
        ),
        (
            egress("ipBlock: {cidr: 192.0.2.0/24, except: ['2001:db8::/32']}", "{protocol: TCP}"),
            &[
                "f:9:50: spec.egress[0].to[0].ipBlock.except[0]: \"2001:db8::/32\" is not inside 192.0.2.0/24; write a smaller block of 192.0.2.0/24, or remove it",
            ],
        ),
        (
            egress(
                "ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.0/25, 192.0.2.128/25]}",
                "{protocol: TCP}",
            ),
            &[
                "f:9:49: spec.egress[0].to[0].ipBlock.except: covers all of 192.0.2.0/24; leave at least one address over, or remove the ipBlock",
            ],
        ),
        (
            egress(
                "ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.0/25, 192.0.2.0/25]}",
                "{protocol: TCP}",
            ),
            &[
                "f:9:64: spec.egress[0].to[0].ipBlock.except[1]: \"192.0.2.0/25\" repeats spec.egress[0].to[0].ipBlock.except[0]; remove one of the two",
            ],
        ),
        (
            egress(
                "ipBlock: {cidr: 192.0.2.0/24}\n        - ipBlock: {cidr: 192.0.2.0/24}",
                "{protocol: TCP}",
            ),
            &["f:10:11: spec.egress[0].to[1]: repeats spec.egress[0].to[0]; remove one of the two"],
        ),
        (
            egress("{}", "{protocol: TCP}"),
            &[
                "f:9:11: spec.egress[0].to[0]: has neither ipBlock, dnsName, service nor namespaceSelector; write exactly one of them",
            ],
        ),
        (
            egress("{ipBlock: {cidr: 192.0.2.0/24}, dnsName: a.example}", "{protocol: TCP}"),
            &[
                "f:9:11: spec.egress[0].to[0]: has both ipBlock and dnsName; keep exactly one of them",
                "f:9:52: spec.egress[0].to[0].dnsName: \"a.example\" is a DNS name, which is not enforced yet by this version; write an ipBlock with the addresses it stands for",
            ],
        ),
        (
            egress("dnsName: api.example.org", "{protocol: TCP}"),
            &[
                "f:9:20: spec.egress[0].to[0].dnsName: \"api.example.org\" is a DNS name, which is not enforced yet by this version; write an ipBlock with the addresses it stands for",
            ],
        ),
        (
            egress("dnsName: API.example.org", "{protocol: TCP}"),
            &[
                "f:9:20: spec.egress[0].to[0].dnsName: \"API.example.org\" has upper-case letters; write api.example.org",
            ],
        ),
        (
            scope(
                "  scope: a\n  description: d\n  egress:\n    - to: [{ipBlock: {cidr: 192.0.2.0/24}}]\n",
            ),
            &["f:8:7: spec.egress[0].ports: is missing; add it"],
        ),
        (
            scope("  scope: a\n  description: d\n  egress:\n    - ports: [{protocol: TCP}]\n"),
            &["f:8:7: spec.egress[0].to: is missing; add it"],
        ),
        (
            scope("  scope: a\n  description: d\n  egress:\n    - {to: [], ports: []}\n"),
            &[
                "f:8:12: spec.egress[0].to: is an empty list; write at least one item, or remove the field",
                "f:8:23: spec.egress[0].ports: is an empty list; write at least one item, or remove the field",
            ],
        ),
        (
            ports("{protocol: TCP, port: \"443\"}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"443\" is text where a number is expected; remove the quotes",
            ],
        ),
        (
            ports("{protocol: TCP, port: 0}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"0\" is no port; write 1 to 65535, or leave port out for every port",
            ],
        ),
        (
            ports("{protocol: TCP, port: 65536}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"65536\" is outside the range of ports; write 1 to 65535",
            ],
        ),
        (
            ports("{protocol: TCP, port: -1}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"-1\" is outside the range of ports; write 1 to 65535",
            ],
        ),
        (
            ports("{protocol: TCP, port: 0443}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"0443\" is no whole decimal number; write a port from 1 to 65535",
            ],
        ),
        (
            ports("{protocol: TCP, port: 0x1bb}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"0x1bb\" is no whole decimal number; write a port from 1 to 65535",
            ],
        ),
        (
            ports("{protocol: TCP, port: 443.0}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"443.0\" is no whole decimal number; write a port from 1 to 65535",
            ],
        ),
        (
            ports("{protocol: TCP, port: https}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"https\" is no whole decimal number; write a port from 1 to 65535",
            ],
        ),
        (
            ports("{protocol: TCP, port: }"),
            &[
                "f:11:27: spec.egress[0].ports[0].port: is empty; write a port from 1 to 65535, or remove the field",
            ],
        ),
        (
            ports("{protocol: TCP, port: [443]}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: is a list where a number is expected; write a port from 1 to 65535",
            ],
        ),
        (
            ports("{protocol: TCP, port: 443, endPort: 442}"),
            &[
                "f:11:47: spec.egress[0].ports[0].endPort: \"442\" is below port 443; write a number from 443 to 65535, or remove endPort",
            ],
        ),
        (
            ports("{protocol: TCP, endPort: 442}"),
            &[
                "f:11:36: spec.egress[0].ports[0].endPort: \"442\" ends a range that has no beginning; add port, its first port",
            ],
        ),
        (
            ports("{protocol: ICMP, port: 443}"),
            &[
                "f:11:34: spec.egress[0].ports[0].port: \"443\" is a port, and ICMP has none; remove it, or name TCP, UDP or SCTP",
            ],
        ),
        (
            ports("{protocol: Any, port: 1, endPort: 2}"),
            &[
                "f:11:33: spec.egress[0].ports[0].port: \"1\" is a port, and Any has none; remove it, or name TCP, UDP or SCTP",
                "f:11:45: spec.egress[0].ports[0].endPort: \"2\" is a port, and Any has none; remove it, or name TCP, UDP or SCTP",
            ],
        ),
        (
            ports("{protocol: tcp, port: 443}"),
            &[
                "f:11:22: spec.egress[0].ports[0].protocol: \"tcp\" is not known here; did you mean TCP?",
            ],
        ),
        (
            ports("{protocol: HTTP, port: 443}"),
            &[
                "f:11:22: spec.egress[0].ports[0].protocol: \"HTTP\" is not known here; write Any, ICMP, TCP, UDP or SCTP",
            ],
        ),
        (ports("{port: 443}"), &["f:11:11: spec.egress[0].ports[0].protocol: is missing; add it"]),
        (
            ports("{protocol: TCP, ports: 443}"),
            &["f:11:27: spec.egress[0].ports[0].ports: is not a known field; did you mean port?"],
        ),
        (
            ports("{protocol: TCP, port: 443}\n        - {port: 443, protocol: TCP}"),
            &[
                "f:12:11: spec.egress[0].ports[1]: repeats spec.egress[0].ports[0]; remove one of the two",
            ],
        ),
        (
            listen("[{protocol: TCP, port: 8080}, {protocol: TCP, port: 8080, endPort: 8080}]"),
            &["f:7:41: spec.listen[1]: repeats spec.listen[0]; remove one of the two"],
        ),
        (
            exec("git"),
            &["f:8:13: spec.exec[0].path: \"git\" is not an absolute path; begin it with `/`"],
        ),
        (
            exec("/usr/../bin/git"),
            &[
                "f:8:13: spec.exec[0].path: \"/usr/../bin/git\" has the name `..` in it; write the path without `.` and `..`",
            ],
        ),
        (
            exec("/usr//bin/git"),
            &[
                "f:8:13: spec.exec[0].path: \"/usr//bin/git\" has an empty name; write every `/` once and none at the end",
            ],
        ),
        (
            exec("/usr/bin/"),
            &[
                "f:8:13: spec.exec[0].path: \"/usr/bin/\" has an empty name; write every `/` once and none at the end",
            ],
        ),
        (
            exec("/usr/**/git"),
            &[
                "f:8:13: spec.exec[0].path: \"/usr/**/git\" has `**` elsewhere than as its last name; write `*` within one name or end with `/**`",
            ],
        ),
        (
            exec("/usr/bin/git**"),
            &[
                "f:8:13: spec.exec[0].path: \"/usr/bin/git**\" has `**` elsewhere than as its last name; write `*` within one name or end with `/**`",
            ],
        ),
        (
            exec("/"),
            &[
                "f:8:13: spec.exec[0].path: \"/\" is the root directory; name an executable, or end with `/**` for a tree",
            ],
        ),
        (
            exec("443"),
            &[
                "f:8:13: spec.exec[0].path: \"443\" is a number where text is expected; put it in quotes if it is meant as text",
            ],
        ),
        (
            scope(
                "  scope: a\n  description: d\n  unixSockets: [{path: /run/*.sock}, {abstract: a*}, {path: /}, {path: /a}, {path: /a}]\n",
            ),
            &[
                "f:7:24: spec.unixSockets[0].path: \"/run/*.sock\" has a wildcard, which unix sockets can not have; name one socket",
                "f:7:49: spec.unixSockets[1].abstract: \"a*\" has a wildcard, which unix sockets can not have; name one socket",
                "f:7:61: spec.unixSockets[2].path: \"/\" is the root directory; name a socket",
                "f:7:77: spec.unixSockets[4]: repeats spec.unixSockets[3]; remove one of the two",
            ],
        ),
        (
            scope(
                "  scope: a\n  description: d\n  unixSockets: [{path: run/a.sock}, {path: /a, abstract: a}, {}]\n",
            ),
            &[
                "f:7:24: spec.unixSockets[0].path: \"run/a.sock\" is not an absolute path; begin it with `/`",
                "f:7:37: spec.unixSockets[1]: has both path and abstract; keep exactly one of them",
                "f:7:62: spec.unixSockets[2]: has neither path nor abstract; write exactly one of them",
            ],
        ),
    ]);
}
#[test]
fn every_refusal_of_a_grant_has_its_line() {
    let rest = "  grantedBy: me\n  reason: r\n";
    let never = "  expiresAt: never\n";
    let id = "spiffeId: spiffe://example.org/a";
    check_table(&[
        (
            grant(""),
            &[
                "f:5:3: spec: has no expiresAt; write the time at which the grant ends, or `never` for a standing grant",
            ],
        ),
        (
            grant("  expiresAt: never\n  ttl: 8h\n"),
            &[
                "f:5:3: spec: has both expiresAt and ttl; keep exactly one of them",
                "f:8:8: spec.ttl: \"8h\" counts from a time of creation, which a file does not have; write expiresAt with the time at which the grant ends",
            ],
        ),
        (
            grant("  ttl: 8h\n"),
            &[
                "f:7:8: spec.ttl: \"8h\" counts from a time of creation, which a file does not have; write expiresAt with the time at which the grant ends",
            ],
        ),
        (
            grant("  ttl: 8\n"),
            &[
                "f:7:8: spec.ttl: \"8\" is a number where text is expected; put it in quotes if it is meant as text",
            ],
        ),
        (
            grant("  ttl: 1h1h\n"),
            &[
                "f:7:8: spec.ttl: \"1h1h\" has the unit `h` twice or after a smaller one; write every unit once, largest first",
            ],
        ),
        (
            grant("  expiresAt:\n"),
            &["f:7:3: spec.expiresAt: is empty; write a value, or remove the field"],
        ),
        (
            grant("  expiresAt: Never\n"),
            &[
                "f:7:14: spec.expiresAt: \"Never\" is no RFC 3339 time; write one such as 2030-01-31T17:00:00Z",
            ],
        ),
        (
            grant("  expiresAt: 2030-01-01T00:00:00\n"),
            &[
                "f:7:14: spec.expiresAt: \"2030-01-01T00:00:00\" has no offset; add Z for UTC or an offset such as +01:00",
            ],
        ),
        (
            grant("  expiresAt: 2030-01-01\n"),
            &[
                "f:7:14: spec.expiresAt: \"2030-01-01\" is no RFC 3339 time; write one such as 2030-01-31T17:00:00Z",
            ],
        ),
        (
            grant("  expiresAt: 2030-02-30T00:00:00Z\n"),
            &[
                "f:7:14: spec.expiresAt: \"2030-02-30T00:00:00Z\" is a time that does not exist; write one such as 2030-01-31T17:00:00Z",
            ],
        ),
        (
            grant("  expiresAt: 2030-01-01 00:00:00Z\n"),
            &[
                "f:7:14: spec.expiresAt: \"2030-01-01 00:00:00Z\" is no RFC 3339 time; write one such as 2030-01-31T17:00:00Z",
            ],
        ),
        (
            grant("  expiresAt: 2030-01-01T00:00:00+01\n"),
            &[
                "f:7:14: spec.expiresAt: \"2030-01-01T00:00:00+01\" is no RFC 3339 time; write one such as 2030-01-31T17:00:00Z",
            ],
        ),
        (
            grant("  notBefore: 2030-01-01T00:00:00Z\n  expiresAt: 2030-01-01T01:00:00+01:00\n"),
            &[
                "f:8:14: spec.expiresAt: \"2030-01-01T01:00:00+01:00\" is not after notBefore (2030-01-01T00:00:00Z), so the grant would never permit anything; write a later time",
            ],
        ),
        (
            grant("  notBefore: never\n  expiresAt: never\n"),
            &[
                "f:7:14: spec.notBefore: \"never\" is no RFC 3339 time; write one such as 2030-01-31T17:00:00Z",
            ],
        ),
        (
            grant_with(id, "[]", never, rest),
            &[
                "f:6:11: spec.scopes: is an empty list; write at least one item, or remove the field",
            ],
        ),
        (
            grant_with(id, "[a, a]", never, rest),
            &["f:6:15: spec.scopes[1]: \"a\" repeats spec.scopes[0]; remove one of the two"],
        ),
        (
            grant_with(id, "a", never, rest),
            &[
                "f:6:11: spec.scopes: \"a\" is one value where a list is expected; begin each item with `- `",
            ],
        ),
        (
            grant_with(id, "['*']", never, rest),
            &[
                "f:6:12: spec.scopes[0]: \"*\" contains '*'; a scope has only a-z, 0-9 and single `:`, `.`, `_`, `/`, `-` between them",
            ],
        ),
        (
            grant_with("", "[a]", never, rest),
            &[
                "f:5:12: spec.subject: has neither spiffeId nor spiffeIdPrefix; write exactly one of them",
            ],
        ),
        (
            grant_with(
                "spiffeId: spiffe://example.org/a, spiffeIdPrefix: spiffe://example.org/",
                "[a]",
                never,
                rest,
            ),
            &[
                "f:5:12: spec.subject: has both spiffeId and spiffeIdPrefix; keep exactly one of them",
            ],
        ),
        (
            grant_with("spiffeId: spiffe://example.org/a/", "[a]", never, rest),
            &[
                "f:5:23: spec.subject.spiffeId: \"spiffe://example.org/a/\" ends with `/`; remove the slash, or use spiffeIdPrefix for everything below it",
            ],
        ),
        (
            grant_with("spiffeIdPrefix: spiffe://example.org/a", "[a]", never, rest),
            &[
                "f:5:29: spec.subject.spiffeIdPrefix: \"spiffe://example.org/a\" does not end with `/`; add the slash, or use spiffeId for this one identity",
            ],
        ),
        (
            grant_with(id, "[a]", never, "  grantedBy: ' '\n"),
            &[
                "f:5:3: spec.reason: is missing; add it",
                "f:8:14: spec.grantedBy: \" \" is empty; write a value, or remove the field",
            ],
        ),
    ]);
}
#[test]
fn every_refusal_of_a_workload_has_its_line() {
    let id = "spiffe://example.org/a";
    check_table(&[
        (
            workload("cgroup: /", id, "audit"),
            &[
                "f:5:20: spec.select.cgroup: \"/\" is the root cgroup, which is the whole host; name a cgroup below it",
            ],
        ),
        (
            workload("cgroup: agents.slice", id, "audit"),
            &[
                "f:5:20: spec.select.cgroup: \"agents.slice\" is not an absolute path; begin it with `/`",
            ],
        ),
        (
            workload("cgroup: /agents.slice/", id, "audit"),
            &[
                "f:5:20: spec.select.cgroup: \"/agents.slice/\" has an empty name; write every `/` once and none at the end",
            ],
        ),
        (
            workload("cgroup: /agents.slice/**", id, "audit"),
            &[
                "f:5:20: spec.select.cgroup: \"/agents.slice/**\" has `**` where one name is expected; write `*` to match within one name",
            ],
        ),
        (
            workload("cgroup: /agents.slice/../a", id, "audit"),
            &[
                "f:5:20: spec.select.cgroup: \"/agents.slice/../a\" has the name `..` in it; write the path without `.` and `..`",
            ],
        ),
        (
            workload("", id, "audit"),
            &["f:5:11: spec.select: has neither cgroup nor systemdUnit; write exactly one of them"],
        ),
        (
            workload("cgroup: /a, systemdUnit: a.service", id, "audit"),
            &["f:5:11: spec.select: has both cgroup and systemdUnit; keep exactly one of them"],
        ),
        (
            workload("systemdUnit: a*.service", id, "audit"),
            &[
                "f:5:25: spec.select.systemdUnit: \"a*.service\" has a wildcard; name one unit, or select by cgroup",
            ],
        ),
        (
            workload("systemdUnit: a@.service", id, "audit"),
            &[
                "f:5:25: spec.select.systemdUnit: \"a@.service\" is a template; name one of its instances, such as a@1.service",
            ],
        ),
        (
            workload("systemdUnit: -.slice", id, "audit"),
            &[
                "f:5:25: spec.select.systemdUnit: \"-.slice\" is the root slice, which is the whole host; name a unit below it",
            ],
        ),
        (
            workload("cgroup: /a", "spiffe://Example.org/a", "audit"),
            &[
                "f:6:13: spec.spiffeId: \"spiffe://Example.org/a\" has upper-case letters in its trust domain; write example.org",
            ],
        ),
        (
            workload("cgroup: /a", id, "off"),
            &["f:7:9: spec.mode: \"off\" is not known here; write audit or enforce"],
        ),
        (
            workload("cgroup: /a", id, "enforced"),
            &["f:7:9: spec.mode: \"enforced\" is not known here; did you mean enforce?"],
        ),
        (
            workload("cgroup: /a", id, "").replace("  mode: \n", ""),
            &["f:5:3: spec.mode: is missing; add it"],
        ),
    ]);
}

#[test]
fn every_refusal_of_a_destination_in_a_cluster_has_its_line() {
    let place = "f:9:11: spec.egress[0].to[0]";
    let cases = [
        ("podSelector: {matchLabels: {a: b}}", "", "has a podSelector without a namespaceSelector"),
        ("namespaceSelector: {}", ".namespaceSelector", "has neither matchLabels nor"),
        (
            "namespaceSelector: {matchLabels: {}}",
            ".namespaceSelector.matchLabels",
            "is an empty map",
        ),
        (
            "namespaceSelector: {matchLabels: {a: 1}}",
            ".namespaceSelector.matchLabels.a",
            "is a number",
        ),
        (
            "namespaceSelector: {matchLabels: {-a: b}}",
            ".namespaceSelector.matchLabels.-a",
            "has a key that",
        ),
        (
            "namespaceSelector: {matchExpressions: [{key: a, operator: In}]}",
            ".namespaceSelector.matchExpressions[0]",
            "has no values, and In needs some",
        ),
        (
            "namespaceSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}",
            ".namespaceSelector.matchExpressions[0]",
            "has values, and Exists takes none",
        ),
        (
            "namespaceSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}",
            ".namespaceSelector.matchExpressions[0].operator",
            "did you mean In?",
        ),
        ("service: {name: a}", ".service.namespace", "is missing"),
        ("service: {namespace: a, name: a.b}", ".service.name", "is no DNS label"),
    ];
    for (to, field, message) in cases {
        let found = errors(&egress(to, "{protocol: TCP}"));
        assert_eq!(found.len(), 1, "{to}: {found:?}");
        assert!(found[0].starts_with("f:9:"), "{}", found[0]);
        let path = format!("{}{field}: ", place.split_once(": ").unwrap().1);
        assert!(found[0].contains(&path) && found[0].contains(message), "{to}: {}", found[0]);
    }
    let both = "{service: {namespace: a, name: b}, ipBlock: {cidr: 192.0.2.0/24}}";
    assert!(errors(&egress(both, "{protocol: TCP}"))[0].contains("has both ipBlock and service"));
    let scope = format!("{HEAD}kind: Scope\nmetadata: {{name: a, namespace: b}}\nspec:\n");
    let scope = scope + "  scope: a\n  description: d\n  exec:\n    - path: /a\n";
    assert_eq!(
        errors(&scope),
        [
            "f:3:32: metadata.namespace: \"b\" is a namespace, which a Scope does not have; remove it"
        ]
    );
}
