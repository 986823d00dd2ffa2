//! The tests of reading as a whole, and the small manifests they share.

mod agreement;
mod refusals;
mod robustness;
mod sets;

use std::path::PathBuf;

use super::*;

pub(super) const HEAD: &str = "apiVersion: agentguard.dev/v1alpha1\n";

/// A scope of which `spec` is given; its first line is the fifth.
pub(super) fn scope(spec: &str) -> String {
    format!("{HEAD}kind: Scope\nmetadata: {{name: a}}\nspec:\n{spec}")
}

pub(super) fn egress(to: &str, ports: &str) -> String {
    scope(&format!(
        "  scope: a\n  description: d\n  egress:\n    - to:\n        - {to}\n      ports:\n        - {ports}\n"
    ))
}

pub(super) fn ports(ports: &str) -> String {
    egress("ipBlock: {cidr: 192.0.2.0/24}", ports)
}

pub(super) fn cidr(cidr: &str) -> String {
    egress(&format!("ipBlock: {{cidr: {cidr}}}"), "{protocol: TCP}")
}

pub(super) fn exec(path: &str) -> String {
    scope(&format!("  scope: a\n  description: d\n  exec:\n    - path: {path}\n"))
}

pub(super) fn grant_with(subject: &str, scopes: &str, times: &str, rest: &str) -> String {
    format!(
        "{HEAD}kind: Grant\nmetadata: {{name: a}}\nspec:\n  subject: {{{subject}}}\n  scopes: {scopes}\n{times}{rest}"
    )
}

pub(super) fn grant(times: &str) -> String {
    grant_with("spiffeId: spiffe://example.org/a", "[a]", times, "  grantedBy: me\n  reason: r\n")
}

pub(super) fn workload(select: &str, id: &str, mode: &str) -> String {
    format!(
        "{HEAD}kind: Workload\nmetadata: {{name: a}}\nspec:\n  select: {{{select}}}\n  spiffeId: {id}\n  mode: {mode}\n"
    )
}

pub(super) fn errors(text: &str) -> Vec<String> {
    let (_, errors) = parse_text("f", text.as_bytes(), Creation::Unknown);
    errors.iter().map(ToString::to_string).collect()
}

pub(super) fn accepted(text: &str) -> Vec<Manifest> {
    let (manifests, errors) = parse_text("f", text.as_bytes(), Creation::Unknown);
    assert_eq!(errors, [], "{text}");
    manifests
}

pub(super) fn assemble_text(text: &str) -> (ManifestSet, Vec<String>) {
    let (set, errors) = assemble(accepted(text));
    (set, errors.iter().map(ToString::to_string).collect())
}

pub(super) fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

pub(super) fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}
