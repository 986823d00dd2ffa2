//! Pods that are no agents, before anything of agentguard is there.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::{apply, kubectl};
use crate::kubernetes::{cluster::Cluster, seconds};

/// A web server behind a service, and a client of it.
const ORDINARY: &str = include_str!("../manifests/ordinary.yaml");

pub(super) fn run_and_reach_a_service(cluster: &mut Cluster<'_>) -> Result<()> {
    let begin = Instant::now();
    apply(cluster, ORDINARY, &[])?;
    for deployment in ["server", "client"] {
        cluster.wait_for(
            &format!("the deployment {deployment} is available"),
            &["get", "deployment", deployment, "--output", "jsonpath={.status.availableReplicas}"],
            "1",
        )?;
    }
    println!("seen      two deployments are available ({})", seconds(begin.elapsed()));

    let exec = ["exec", "deployment/client", "--", "/bin/cat", "/proc/self/cgroup"];
    let cgroups = kubectl(cluster, &exec)?;
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
