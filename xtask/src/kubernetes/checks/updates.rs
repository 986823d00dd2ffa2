//! The daemon is restarted and updated while agents ask.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;

use super::{
    agents::{Agents, LATER},
    deploy::rolled_out,
    kubectl,
};
use crate::{
    interrupt,
    kubernetes::{cluster::Cluster, traffic::Outcome},
};

/// How often all of it is done, at least and at most.
const ROUNDS: (usize, usize) = (2, 10);

/// How many requests there have to be at least: it is done until there were as many.
const REQUESTS: usize = 3000;

pub(super) fn leave_no_window(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let mut expected = agents.targets.of_researcher();
    expected.insert(agents.targets.more.clone(), Outcome::Refused);
    expected.insert(LATER.to_owned(), Outcome::Refused);
    let begin = Timestamp::now();
    let (least, most) = ROUNDS;
    let mut count = 0;
    for round in 1..=most {
        replace(cluster)?;
        interrupt::sleep(Duration::from_secs(2))?;
        count = agents.researcher.judge(begin, &expected)?;
        if round >= least && count >= REQUESTS {
            break;
        }
    }
    ensure!(count >= REQUESTS, "{count} requests are too few to say anything");
    println!("seen      none of {count} requests meanwhile was decided wrongly");
    Ok(())
}

/// Updates the daemon, deletes its pod, and kills it.
fn replace(cluster: &mut Cluster<'_>) -> Result<()> {
    let namespace = ["--namespace", "agentguard"];
    let first = daemon(cluster)?;
    let restart = ["rollout", "restart", "daemonset/agentguard"];
    kubectl(cluster, &[&namespace[..], &restart].concat())?;
    rolled_out(cluster)?;
    let second = daemon(cluster)?;
    ensure!(first != second, "a rolling update left the daemon {first}");
    println!("seen      a rolling update of the DaemonSet");

    let delete = ["delete", "pod", "--selector", "app.kubernetes.io/name=agentguard"];
    kubectl(cluster, &[&namespace[..], &delete].concat())?;
    rolled_out(cluster)?;
    let third = daemon(cluster)?;
    ensure!(second != third, "a deleted pod left the daemon {second}");
    println!("seen      the daemon's pod deleted");

    kill(third)?;
    let restarts = "jsonpath={.items[0].status.containerStatuses[0].restartCount}";
    let question = [&namespace[..], &["get", "pods", "--output", restarts]].concat();
    cluster.wait_for("the daemon is started again", &question, "1")?;
    rolled_out(cluster)?;
    println!("seen      the daemon killed");
    Ok(())
}

/// The process of the daemon, by what runs on this node and has its name.
pub(super) fn daemon(cluster: &Cluster<'_>) -> Result<i32> {
    let container = [
        "--namespace",
        "agentguard",
        "get",
        "pods",
        "--selector",
        "app.kubernetes.io/name=agentguard",
        "--output",
        "jsonpath={.items[*].status.containerStatuses[0].containerID}",
    ];
    let said = kubectl(cluster, &container)?;
    let container = said
        .split_whitespace()
        .next_back()
        .and_then(|id| id.strip_prefix("containerd://"))
        .with_context(|| format!("{said:?} names no container"))?;
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let cgroups = std::fs::read_to_string(path.join("cgroup")).unwrap_or_default();
        if cgroups.contains(container)
            && let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok())
        {
            return Ok(pid);
        }
    }
    anyhow::bail!("no process is in the container {container}")
}

/// Kills the daemon as the kernel would for want of memory.
pub(super) fn kill(pid: i32) -> Result<()> {
    let program = std::fs::read_link(Path::new("/proc").join(pid.to_string()).join("exe"))?;
    ensure!(program == Path::new("/usr/bin/agentguard"), "{pid} is {}", program.display());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}
