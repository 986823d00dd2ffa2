//! The runtime's hook: put on the node by the chart, told to containerd as `deploy/README.md` tells, and
//! taken out again.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;

use super::{
    agents::{Agents, ENFORCED, IDLE},
    apply, deploy,
    kinds::{runs, with_init_container},
    kubectl,
    newcomer::Blocks,
    wait_for_account,
};
use crate::{
    interrupt,
    kubernetes::{cluster::Cluster, seconds, traffic::Outcome},
    run::{output, root},
};

/// How the README has the hook made known to containerd.
const TELL: &str = "ctr oci spec";

/// How the README has it taken out.
const TAKE_OUT: &str = "rm /etc/containerd/agentguard.json";

/// How many agents start with the hook.
const STARTS: usize = 3;

/// How long a pod may wait until the kubelet tries again to start it.
const AGAIN: Duration = Duration::from_secs(120);

const FOR_CONTAINERD: &str = "hook: {install: true, runtime: containerd}\n";
const FOR_CRI_O: &str = "hook: {install: true, runtime: cri-o, directory: /var/lib/hooks.d}\n";

pub(super) fn holds_and_goes(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let readme = fs::read_to_string(root().join("deploy/README.md"))?;
    let blocks = Blocks::of(&readme)?;
    let limits = limits(cluster)?;
    is_installed(cluster, &blocks)?;
    agents_are_held_from_the_first(cluster, agents)?;
    others_start_as_before(cluster, &limits)?;
    nothing_else_starts_without_a_daemon(cluster, agents)?;
    is_taken_out(cluster, agents, &blocks)
}

/// Has the chart's init container put the program on the node, and tells containerd of it.
fn is_installed(cluster: &mut Cluster<'_>, blocks: &Blocks<'_>) -> Result<()> {
    deploy::upgraded(cluster, FOR_CONTAINERD)?;
    output(&mut cluster.shell("mkdir -p /etc/containerd"))?;
    let told = blocks.run(cluster, TELL)?;
    // The node's configuration is of the form of version 2, and has the table already.
    let of_version_2 = told
        .lines()
        .skip_while(|line| !line.contains("io.containerd.grpc.v1.cri"))
        .nth(1)
        .with_context(|| format!("nothing for containerd 1.5 to 1.7 in:\n{told}"))?;
    ensure!(of_version_2.trim().starts_with("base_runtime_spec"), "it says {of_version_2:?}");
    let took = cluster.restart_runtime(&format!("{of_version_2}\n"))?;
    println!(
        "seen      the init container puts the hook on the node, and containerd takes it ({})",
        seconds(took)
    );
    Ok(())
}

/// Every request from the very first on is decided as it should, of init containers too, and what is
/// granted runs at once.
fn agents_are_held_from_the_first(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let expected = agents.targets.of_researcher_alone();
    let mut count = 0;
    for start in 0..STARTS {
        let name = format!("hooked-{start}");
        let (first, agent) = with_init_container(cluster, agents, &name, ENFORCED)?;
        count += first.judge(Timestamp::UNIX_EPOCH, &expected)?;
        count += agent.judge(Timestamp::UNIX_EPOCH, &expected)?;
        kubectl(cluster, &["--namespace", "agents", "delete", "pod", &name])?;
    }
    println!(
        "seen      none of {count} requests of {STARTS} agents and their init containers was decided \
         wrongly, from their first one on"
    );
    Ok(())
}

/// The limits of a new pod's processes.
fn limits(cluster: &mut Cluster<'_>) -> Result<String> {
    let variables = [("$NAMESPACE", "agents"), ("$NAME", "limited"), ("$LABELS", "")];
    apply(cluster, IDLE, &variables)?;
    runs(cluster, "limited")?;
    let exec = ["--namespace", "agents", "exec", "limited", "--", "/bin/cat", "/proc/1/limits"];
    let limits = kubectl(cluster, &exec)?;
    kubectl(cluster, &["--namespace", "agents", "delete", "pod", "limited"])?;
    Ok(limits)
}

fn others_start_as_before(cluster: &mut Cluster<'_>, before: &str) -> Result<()> {
    let after = limits(cluster)?;
    ensure!(
        after == before,
        "with the hook, an ordinary pod has the limits\n{after}\nand had\n{before}"
    );
    println!("seen      an ordinary pod starts, with the limits that it has without the hook");
    Ok(())
}

/// While no daemon answers, pods wait, but for those of namespaces that are exempt. Who runs goes on, and
/// is held.
fn nothing_else_starts_without_a_daemon(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    wait_for_account(cluster, "kube-system")?;
    may_run_nowhere(cluster, "\"true\"")?;
    let daemons = ["--namespace", "agentguard", "get", "pods", "--output=name"];
    cluster.wait_for("the daemon's pod is gone", &daemons, "")?;
    let since = Timestamp::now();
    for (namespace, name) in [("agents", "waiting"), ("kube-system", "exempt")] {
        let variables = [("$NAMESPACE", namespace), ("$NAME", name), ("$LABELS", "")];
        apply(cluster, IDLE, &variables)?;
    }
    let phase = ["--output", "jsonpath={.status.phase}"];
    let exempt = [&["--namespace", "kube-system", "get", "pod", "exempt"][..], &phase].concat();
    cluster.wait_for("a pod of kube-system runs", &exempt, "Running")?;
    let why = told_of_waiting(cluster)?;
    let ready = ["--output", "jsonpath={.status.containerStatuses[0].ready}"];
    let waiting = [&["--namespace", "agents", "get", "pod", "waiting"][..], &ready].concat();
    let became = kubectl(cluster, &waiting)?;
    ensure!(
        became == "false",
        "that a container of which no daemon was told is ready is {became:?}"
    );
    let count = agents.researcher.judge(since, &agents.targets.of_researcher_alone())?;
    println!("seen      without a daemon a pod of kube-system starts, and no other:");
    println!("          {why}");

    may_run_nowhere(cluster, "null")?;
    deploy::rolled_out(cluster)?;
    cluster.wait_for("the pod that waited runs", &waiting, "true")?;
    println!(
        "seen      it starts once there is a daemon; none of {count} requests meanwhile was wrong"
    );
    kubectl(cluster, &["--namespace", "agents", "delete", "pod", "waiting"])?;
    kubectl(cluster, &["--namespace", "kube-system", "delete", "pod", "exempt"]).map(drop)
}

/// What the kubelet says of the pod `waiting`, once it says that agentguard does not let it start.
fn told_of_waiting(cluster: &Cluster<'_>) -> Result<String> {
    let of_pod = [
        "--namespace",
        "agents",
        "get",
        "events",
        "--field-selector",
        "involvedObject.name=waiting",
    ];
    let messages = ["--output", r#"jsonpath={range .items[*]}{.message}{"\n"}{end}"#];
    let begin = Instant::now();
    loop {
        let said = kubectl(cluster, &[&of_pod[..], &messages].concat())?;
        if let Some(why) = said.lines().find(|line| line.contains("is not held by agentguard")) {
            return Ok(why.trim().to_owned());
        }
        ensure!(
            begin.elapsed() < cluster.pace().patience(AGAIN),
            "no event says that the pod waits for agentguard, but:\n{said}"
        );
        interrupt::sleep(Duration::from_millis(500))?;
    }
}

/// Sets or takes away a label of nodes that the daemon's pod asks for and no node has.
fn may_run_nowhere(cluster: &Cluster<'_>, value: &str) -> Result<()> {
    let selector = format!("{{\"nodeSelector\":{{\"nowhere\":{value}}}}}");
    let patch = format!("{{\"spec\":{{\"template\":{{\"spec\":{selector}}}}}}}");
    let daemons = ["--namespace", "agentguard", "patch", "daemonset", "agentguard", "--patch"];
    kubectl(cluster, &[&daemons[..], &[&patch]].concat()).map(drop)
}

/// Out of containerd's configuration first; then off the node, with all of agentguard. What CRI-O reads,
/// the chart takes away by itself.
fn is_taken_out(cluster: &mut Cluster<'_>, agents: &Agents, blocks: &Blocks<'_>) -> Result<()> {
    cluster.restart_runtime("")?;
    blocks.run(cluster, TAKE_OUT)?;
    deploy::upgraded(cluster, FOR_CRI_O)?;
    let file = "/var/lib/hooks.d/agentguard.json";
    let program = "/opt/agentguard/bin/agentguard";
    let hook = output(&mut cluster.shell(&format!("test -x {program} && cat {file}")))?;
    let hook: serde_json::Value = serde_json::from_str(&hook).with_context(|| hook.clone())?;
    ensure!(hook["hook"]["path"] == program, "the hook for CRI-O is {hook}");
    let begin = Timestamp::now();
    deploy::upgraded(cluster, &format!("{FOR_CRI_O}remove: true\n"))?;
    let removed = Timestamp::now();
    let left =
        format!("for left in {file} {program} /sys/fs/bpf/agentguard; do test ! -e $left; done");
    output(&mut cluster.shell(&format!("set -e; {left}")))
        .context("something of agentguard is left on the node")?;
    let free = agents.researcher.first(&agents.targets.ungranted, Outcome::Passed, begin)?;
    ensure!(free <= removed, "an agent was let go only at {free}, after it was said to be");
    let (first, agent) = with_init_container(cluster, agents, "after-all", ENFORCED)?;
    let count = first.judge(Timestamp::UNIX_EPOCH, &agents.targets.of_free())?
        + agent.judge(Timestamp::UNIX_EPOCH, &agents.targets.of_free())?;
    println!(
        "seen      taken out and off the node, pods start without it, and nothing is refused any more: \
         {count} requests"
    );
    Ok(())
}
