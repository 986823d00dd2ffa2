//! The API server is down for a while.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use jiff::Timestamp;

use super::{
    agents::{Agents, GRANT, LATER},
    apply, kubectl,
    updates::{daemon, kill},
};
use crate::{
    interrupt,
    kubernetes::{cluster::Cluster, node::Node, seconds, traffic::Outcome},
};

/// How long a grant holds that ends while the API server is down.
const LASTS: Duration = Duration::from_secs(40);

/// How late it may end, with the time that the log takes.
const LATE: Duration = Duration::from_secs(1);

/// How long it may take until the daemon has found the API server again.
const AGAIN: Duration = Duration::from_secs(30);

pub(super) fn is_survived(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let Agents { researcher, targets, .. } = agents;
    let ends = Timestamp::now() + cluster.pace().patience(LASTS);
    let grant = [("$NAME", "ending"), ("$SCOPE", "more"), ("$EXPIRES", &ends.to_string())];
    let applied = apply(cluster, GRANT, &grant)?;
    let holds = researcher.first(&targets.more, Outcome::Passed, applied)?;
    let pid = daemon(cluster)?;

    cluster.stop_control_plane()?;
    let down = Timestamp::now();
    println!("seen      the API server is down, and the rest of the control plane");
    ensure!(down < ends, "the API server took longer to end than the grant");
    let ended = researcher.first(&targets.more, Outcome::Refused, holds)?;
    ensure!(ended >= ends, "the grant ended at {ended}, before {ends}");
    let late = Duration::try_from(ended - ends)?;
    ensure!(late <= cluster.pace().allows(LATE), "the grant ended {} late", seconds(late));
    println!("seen      a grant ends in time ({} ms late)", late.as_millis());

    // One that starts now knows only what was written down.
    kill(pid)?;
    let begin = Instant::now();
    while !runs_again(pid) {
        let patience = cluster.pace().patience(AGAIN);
        ensure!(begin.elapsed() < patience, "the kubelet has not started the daemon again");
        interrupt::sleep(Duration::from_millis(500))?;
    }
    interrupt::sleep(Duration::from_secs(8))?;
    let mut expected = targets.of_researcher();
    expected.insert(LATER.to_owned(), Outcome::Refused);
    let count = researcher.judge(down, &expected)?;
    expected.insert(targets.more.clone(), Outcome::Refused);
    researcher.judge(ended, &expected)?;
    println!("seen      {count} requests were decided as before, also after the daemon was killed");

    cluster.start_control_plane_again()?;
    let grant = [("$NAME", "after"), ("$SCOPE", "more"), ("$EXPIRES", "never")];
    let applied = apply(cluster, GRANT, &grant)?;
    let seen = researcher.first(&targets.more, Outcome::Passed, applied)?;
    let took = Duration::try_from(seen - applied)?;
    ensure!(
        took <= cluster.pace().allows(AGAIN),
        "a grant was in force only {} after the outage",
        seconds(took)
    );
    println!("seen      a grant that is added afterwards is in force after {}", seconds(took));
    kubectl(cluster, &["--namespace", "agents", "delete", "grant", "after"]).map(drop)
}

/// Whether there is a daemon of the cluster's beside the one that was killed, by its pod's cgroup:
/// nobody can be asked.
fn runs_again(killed: i32) -> bool {
    let Ok(processes) = fs::read_dir("/proc") else { return false };
    processes.flatten().any(|entry| {
        let path = entry.path();
        let is_other = path != Path::new("/proc").join(killed.to_string());
        let program = fs::read_link(path.join("exe")).unwrap_or_default();
        let cgroup = fs::read_to_string(path.join("cgroup")).unwrap_or_default();
        is_other
            && program == Path::new("/usr/bin/agentguard")
            && cgroup.contains(&Node::cgroup_of_pods())
    })
}
