//! What is shipped below `deploy/`, before a real API server.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{filled, kubectl};
use crate::{
    chart,
    kubernetes::{build::VERSION, cluster::Cluster, seconds},
    run::root,
};

/// Values of the chart that fit this machine.
const VALUES: &str = include_str!("../manifests/values.yaml");

/// Kinds of the Prometheus operator, which is not in the cluster.
const MONITORING: &str = include_str!("../manifests/monitoring.yaml");

/// What is in no cluster's tongue: a configuration, and rules of a Prometheus that has no operator.
const NO_MANIFESTS: &[&str] = &[
    "agentguard.yaml",
    "examples/workloads.yaml",
    "helm/agentguard/Chart.yaml",
    "helm/agentguard/ci/everything-values.yaml",
    "helm/agentguard/values.yaml",
    "prometheus/agentguard.rules.test.yaml",
    "prometheus/agentguard.rules.yaml",
];

/// How long a new daemon may take until it is ready.
const ROLLED_OUT: Duration = Duration::from_secs(90);

/// What is applied by [`examples_are_taken`] and by helm.
const ELSEWHERE: &[&str] = &["examples/", "helm/agentguard/templates/"];

/// Asks the API server about every manifest without keeping it: the plain manifests, the definitions,
/// and the chart with everything switched on, after what the Prometheus operator defines. Fails on a YAML
/// file that is neither asked about nor named above.
pub(super) fn everything_is_valid(cluster: &mut Cluster<'_>) -> Result<()> {
    let deploy = root().join("deploy");
    let rendered = cluster.node().scratch().join("everything.yaml");
    fs::write(&rendered, chart::everything(VERSION)?)?;
    let monitoring = cluster.node().scratch().join("monitoring.yaml");
    fs::write(&monitoring, MONITORING)?;
    let monitoring = monitoring.display().to_string();
    kubectl(cluster, &["apply", "--filename", &monitoring])?;
    let established = ["wait", "--for=condition=Established", "--timeout=60s", "--filename"];
    kubectl(cluster, &[&established[..], &[&monitoring]].concat())?;
    // The namespace first: without it nothing in it can be asked about.
    kubectl(cluster, &["create", "namespace", "agentguard"])?;
    let mut files = vec![rendered.clone()];
    for file in yaml_files(&deploy)? {
        let name = file.strip_prefix(&deploy)?.display().to_string();
        let is_elsewhere = ELSEWHERE.iter().any(|directory| name.starts_with(directory));
        if !is_elsewhere && !NO_MANIFESTS.contains(&name.as_str()) {
            files.push(file);
        }
    }
    for file in files {
        let said = asked_about(cluster, &file)?;
        println!("seen      {} objects of {} are valid", said.lines().count(), file.display());
    }
    monitors_are_looked_at(cluster, &rendered)?;
    kubectl(cluster, &["delete", "--filename", &monitoring])?;
    kubectl(cluster, &["delete", "namespace", "agentguard"]).map(drop)
}

fn asked_about(cluster: &Cluster<'_>, file: &Path) -> Result<String> {
    let file = file.display().to_string();
    kubectl(cluster, &["apply", "--dry-run=server", "--validate=true", "--filename", &file])
}

/// Both monitors are among what was found valid, and are not when they say something that is not: the
/// definitions count.
fn monitors_are_looked_at(cluster: &Cluster<'_>, rendered: &Path) -> Result<()> {
    let everything = fs::read_to_string(rendered)?;
    let wrong = cluster.node().scratch().join("wrong.yaml");
    for kind in ["PodMonitor", "ServiceMonitor"] {
        let monitor = everything
            .split("\n---\n")
            .find(|document| document.lines().any(|line| line == format!("kind: {kind}")))
            .with_context(|| format!("the chart with everything has no {kind}"))?;
        ensure!(monitor.contains("interval: 30s"), "{kind} has another interval:\n{monitor}");
        fs::write(&wrong, monitor.replace("interval: 30s", "interval: often"))?;
        match asked_about(cluster, &wrong) {
            Ok(said) => bail!("{kind} with a wrong interval is valid: {said}"),
            Err(error) => ensure!(
                format!("{error:#}").contains("interval"),
                "{kind} with a wrong interval is refused for another reason: {error:#}"
            ),
        }
    }
    println!("seen      PodMonitor and ServiceMonitor are judged by what their operator defines");
    Ok(())
}

/// Applies the plain manifests as they are, and then the chart with values for this machine: an upgrade.
pub(super) fn daemon_runs(cluster: &mut Cluster<'_>) -> Result<()> {
    let begin = Instant::now();
    let plain = chart::plain_file().display().to_string();
    kubectl(cluster, &["apply", "--filename", &plain])?;
    rolled_out(cluster).context("the plain manifests")?;
    println!("seen      the daemon of the plain manifests is ready ({})", seconds(begin.elapsed()));

    let begin = Instant::now();
    upgraded(cluster, "")?;
    println!("seen      that of the chart with other values too ({})", seconds(begin.elapsed()));

    let status = in_daemon(cluster, &["status"])?;
    ensure!(status.contains("portable"), "agentguard status says:\n{status}");
    print!("{}", indented(&status));
    Ok(())
}

/// Applies the chart with the values that fit this machine, and with `more` of them.
pub(super) fn upgraded(cluster: &Cluster<'_>, more: &str) -> Result<()> {
    let values = values(cluster)?;
    let known = fs::read_to_string(&values)?;
    fs::write(&values, known + more)?;
    let rendered = cluster.node().scratch().join("agentguard.yaml");
    fs::write(&rendered, chart::with_values(VERSION, &values)?)?;
    kubectl(cluster, &["apply", "--filename", &rendered.display().to_string()])?;
    rolled_out(cluster).context("the chart")
}

/// Writes the values that fit this machine. Those of `config.containers` stand last.
pub(super) fn values(cluster: &Cluster<'_>) -> Result<PathBuf> {
    let values = cluster.node().scratch().join("values.yaml");
    let runc = cluster.runtime_program().display().to_string();
    fs::write(&values, filled(VALUES, &[("$RUNC", &runc)]))?;
    Ok(values)
}

/// Waits until the DaemonSet's newest generation runs.
pub(super) fn rolled_out(cluster: &Cluster<'_>) -> Result<()> {
    let namespace = ["--namespace", "agentguard"];
    let timeout = format!("--timeout={}s", cluster.pace().patience(ROLLED_OUT).as_secs());
    let wait = ["rollout", "status", "daemonset/agentguard", &timeout];
    let waited = kubectl(cluster, &[&namespace[..], &wait].concat());
    if waited.is_err() {
        let pods = ["describe", "pods"];
        let logs = ["logs", "daemonset/agentguard", "--tail=40"];
        for question in [&pods[..], &logs] {
            let said = kubectl(cluster, &[&namespace[..], question].concat());
            eprintln!("{}", said.unwrap_or_else(|error| format!("{error:#}")));
        }
    }
    waited.map(drop)
}

/// Runs the daemon's program in the daemon's pod.
pub(super) fn in_daemon(cluster: &Cluster<'_>, arguments: &[&str]) -> Result<String> {
    let exec = ["--namespace", "agentguard", "exec", "daemonset/agentguard", "--"];
    kubectl(cluster, &[&exec[..], &["/usr/bin/agentguard"], arguments].concat())
}

/// The examples that are custom resources, as they are shipped.
pub(super) fn examples_are_taken(cluster: &mut Cluster<'_>) -> Result<()> {
    let examples = root().join("deploy/examples");
    // The namespace that the one for clusters speaks of.
    kubectl(cluster, &["create", "namespace", "agents"])?;
    for file in yaml_files(&examples)? {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == "workloads.yaml" {
            println!("seen      {name} has what only a node of its own has: Workload");
            continue;
        }
        let text = fs::read_to_string(&file)?;
        // A Grant in a file need have no namespace; one in a cluster has, and a Workload is no resource.
        let documents: Vec<&str> =
            text.split("\n---\n").filter(|document| !document.contains("kind: Workload")).collect();
        let kept = cluster.node().scratch().join(&name);
        fs::write(&kept, documents.join("\n---\n"))?;
        let kept = kept.display().to_string();
        let said = kubectl(cluster, &["apply", "--namespace", "agents", "--filename", &kept])?;
        println!("seen      {} objects of {name} are taken", said.lines().count());
        kubectl(cluster, &["delete", "--namespace", "agents", "--filename", &kept])?;
    }
    Ok(())
}

fn yaml_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(yaml_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("          {line}\n")).collect()
}
