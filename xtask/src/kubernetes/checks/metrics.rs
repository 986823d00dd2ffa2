//! A real Prometheus asks the daemon.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{agents::Agents, kubectl};
use crate::{
    interrupt,
    kubernetes::{cluster::Cluster, seconds},
    run::{output, root},
};

/// Where it listens, on the node.
const LISTENS: &str = "127.0.0.1:9090";

/// How long it may take until the alert fires.
const FIRES: Duration = Duration::from_secs(60);

pub(super) fn tell(cluster: &mut Cluster<'_>, _: &Agents) -> Result<()> {
    let address = [
        "--namespace",
        "agentguard",
        "get",
        "pods",
        "--selector",
        "app.kubernetes.io/name=agentguard",
        "--output",
        "jsonpath={.items[0].status.podIP}",
    ];
    let address = kubectl(cluster, &address)?;
    let scratch = cluster.node().scratch().to_owned();
    let config = scratch.join("prometheus.yaml");
    let rules = root().join("deploy/prometheus/agentguard.rules.yaml");
    fs::write(
        &config,
        format!(
            "global: {{scrape_interval: {every}s, evaluation_interval: {every}s}}\n\
             rule_files: [\"{}\"]\n\
             scrape_configs:\n\
             - job_name: agentguard\n  \
               static_configs: [{{targets: [\"{address}:9469\"]}}]\n",
            rules.display(),
            every = cluster.pace().every("1", "5"),
        ),
    )?;
    let mut prometheus = Command::new(cluster.program("prometheus"));
    prometheus
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", scratch.join("prometheus").display()))
        .arg(format!("--web.listen-address={LISTENS}"));
    cluster.start_program("prometheus", &prometheus)?;
    let begin = Instant::now();
    let alert = loop {
        if let Some(alert) = fired(cluster).unwrap_or_default() {
            break alert;
        }
        ensure!(
            begin.elapsed() < cluster.pace().patience(FIRES),
            "the alert AgentguardRefused does not fire"
        );
        interrupt::sleep(Duration::from_millis(500))?;
    };
    let identity = alert["labels"]["identity"].as_str().unwrap_or_default();
    ensure!(identity.contains("/ns/agents/sa/"), "the alert is of {identity:?}");
    println!(
        "seen      the alert AgentguardRefused fires for {identity} ({}): {}",
        seconds(begin.elapsed()),
        alert["annotations"]["summary"].as_str().unwrap_or_default()
    );
    let up = query(cluster, "query", &[("query", "up")])?;
    let value = &up["data"]["result"][0]["value"][1];
    ensure!(value == "1", "Prometheus cannot ask the daemon: {up}");
    Ok(())
}

/// The alert, once it fires.
fn fired(cluster: &Cluster<'_>) -> Result<Option<Value>> {
    let said = ask(cluster, "alerts")?;
    let alerts = said["data"]["alerts"].as_array().cloned().unwrap_or_default();
    Ok(alerts.into_iter().find(|alert| {
        alert["labels"]["alertname"] == "AgentguardRefused" && alert["state"] == "firing"
    }))
}

/// What Prometheus answers.
fn ask(cluster: &Cluster<'_>, what: &str) -> Result<Value> {
    query(cluster, what, &[])
}

/// The same, of what takes arguments.
pub(super) fn query(
    cluster: &Cluster<'_>,
    what: &str,
    arguments: &[(&str, &str)],
) -> Result<Value> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail-with-body", "--max-time", "5", "--get"]);
    for (name, value) in arguments {
        curl.arg("--data-urlencode").arg(format!("{name}={value}"));
    }
    curl.arg(format!("http://{LISTENS}/api/v1/{what}"));
    let said = output(&mut cluster.node().inside(&curl))?;
    serde_json::from_str(&said).context("Prometheus does not answer in JSON")
}
