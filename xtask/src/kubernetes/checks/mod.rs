//! What is checked in the cluster.
//!
//! Its one job is to have the checks run one after the other, each upon what those before it left.
//! Each is one function that applies, looks from outside, says what it saw, and fails with it.

mod agents;
mod changes;
mod dashboard;
mod deploy;
mod hook;
mod kinds;
mod metrics;
mod newcomer;
mod ordinary;
mod outage;
mod updates;

use std::{collections::BTreeMap, fs, path::PathBuf, time::Instant};

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp;

use self::agents::Agents;
use super::{cluster::Cluster, images::TOOLS, seconds, traffic::Traffic};
use crate::run::{heading, output};

/// The trust domain of the chart's defaults.
const TRUST_DOMAIN: &str = "cluster.local";

/// A check of a cluster with agents in it.
type Check = fn(&mut Cluster<'_>, &Agents) -> Result<()>;

/// In this order, each under its name.
const CHECKS: &[(&str, Check)] = &[
    ("agents are held to their grants", agents::held),
    ("an ephemeral container", agents::looked_into),
    ("a socket of the node", agents::at_sockets),
    ("changes", changes::take_effect),
    ("metrics", metrics::tell),
    ("dashboard", dashboard::shows_what_happened),
    ("updates of the daemon", updates::leave_no_window),
    ("without an API server", outage::is_survived),
    ("what kubectl shows", agents::shown),
    ("init containers", kinds::init_container_is_held),
    ("a pod deleted by force", kinds::deleted_by_force_is_held),
    ("the node's network", kinds::on_the_nodes_network),
    ("static pods", kinds::static_pod_is_held),
    ("the runtime's hook", hook::holds_and_goes),
    ("ordinary pods to the end", agents::bystander_saw_nothing),
];

/// Refuses what is in no check's name.
pub(super) fn exist(only: &[String]) -> Result<()> {
    let names: Vec<&str> = CHECKS.iter().map(|(name, _)| *name).collect();
    let is_known = |part: &str| names.iter().any(|name| name.contains(part));
    match only.iter().find(|part| !is_known(part)) {
        Some(part) => bail!("no check has {part:?} in its name; there are: {}", names.join("; ")),
        None => Ok(()),
    }
}

/// The checks whose names have one of `only` in them, all when there is none, after those that they need.
///
/// # Errors
///
/// The first that fails.
pub(super) fn run(cluster: &mut Cluster<'_>, only: &[String]) -> Result<()> {
    let is_asked_for =
        |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part.as_str()));
    let step = |name: &str, begin: Instant| {
        println!("passed    {name} ({})", seconds(begin.elapsed()));
    };
    let begin = Instant::now();
    heading("ordinary pods");
    ordinary::run_and_reach_a_service(cluster)?;
    step("ordinary pods", begin);
    let begin = Instant::now();
    heading("deploy/README.md");
    newcomer::is_told_the_truth(cluster)?;
    step("deploy/README.md", begin);
    let begin = Instant::now();
    heading("deploy/");
    deploy::everything_is_valid(cluster)?;
    deploy::daemon_runs(cluster)?;
    deploy::examples_are_taken(cluster)?;
    step("deploy/", begin);
    let begin = Instant::now();
    heading("agents");
    let agents = Agents::start(cluster)?;
    step("agents", begin);
    for (name, check) in CHECKS.iter().filter(|(name, _)| is_asked_for(name)) {
        let begin = Instant::now();
        heading(name);
        check(cluster, &agents).with_context(|| (*name).to_owned())?;
        step(name, begin);
    }
    Ok(())
}

/// Applies a manifest of this directory with its variables replaced, and says when `kubectl` was done.
fn apply(cluster: &Cluster<'_>, text: &str, variables: &[(&str, &str)]) -> Result<Timestamp> {
    let text = filled(text, variables);
    let file = tempfile::Builder::new().suffix(".yaml").tempfile()?;
    fs::write(file.path(), text)?;
    let file = file.path().display().to_string();
    kubectl(cluster, &["apply", "--filename", &file])?;
    Ok(Timestamp::now())
}

/// Waits for who runs a namespace's pods without an account of their own.
fn wait_for_account(cluster: &mut Cluster<'_>, namespace: &str) -> Result<()> {
    let path = "jsonpath={.metadata.name}";
    let account = ["--namespace", namespace, "get", "serviceaccount", "default", "--output", path];
    cluster.wait_for("the default service account", &account, "default").map(drop)
}

fn filled(text: &str, variables: &[(&str, &str)]) -> String {
    let common = [("$TRUST_DOMAIN", TRUST_DOMAIN), ("$TOOLS", TOOLS)];
    common
        .iter()
        .chain(variables)
        .fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
}

fn kubectl(cluster: &Cluster<'_>, arguments: &[&str]) -> Result<String> {
    output(&mut cluster.kubectl(arguments))
}

/// Where the kubelet keeps the logs of pods.
fn logs(cluster: &Cluster<'_>) -> PathBuf {
    cluster.node().outside("var/log/pods")
}

fn traffic(cluster: &Cluster<'_>, pod: &str) -> Result<Traffic> {
    Traffic::of(&logs(cluster), "agents", pod, cluster.pace())
}

/// Expectations of several targets.
fn expected<T: Clone>(of: &[(&str, T)]) -> BTreeMap<String, T> {
    of.iter().map(|(target, outcome)| ((*target).to_owned(), outcome.clone())).collect()
}
