//! The commands of `deploy/README.md`, as they stand there.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;

use super::{
    agents::{IDLE, POD, asking},
    apply, deploy, expected, kubectl, traffic, wait_for_account,
};
use crate::{
    chart, interrupt,
    kubernetes::{cluster::Cluster, seconds, traffic::Outcome},
    run::{output, root},
};

const CLUSTER: &str = include_str!("../manifests/newcomer.yaml");

/// What the README gives as the trust domain.
const TRUST_DOMAIN: &str = "example.org";

/// The blocks of commands in the README's part on Kubernetes, by what the first command of each does.
const INSTALL: &str = "helm install";
const LOOK: &str =
    "kubectl --namespace agentguard exec daemonset/agentguard -- /usr/bin/agentguard events";
const ENFORCE: &str = "kubectl label namespace agents agentguard.dev/mode=enforce";
const REMOVE: &str = "helm upgrade";
const STATUS: &str = "kubectl --namespace agentguard rollout status";

/// Installs, labels and grants, looks at what was recorded, enforces, and takes it all away.
pub(super) fn is_told_the_truth(cluster: &mut Cluster<'_>) -> Result<()> {
    let begin = Instant::now();
    apply(cluster, CLUSTER, &[])?;
    for namespace in ["agents", "tools", "data"] {
        wait_for_account(cluster, namespace)?;
    }
    for (name, namespace) in [("git", "tools"), ("database", "data")] {
        let variables = [("$NAMESPACE", namespace), ("$NAME", name), ("$LABELS", "")];
        apply(cluster, IDLE, &variables)?;
    }
    let runs = "jsonpath={.status.phase}";
    for (name, namespace) in [("git", "tools"), ("database", "data")] {
        let question = ["--namespace", namespace, "get", "pod", name, "--output", runs];
        cluster.wait_for(&format!("the pod {name} runs"), &question, "Running")?;
    }
    let git = ["--namespace", "tools", "get", "service", "git", "--output"];
    let git = kubectl(cluster, &[&git[..], &["jsonpath={.spec.clusterIP}"]].concat())?;
    let database = ["--namespace", "data", "get", "pod", "database", "--output"];
    let database = kubectl(cluster, &[&database[..], &["jsonpath={.status.podIP}"]].concat())?;
    let (git, database, ungranted) =
        (format!("{git}/80"), format!("{database}/5432"), format!("{database}/5433"));
    let asks = [git.as_str(), &database, &ungranted].join(" ");
    apply(cluster, POD, &asking(cluster, "newcomer", "researcher", "", &asks))?;
    let question = ["--namespace", "agents", "get", "pod", "newcomer", "--output", runs];
    cluster.wait_for("the pod newcomer runs", &question, "Running")?;

    let readme = fs::read_to_string(root().join("deploy/README.md"))?;
    let blocks = Blocks::of(&readme)?;
    println!("seen      a cluster as the README expects one ({})", seconds(begin.elapsed()));
    let begin = Instant::now();
    blocks.run(cluster, INSTALL)?;
    deploy::rolled_out(cluster)?;
    let said = blocks.run(cluster, STATUS)?;
    ensure!(said.contains("protection:"), "the README's look at the status says:\n{said}");
    println!(
        "seen      install, label, grant, by the README's own commands ({})",
        seconds(begin.elapsed())
    );

    // From the namespace's label on it is an agent's, in audit mode.
    let agent = traffic(cluster, "newcomer")?;
    interrupt::sleep(Duration::from_secs(3))?;
    let said = blocks.run(cluster, LOOK)?;
    let identity = format!("spiffe://{TRUST_DOMAIN}/ns/agents/sa/researcher");
    let target = ungranted.replace('/', ":");
    ensure!(
        said.contains(&target) && !said.contains(&database.replace('/', ":")),
        "what was recorded and not granted is {target} of {identity}, and it says:\n{said}"
    );
    for object in ["team-data", "researcher-data", "everybody-data"] {
        ensure!(said.contains(object), "{object} is not shown:\n{said}");
    }
    let all = [git.as_str(), &database, &ungranted].map(|target| (target, Outcome::Passed));
    let count = agent.judge(Timestamp::UNIX_EPOCH, &expected(&all))?;
    println!("seen      what is not granted is recorded, and none of {count} requests refused");

    let begin = Timestamp::now();
    blocks.run(cluster, ENFORCE)?;
    let held = agent.first(&ungranted, Outcome::Refused, begin)?;
    interrupt::sleep(Duration::from_secs(2))?;
    let mut held_to: BTreeMap<String, Outcome> = expected(&all);
    held_to.insert(ungranted.clone(), Outcome::Refused);
    let count = agent.judge(held, &held_to)?;
    println!("seen      once it is enforced, what is not granted is refused: {count} requests");

    let begin = Timestamp::now();
    blocks.run(cluster, REMOVE)?;
    let removed = Timestamp::now();
    let first = agent.first(&ungranted, Outcome::Passed, begin)?;
    ensure!(first <= removed, "an agent was let go only at {first}, after it was said to be");
    interrupt::sleep(Duration::from_secs(2))?;
    let count = agent.judge(removed, &expected(&all))?;
    output(&mut cluster.shell("test ! -e /sys/fs/bpf/agentguard"))
        .context("something of agentguard is left in /sys/fs/bpf of the node")?;
    println!(
        "seen      taken off by the README's own commands, none of {count} requests is refused"
    );
    kubectl(cluster, &["delete", "namespace", "agentguard", "agents", "tools", "data"]).map(drop)
}

/// The README's blocks of commands.
pub(super) struct Blocks<'a>(Vec<&'a str>);

impl<'a> Blocks<'a> {
    pub(super) fn of(readme: &'a str) -> Result<Self> {
        let (_, part) = readme
            .split_once("\n## Kubernetes\n")
            .context("deploy/README.md has no part on Kubernetes")?;
        let part = part.split_once("\n## ").map_or(part, |(part, _)| part);
        let blocks = part.split("\n```sh\n").skip(1);
        Ok(Self(
            blocks.filter_map(|block| block.split_once("\n```").map(|(block, _)| block)).collect(),
        ))
    }

    /// Runs the block that begins so; what it said.
    pub(super) fn run(&self, cluster: &Cluster<'_>, begin: &str) -> Result<String> {
        let block = self.0.iter().find(|block| block.starts_with(begin));
        let block = block.with_context(|| format!("deploy/README.md has no commands {begin:?}"))?;
        let values = deploy::values(cluster)?;
        // The runtime is not where a distribution puts it.
        let block = block.replace(
            "--set trustDomain=",
            &format!("--values '{}' --set trustDomain=", values.display()),
        );
        let helm = chart::helm()?;
        let helm = helm.parent().context("helm is in a directory")?.display();
        let root = root().display();
        let script = format!("set -e\nPATH='{helm}':$PATH\ncd '{root}'\n{block}\n");
        output(&mut cluster.shell(&script)).with_context(|| block.clone())
    }
}
