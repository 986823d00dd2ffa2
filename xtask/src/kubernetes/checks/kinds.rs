//! Agents that are pods of a special kind.

use std::{
    io::Write as _,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde_json::Value;

use super::{
    TRUST_DOMAIN,
    agents::{Agents, ENFORCED, GRANT, POD, asking},
    apply, deploy, filled, kubectl, traffic,
};
use crate::{
    interrupt,
    kubernetes::{
        cluster::{Cluster, NODE, Pace},
        traffic::{Asked, Outcome, Traffic},
    },
};

const INITIAL: &str = include_str!("../manifests/initial.yaml");

/// Where the kubelet looks for static pods.
const STATIC_PODS: &str = "/etc/kubernetes/manifests";

/// How long is looked at what is asked.
const LOOK: Duration = Duration::from_secs(3);

/// A pod whose init container asks, too.
pub(super) fn with_init_container(
    cluster: &mut Cluster<'_>,
    agents: &Agents,
    name: &str,
    labels: &str,
) -> Result<(Traffic, Traffic)> {
    let targets = agents.targets.all();
    let variables = asking(cluster, name, "researcher", labels, &targets);
    apply(cluster, INITIAL, &[&variables[..], &[("$TURNS", "60")]].concat())?;
    runs(cluster, name)?;
    let traffic = traffic(cluster, name)?;
    Ok((traffic.of_container("first"), traffic.of_container("agent")))
}

/// What runs before an agent is the agent's: it may do the same, and no more.
pub(super) fn init_container_is_held(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let targets = &agents.targets;
    let (first, agent) = with_init_container(cluster, agents, "initial", ENFORCED)?;
    let (free_first, free) = with_init_container(cluster, agents, "not-initial", "")?;
    // Without the runtime's hook it is held as soon as it is known, and what it is granted to run runs
    // once the runtime has told of the container.
    let held = first.first(&targets.ungranted, Outcome::Refused, Timestamp::UNIX_EPOCH)?;
    let mut expected = targets.of_researcher_alone();
    let whole = expected.clone();
    expected.remove("curl");
    let of_first = first.judge(held, &expected)?;
    let of_agent = agent.judge(Timestamp::UNIX_EPOCH, &expected)?;
    let since = Timestamp::now();
    interrupt::sleep(LOOK)?;
    agent.judge(since, &whole)?;
    let unaffected = free_first.judge(Timestamp::UNIX_EPOCH, &targets.of_free())?
        + free.judge(Timestamp::UNIX_EPOCH, &targets.of_free())?;
    let workload = workload(cluster, "agents/initial")?.context("no workload agents/initial")?;
    is_researcher(&workload)?;
    println!(
        "seen      an init container of an agent is held to the agent's grants ({of_first} requests), and \
         the agent after it ({of_agent}); those of an ordinary pod are refused none of {unaffected}"
    );
    gone(cluster, "initial")?;
    kubectl(cluster, &["--namespace", "agents", "delete", "pod", "not-initial"]).map(drop)
}

/// An agent in the network of its node is held by its cgroup as any other, and nobody else there is.
pub(super) fn on_the_nodes_network(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let targets = agents.targets.all();
    for (name, labels) in [("on-node", ENFORCED), ("not-on-node", "")] {
        let mut variables = asking(cluster, name, "researcher", labels, &targets);
        for (variable, value) in &mut variables {
            if *variable == "$HOST_NETWORK" {
                *value = "true";
            }
        }
        apply(cluster, POD, &variables)?;
    }
    for name in ["on-node", "not-on-node"] {
        runs(cluster, name)?;
    }
    let (agent, free) = (traffic(cluster, "on-node")?, traffic(cluster, "not-on-node")?);
    agent.first(&agents.targets.ungranted, Outcome::Refused, Timestamp::UNIX_EPOCH)?;
    let since = Timestamp::now();
    interrupt::sleep(LOOK)?;
    let held = agent.judge(since, &agents.targets.of_researcher_alone())?;
    let unaffected = free.judge(Timestamp::UNIX_EPOCH, &agents.targets.of_free())?;
    let workload = workload(cluster, "agents/on-node")?.context("no workload agents/on-node")?;
    is_researcher(&workload)?;
    println!(
        "seen      an agent on its node's network is held to its grants ({held} requests); an ordinary pod \
         there is refused none of {unaffected}"
    );
    gone(cluster, "on-node")?;
    kubectl(cluster, &["--namespace", "agents", "delete", "pod", "not-on-node"]).map(drop)
}

/// An agent whose pod the API server has forgotten is held until it has ended, also where the runtime knows
/// only labels by which it would be none: it became one later.
pub(super) fn deleted_by_force_is_held(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    // The kubelet leaves a pod two seconds, or ends it at once, which is as it happens.
    let mut refused = 0;
    for turn in 0..5 {
        refused = refused_once_forgotten(cluster, agents, &format!("forgotten-{turn}"))?;
        if refused > 0 {
            break;
        }
    }
    // Where kubectl takes as long to return, what was asked until then is judged.
    ensure!(
        refused > 0 || cluster.pace() == Pace::Emulated,
        "no pod asked for anything after it was deleted by force"
    );
    println!(
        "seen      an agent that was labelled later is held to its end when its pod is deleted by force: \
         {refused} requests refused after that"
    );
    Ok(())
}

/// How many requests of such a pod were refused after it was deleted; fails with the first that was not.
fn refused_once_forgotten(cluster: &mut Cluster<'_>, agents: &Agents, name: &str) -> Result<usize> {
    let targets = &agents.targets;
    let asks = targets.all();
    let mut variables = asking(cluster, name, "researcher", "", &asks);
    for (variable, value) in &mut variables {
        if *variable == "$REST" {
            *value = "0.05";
        }
    }
    apply(cluster, POD, &variables)?;
    runs(cluster, name)?;
    let pod = traffic(cluster, name)?;
    pod.first(&targets.ungranted, Outcome::Passed, Timestamp::UNIX_EPOCH)?;
    let of_agents = ["--namespace", "agents"];
    let marks = ["label", "pod", name, "agentguard.dev/agent=true", "agentguard.dev/mode=enforce"];
    kubectl(cluster, &[&of_agents[..], &marks].concat())?;
    let held = pod.first(&targets.ungranted, Outcome::Refused, Timestamp::UNIX_EPOCH)?;
    let delete = ["delete", "pod", name, "--force", "--grace-period=0", "--wait=false"];
    kubectl(cluster, &[&of_agents[..], &delete].concat())?;
    let forgotten = Timestamp::now();
    // Its log is taken away some time after it has ended.
    let begin = Instant::now();
    let mut asked = pod.since(held)?;
    while begin.elapsed() < cluster.pace().patience(LOOK) {
        let Ok(more) = pod.since(held) else { break };
        asked = more;
        interrupt::sleep(Duration::from_millis(100))?;
    }
    let expected = targets.of_researcher_alone();
    let mut refused = 0;
    for Asked { at, target, outcome } in asked.iter().filter(|asked| asked.target != "curl") {
        let wanted = expected.get(target).context("it is asked for what is known")?;
        ensure!(outcome == wanted, "{target} was {outcome} at {at}, forgotten at {forgotten}");
        refused += usize::from(*at > forgotten && *outcome == Outcome::Refused);
    }
    is_let_go(cluster, &format!("agents/{name}"))?;
    Ok(refused)
}

/// A static pod has no service account. Where identities are made of it, it is none that has a grant and
/// may do nothing, and is said to; where they are made of something else, it is held to its grants.
pub(super) fn static_pod_is_held(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let targets = agents.targets.all();
    let mirror = format!("static-{NODE}");
    let name = format!("agents/{mirror}");
    for (pod, labels) in [("static", ENFORCED), ("not-static", "")] {
        let variables = asking(cluster, pod, "", labels, &targets);
        // What begins with a dot is no manifest yet.
        let write = format!(
            "cat >{STATIC_PODS}/.{pod} && mv {STATIC_PODS}/.{pod} {STATIC_PODS}/{pod}.yaml"
        );
        on_node(cluster, &write, &filled(POD, &variables))?;
    }
    runs(cluster, &mirror)?;
    runs(cluster, &format!("not-static-{NODE}"))?;
    let agent = traffic(cluster, &mirror)?;
    let free = traffic(cluster, &format!("not-static-{NODE}"))?;

    // Not even what its image starts may run.
    interrupt::sleep(LOOK)?;
    let asked = agent.all()?.len();
    ensure!(asked == 0, "a static pod without an identity ran, and asked {asked} times");
    let unknown = workload(cluster, &name)?.with_context(|| format!("no workload {name}"))?;
    ensure!(
        unknown["identity"].is_null() && unknown["mode"] == "enforce",
        "a static pod without an identity is {unknown}"
    );
    let status = deploy::in_daemon(cluster, &["status"])?;
    let line = status.lines().find(|line| line.contains(&name));
    let line = line.with_context(|| format!("{name} is not in the status:\n{status}"))?;
    ensure!(
        line.contains("static pod") && line.contains("containers.identity"),
        "status says {line}"
    );
    println!("seen      a static pod has no service account, so that nothing of it may run");
    println!("          {}", line.trim());

    let identity = "spiffe://{trust_domain}/ns/{namespace}/pod/{pod}";
    deploy::upgraded(cluster, &format!("    identity: \"{identity}\"\n"))?;
    let of_static = format!("spiffe://{TRUST_DOMAIN}/ns/agents/pod/{mirror}");
    let of_researcher = format!("spiffe://{TRUST_DOMAIN}/ns/agents/sa/researcher");
    let grant = GRANT.replace("spiffe://$TRUST_DOMAIN/ns/agents/sa/researcher", &of_static);
    ensure!(!grant.contains(&of_researcher), "the grant is another's:\n{grant}");
    let variables = [("$NAME", "static"), ("$SCOPE", "web"), ("$EXPIRES", "never")];
    let granted = apply(cluster, &grant, &variables)?;
    agent.first(&agents.targets.service, Outcome::Passed, granted)?;
    agent.first("curl", Outcome::Passed, granted)?;
    let since = Timestamp::now();
    interrupt::sleep(LOOK)?;
    let count = agent.judge(since, &agents.targets.of_researcher_alone())?;
    let known = workload(cluster, &name)?.with_context(|| format!("no workload {name}"))?;
    ensure!(known["identity"] == of_static.as_str(), "a static pod by its name is {known}");
    println!("seen      as {of_static} it is held to its grant: {count} requests");
    let unaffected = free.judge(Timestamp::UNIX_EPOCH, &agents.targets.of_free())?;
    println!("seen      none of {unaffected} requests of an ordinary static pod was refused");

    let files = ["static", "not-static"].map(|pod| format!("{STATIC_PODS}/{pod}.yaml"));
    on_node(cluster, &format!("rm {}", files.join(" ")), "")?;
    let question = ["--namespace", "agents", "get", "pod", &mirror, "--ignore-not-found"];
    cluster.wait_for(
        "the static pod is gone",
        &[&question[..], &["--output=name"]].concat(),
        "",
    )?;
    is_let_go(cluster, &name)?;
    kubectl(cluster, &["--namespace", "agents", "delete", "grant", "static"])?;
    deploy::upgraded(cluster, "")
}

/// Runs a shell command on the node, which reads `input`.
fn on_node(cluster: &Cluster<'_>, command: &str, input: &str) -> Result<()> {
    let mut child = cluster.shell(command).stdin(Stdio::piped()).spawn().context("no shell")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let status = child.wait()?;
    ensure!(status.success(), "{command}: {status}");
    Ok(())
}

/// Waits until a pod of the agents runs.
pub(super) fn runs(cluster: &mut Cluster<'_>, name: &str) -> Result<()> {
    let phase = "jsonpath={.status.phase}";
    let question = ["--namespace", "agents", "get", "pod", name, "--output", phase];
    cluster.wait_for(&format!("the pod {name} runs"), &question, "Running").map(drop)
}

/// What the daemon says of a workload.
fn workload(cluster: &Cluster<'_>, name: &str) -> Result<Option<Value>> {
    let said = deploy::in_daemon(cluster, &["workloads", "--output", "json"])?;
    let all: Vec<Value> = serde_json::from_str(&said).with_context(|| said.clone())?;
    Ok(all.into_iter().find(|workload| workload["name"] == name))
}

/// A workload is held as the researcher.
fn is_researcher(workload: &Value) -> Result<()> {
    let identity = format!("spiffe://{TRUST_DOMAIN}/ns/agents/sa/researcher");
    ensure!(
        workload["identity"] == identity.as_str()
            && workload["mode"] == "enforce"
            && workload["protection"] != "none"
            && workload["processes"].as_u64().is_some_and(|count| count > 0),
        "it has to be {identity}, enforced, and is {workload}"
    );
    Ok(())
}

/// Deletes a pod of the agents, and waits until it is let go.
fn gone(cluster: &mut Cluster<'_>, name: &str) -> Result<()> {
    kubectl(cluster, &["--namespace", "agents", "delete", "pod", name])?;
    is_let_go(cluster, &format!("agents/{name}"))
}

fn is_let_go(cluster: &Cluster<'_>, name: &str) -> Result<()> {
    let begin = Instant::now();
    while workload(cluster, name)?.is_some() {
        ensure!(
            begin.elapsed() < cluster.pace().patience(Duration::from_secs(20)),
            "{name} is gone, and still a workload"
        );
        interrupt::sleep(Duration::from_millis(200))?;
    }
    Ok(())
}
