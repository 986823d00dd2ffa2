//! What is checked in the cluster.
//!
//! Its one job is to apply, to look from outside, and to say what was seen. Each check is one
//! function, and fails with what it saw.

use std::{fs, time::Instant};

use anyhow::{Result, ensure};

use super::{build::VERSION, cluster::Cluster, images::TOOLS, seconds};
use crate::{
    chart,
    run::{heading, output},
};

/// Ordinary pods: a web server behind a service, and a client of it.
const ORDINARY: &str = include_str!("manifests/ordinary.yaml");

/// All checks.
///
/// # Errors
///
/// The first that fails.
pub(super) fn run(cluster: &mut Cluster<'_>) -> Result<()> {
    heading("deploy/");
    the_api_server_takes_everything_of_the_chart(cluster)?;
    heading("ordinary pods");
    ordinary_pods_run_and_reach_a_service(cluster)
}

/// What the API server is asked about, but not to keep: the chart with everything switched on. What
/// belongs to another operator is left out, with a word for it.
fn the_api_server_takes_everything_of_the_chart(cluster: &mut Cluster<'_>) -> Result<()> {
    let scratch = cluster.node().scratch().to_owned();
    let everything = chart::everything(VERSION)?;
    let foreign = |document: &&str| document.contains("apiVersion: monitoring.coreos.com/");
    let documents: Vec<&str> = everything.split("\n---\n").collect();
    let left_out = documents.iter().filter(|document| foreign(document)).count();
    let known: Vec<&str> = documents.into_iter().filter(|document| !foreign(document)).collect();
    let file = scratch.join("everything.yaml");
    fs::write(&file, known.join("\n---\n"))?;
    for file in [chart::plain_file(), file] {
        let file = file.display().to_string();
        // The namespace first: without it nothing in it can be asked about.
        let namespace = ["create", "namespace", "agentguard"];
        if output(&mut cluster.kubectl(&["get", "namespace", "agentguard"])).is_err() {
            output(&mut cluster.kubectl(&namespace))?;
        }
        let apply = ["apply", "--dry-run=server", "--validate=true", "--filename", &file];
        let said = output(&mut cluster.kubectl(&apply))?;
        println!("seen      {} objects of {file} are valid", said.lines().count());
    }
    println!("seen      {left_out} objects are of the Prometheus operator, which is not here");
    output(&mut cluster.kubectl(&["delete", "namespace", "agentguard"])).map(drop)
}

fn ordinary_pods_run_and_reach_a_service(cluster: &mut Cluster<'_>) -> Result<()> {
    let manifests = cluster.node().scratch().join("ordinary.yaml");
    fs::write(&manifests, ORDINARY.replace("$TOOLS", TOOLS))?;
    let manifests = manifests.display().to_string();
    let begin = Instant::now();
    output(&mut cluster.kubectl(&["apply", "--filename", &manifests]))?;
    for deployment in ["server", "client"] {
        cluster.wait_for(
            &format!("the deployment {deployment} is available"),
            &["get", "deployment", deployment, "--output", "jsonpath={.status.availableReplicas}"],
            "1",
        )?;
    }
    println!("seen      two deployments are available ({})", seconds(begin.elapsed()));

    let exec = ["exec", "deployment/client", "--", "/bin/cat", "/proc/self/cgroup"];
    let cgroups = output(&mut cluster.kubectl(&exec))?;
    ensure!(cgroups.contains("0::/"), "exec in an ordinary pod says: {cgroups}");
    println!("seen      kubectl exec runs in a cgroup of its own");

    let script = "curl --silent --fail --max-time 5 \"http://$SERVER_SERVICE_HOST/hello\"";
    let took = cluster.wait_for(
        "the service answers",
        &["exec", "deployment/client", "--", "/bin/sh", "-c", script],
        "hello",
    )?;
    println!("seen      a service's address is translated ({})", seconds(took));
    Ok(())
}
