//! Agent pods next to ordinary pods.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;

use super::{TOOLS, apply, deploy::in_daemon, expected, kubectl, traffic, wait_for_account};
use crate::{
    interrupt,
    kubernetes::{
        cluster::{API, Cluster, Pace},
        node::ADDRESS,
        seconds,
        traffic::{Outcome, Traffic},
    },
};

const MANIFESTS: &str = include_str!("../manifests/agents.yaml");
pub(super) const POD: &str = include_str!("../manifests/traffic.yaml");
pub(super) const IDLE: &str = include_str!("../manifests/idle.yaml");
pub(super) const GRANT: &str = include_str!("../manifests/grant.yaml");
pub(super) const BRIEF: &str = include_str!("../manifests/brief.yaml");

/// The socket of the node's runtime, in the pods' mounts.
const SOCKET: &str = "/node/containerd.sock";

/// What `status` says where the kernel gives no hook that judges unix sockets.
const SOCKETS_ARE_FREE: &str = "unix sockets are not judged";

/// The service that comes later.
pub(super) const LATER: &str = "10.96.77.77/80";

/// Labels of an agent that is held.
pub(super) const ENFORCED: &str = ", agentguard.dev/agent: \"true\", agentguard.dev/mode: enforce";

/// How long after its first request a pod may be held where no hook has it wait.
const HELD_WITHIN: Duration = Duration::from_secs(1);

/// An address outside of the cluster.
const NOBODY: &str = "192.0.2.1/80";

/// The pods.
#[derive(Debug)]
pub(super) struct Agents {
    /// Has a grant in enforce mode.
    pub(super) researcher: Traffic,
    /// Has a grant of all addresses.
    pub(super) wide: Traffic,
    /// Is an agent without a grant, in audit mode.
    pub(super) audited: Traffic,
    /// Asks for the same, and is no agent.
    pub(super) bystander: Traffic,
    pub(super) targets: Targets,
}

/// What is asked for.
#[derive(Debug)]
pub(super) struct Targets {
    /// The service of the web server, and its pod at the port that the service leads to.
    pub(super) service: String,
    pub(super) endpoint: String,
    /// Ports of its pod at which nothing listens: one that is granted, one that is not, and those that
    /// the scopes `more` and `chosen` have.
    pub(super) granted: String,
    pub(super) ungranted: String,
    pub(super) more: String,
    pub(super) chosen: String,
}

impl Targets {
    fn of(cluster: &Cluster<'_>) -> Result<Self> {
        let service = ["get", "service", "server", "--output", "jsonpath={.spec.clusterIP}"];
        let service = kubectl(cluster, &service)?;
        let pod = ["get", "pod", "--selector", "app=server", "--output"];
        let pod = kubectl(cluster, &[&pod[..], &["jsonpath={.items[0].status.podIP}"]].concat())?;
        Ok(Self {
            service: format!("{service}/81"),
            endpoint: format!("{pod}/8081"),
            granted: format!("{pod}/4444"),
            ungranted: format!("{pod}/4445"),
            more: format!("{pod}/4446"),
            chosen: format!("{pod}/4447"),
        })
    }

    pub(super) fn all(&self) -> String {
        let Self { service, endpoint, granted, ungranted, more, chosen } = self;
        [service, endpoint, granted, ungranted, more, chosen, LATER].join(" ")
    }

    /// What the grant `researcher` comes to while there is nothing else.
    pub(super) fn of_researcher_alone(&self) -> BTreeMap<String, Outcome> {
        let mut all = self.of_researcher();
        let refused = [self.more.as_str(), &self.chosen, LATER];
        all.extend(refused.map(|target| (target.to_owned(), Outcome::Refused)));
        all
    }

    /// The same where nothing is refused.
    pub(super) fn of_free(&self) -> BTreeMap<String, Outcome> {
        let all = self.of_researcher_alone();
        all.into_keys().map(|target| (target, Outcome::Passed)).collect()
    }

    /// What the grant `researcher` comes to, without what changes.
    pub(super) fn of_researcher(&self) -> BTreeMap<String, Outcome> {
        expected(&[
            (&self.service, Outcome::Passed),
            (&self.endpoint, Outcome::Passed),
            (&self.granted, Outcome::Passed),
            (&self.ungranted, Outcome::Refused),
            ("curl", Outcome::Passed),
        ])
    }
}

/// The variables of a pod that asks.
pub(super) fn asking<'a>(
    cluster: &Cluster<'_>,
    name: &'a str,
    account: &'a str,
    labels: &'a str,
    targets: &'a str,
) -> [(&'static str, &'a str); 6] {
    [
        ("$NAME", name),
        ("$ACCOUNT", account),
        ("$LABELS", labels),
        ("$TARGETS", targets),
        ("$REST", cluster.pace().every("0.05", "0.5")),
        ("$HOST_NETWORK", "false"),
    ]
}

impl Agents {
    /// Starts them, and returns once all ask.
    pub(super) fn start(cluster: &mut Cluster<'_>) -> Result<Self> {
        apply(cluster, MANIFESTS, &[])?;
        wait_for_account(cluster, "agents")?;
        let targets = Targets::of(cluster)?;
        let wide = format!("{API} {ADDRESS}/6443 {ADDRESS}/10250 {} {NOBODY}", targets.endpoint);
        let audited = ", agentguard.dev/agent: \"true\", agentguard.dev/mode: audit";
        let pods = [
            ("researcher", "researcher", ENFORCED, targets.all()),
            ("wide", "wide", ENFORCED, wide),
            ("audited", "default", audited, targets.all()),
            ("bystander", "researcher", "", targets.all()),
        ];
        // A node without a pod in a namespace reads none of its grants.
        wait_for_account(cluster, "strangers")?;
        let stranger = [("$NAMESPACE", "strangers"), ("$NAME", "stranger"), ("$LABELS", "")];
        apply(cluster, IDLE, &stranger)?;
        for (name, account, labels, asks) in &pods {
            apply(cluster, POD, &asking(cluster, name, account, labels, asks))?;
        }
        for (name, ..) in &pods {
            cluster.wait_for(
                &format!("the pod {name} runs"),
                &[
                    "--namespace",
                    "agents",
                    "get",
                    "pod",
                    name,
                    "--output",
                    "jsonpath={.status.phase}",
                ],
                "Running",
            )?;
        }
        let agents = Self {
            researcher: traffic(cluster, "researcher")?,
            wide: traffic(cluster, "wide")?,
            audited: traffic(cluster, "audited")?,
            bystander: traffic(cluster, "bystander")?,
            targets,
        };
        // What an image starts may run without a grant: a container that was ended at its start is one
        // that was held before it was known what starts it.
        interrupt::sleep(Duration::from_secs(3))?;
        for (name, ..) in &pods {
            let restarts = "jsonpath={.status.containerStatuses[0].restartCount}";
            let question = ["--namespace", "agents", "get", "pod", name, "--output", restarts];
            let restarts = kubectl(cluster, &question)?;
            if restarts != "0" {
                let events = ["events", "--denied", "--lines", "1000", "--output", "json"];
                let events = in_daemon(cluster, &events)?;
                let of_network = |event: &&str| event.contains("\"connect\"");
                let others = events.lines().filter(|event| !of_network(event));
                others.for_each(|event| eprintln!("{event}"));
                let why = "jsonpath={.status.containerStatuses[0].lastState}";
                let question = ["--namespace", "agents", "get", "pod", name, "--output", why];
                let why = kubectl(cluster, &question)?;
                bail!("the pod {name} was ended at its start {restarts} times: {why}");
            }
        }
        println!("seen      the pods run, agents and others");
        Ok(agents)
    }
}

/// Each kind of pod gets what it should, and nothing else.
pub(super) fn held(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let Agents { researcher, wide, audited, bystander, targets } = agents;
    // From the very first request on: an agent is held before it runs, or as soon as it is known.
    let first = researcher.all()?.first().map(|asked| asked.at);
    let held = researcher.first(&targets.ungranted, Outcome::Refused, Timestamp::UNIX_EPOCH)?;
    if let Some(first) = first {
        let late = Duration::try_from(held - first)?;
        println!(
            "seen      an agent is held {} after its first request, without the runtime's hook",
            seconds(late)
        );
        ensure!(late <= cluster.pace().allows(HELD_WITHIN), "an agent was held {late:?} late");
    }
    wide.first(&format!("{ADDRESS}/6443"), Outcome::Refused, Timestamp::UNIX_EPOCH)?;
    let since = Timestamp::now();
    interrupt::sleep(Duration::from_secs(3))?;

    let count = researcher.judge(since, &targets.of_researcher_alone())?;
    println!(
        "seen      an agent reaches its service, the service's endpoint, and its port of a pod, runs its \
         program, and is refused the rest: {count} requests"
    );
    let of_wide = expected(&[
        (API, Outcome::Refused),
        (&format!("{ADDRESS}/6443"), Outcome::Refused),
        (&format!("{ADDRESS}/10250"), Outcome::Refused),
        (&targets.endpoint, Outcome::Refused),
        (NOBODY, Outcome::Passed),
        ("curl", Outcome::Refused),
    ]);
    let count = wide.judge(since, &of_wide)?;
    println!(
        "seen      an agent that is granted 0.0.0.0/0 reaches neither the API server, nor the kubelet, nor \
         a pod: {count} requests"
    );
    let free = targets.of_free();
    let audited = audited.judge(since, &free)?;
    let bystanders = bystander.judge(since, &free)?;
    println!(
        "seen      neither an agent in audit mode ({audited} requests) nor an ordinary pod ({bystanders}) \
         is refused anything"
    );

    let exec = |pod: &str, command: &[&str]| exec(cluster, pod, command);
    let curl = curl(targets)?;
    let curl: Vec<&str> = curl.iter().map(String::as_str).collect();
    let said = exec("researcher", &curl)?;
    ensure!(said.trim() == "hello", "kubectl exec of a granted program says {said:?}");
    let cat = ["/bin/cat", "/etc/passwd"];
    let said = exec("bystander", &cat)?;
    ensure!(said.contains("root:"), "kubectl exec in an ordinary pod says {said:?}");
    match exec("researcher", &cat) {
        Ok(said) => bail!("kubectl exec of an ungranted program says {said:?}"),
        Err(error) => println!(
            "seen      kubectl exec of a granted program works, of another it is refused: {}",
            error.to_string().lines().last().unwrap_or_default()
        ),
    }
    Ok(())
}

/// A command in a pod.
fn exec(cluster: &Cluster<'_>, pod: &str, command: &[&str]) -> Result<String> {
    let exec = ["--namespace", "agents", "exec", pod, "--"];
    kubectl(cluster, &[&exec[..], command].concat())
}

/// A socket that a volume brings into an agent is the way out of it: who connects to the runtime's starts
/// what it likes. It is reached by whom a scope grants its path in the container.
pub(super) fn at_sockets(cluster: &mut Cluster<'_>, _: &Agents) -> Result<()> {
    let is_judged = !in_daemon(cluster, &["status"])?.contains(SOCKETS_ARE_FREE);
    ensure!(
        is_judged || cluster.pace() == Pace::Own,
        "the machine's kernel has the BPF LSM active, and unix sockets are not judged"
    );
    let becomes = |pod: &str, wanted: Outcome| {
        let begin = Instant::now();
        loop {
            let became = connected(cluster, pod)?;
            if became == wanted {
                return Ok(());
            }
            ensure!(
                begin.elapsed() < cluster.pace().patience(Duration::from_secs(10)),
                "a connect of {pod} to {SOCKET} is {became}"
            );
            interrupt::sleep(Duration::from_millis(200))?;
        }
    };
    let without = if is_judged { Outcome::Refused } else { Outcome::Passed };
    becomes("researcher", without)?;
    becomes("bystander", Outcome::Passed)?;
    apply(
        cluster,
        GRANT,
        &[("$NAME", "at-runtime"), ("$SCOPE", "runtime"), ("$EXPIRES", "never")],
    )?;
    becomes("researcher", Outcome::Passed)?;
    kubectl(cluster, &["--namespace", "agents", "delete", "grant", "at-runtime"])?;
    becomes("researcher", without)?;
    println!(
        "seen      {} reaches the node's runtime by the socket that is mounted into it",
        if is_judged {
            "an agent with a grant, and none without,"
        } else {
            "as status says, an agent"
        }
    );
    Ok(())
}

/// What becomes of a connect of `curl` in a pod to [`SOCKET`]. Nobody answers it as a web server does.
fn connected(cluster: &Cluster<'_>, pod: &str) -> Result<Outcome> {
    let curl =
        ["/usr/bin/curl", "--verbose", "--silent", "--max-time", "5", "--unix-socket", SOCKET];
    let said = match exec(cluster, pod, &[&curl[..], &["http://runtime/"]].concat()) {
        Ok(said) => said,
        Err(error) => format!("{error:#}"),
    };
    if said.contains("Operation not permitted") {
        return Ok(Outcome::Refused);
    }
    ensure!(said.contains("Connected to runtime"), "curl says of {SOCKET}: {said}");
    Ok(Outcome::Passed)
}

/// The command by which an agent asks its service for a word.
fn curl(targets: &Targets) -> Result<Vec<String>> {
    let (address, _port) = targets.service.split_once('/').context("a target has a port")?;
    let url = format!("http://{address}/hello");
    let command = ["/usr/bin/curl", "--silent", "--fail", "--max-time", "5", &url];
    Ok(command.map(str::to_owned).into())
}

/// A container that is added to a running agent is the agent's: what it starts with runs, and it may do
/// what the agent may.
pub(super) fn looked_into(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let Targets { ungranted, .. } = &agents.targets;
    // Without the runtime's hook a program that is granted is known in a new container once the runtime has
    // told of it, which it is asked every quarter of a second; until then it is refused.
    let script = format!(
        "{{ :; }} 3<>/dev/tcp/{ungranted} || echo refused\n\
         /bin/cat /etc/passwd || echo not run\n\
         coproc never {{ read -r _; }}\n\
         for (( turn = 0; turn < 20; turn++ )); do\n\
         {} && echo after $turn && break\n\
         read -r -t 0.25 -u \"${{never[0]}}\"\n\
         done\n",
        curl(&agents.targets)?.join(" ")
    );
    let agents = ["--namespace", "agents"];
    let debug = ["debug", "researcher", "--container=looker", "--image", TOOLS, "--"];
    let shell = ["/usr/bin/bash", "-c", &script];
    kubectl(cluster, &[&agents[..], &debug, &shell].concat())?;
    let code = "jsonpath={.status.ephemeralContainerStatuses[0].state.terminated.exitCode}";
    let question = [&agents[..], &["get", "pod", "researcher", "--output", code]].concat();
    cluster.wait_for("an ephemeral container of an agent has ended", &question, "0")?;
    let logs = ["logs", "researcher", "--container=looker"];
    let said = kubectl(cluster, &[&agents[..], &logs].concat())?;
    let has = |word: &str| said.lines().any(|line| line == word);
    ensure!(
        has("hello")
            && has("refused")
            && said.contains(&format!("/dev/tcp/{ungranted}: Operation not permitted"))
            && has("not run")
            && !said.contains("root:"),
        "an ephemeral container of an agent says {said:?}"
    );
    let turns = said.lines().find_map(|line| line.strip_prefix("after "));
    let turns = turns.with_context(|| format!("how often it tried is not in {said:?}"))?;
    println!(
        "seen      an ephemeral container of an agent may do what the agent may, and no more; a program \
         that is granted was refused {turns} times before the runtime had told of the container"
    );
    Ok(())
}

/// Columns and conditions of what `kubectl get` shows.
pub(super) fn shown(cluster: &mut Cluster<'_>, _: &Agents) -> Result<()> {
    let valid = "jsonpath={.status.conditions[?(@.type==\"Valid\")].status}";
    let enforced = "jsonpath={.status.conditions[?(@.type==\"Enforced\")].status}";
    let nodes = "jsonpath={.status.enforced}";
    for (object, namespace, path, wanted) in [
        ("grant/researcher", "agents", valid, "True"),
        ("grant/researcher", "agents", enforced, "True"),
        ("grant/researcher", "agents", nodes, "1"),
        ("scope/web", "agents", enforced, "True"),
        ("clustergrant/wide", "agents", enforced, "True"),
        ("grant/not-theirs", "strangers", valid, "False"),
        ("grant/not-theirs", "strangers", enforced, "False"),
    ] {
        let question = ["--namespace", namespace, "get", object, "--output", path];
        cluster
            .wait_for(&format!("{object} says so in its status"), &question, wanted)
            .with_context(|| path.to_owned())?;
    }
    is_over_in_time(cluster)?;
    for kinds in ["scopes", "grants", "clustergrants"] {
        let table = kubectl(cluster, &["get", kinds, "--all-namespaces"])?;
        for line in table.lines() {
            println!("          {line}");
        }
    }
    let message = "jsonpath={.status.conditions[?(@.type==\"Valid\")].message}";
    let question = ["--namespace", "strangers", "get", "grant/not-theirs", "--output", message];
    let why = kubectl(cluster, &question)?;
    ensure!(why.contains("namespace"), "a grant of another namespace's subject says {why:?}");
    println!("seen      a grant of a subject of another namespace is refused: {why}");
    let notes = "jsonpath={range .items[*]}{.involvedObject.name}: {.message}{\"\\n\"}{end}";
    let refused = "reason=AgentRefused";
    let question = ["--namespace", "agents", "get", "events", "--field-selector", refused];
    let events = kubectl(cluster, &[&question[..], &["--output", notes]].concat())?;
    let of_researcher = events.lines().find(|event| event.starts_with("researcher: "));
    let event = of_researcher.with_context(|| format!("no denial among the events {events:?}"))?;
    println!("seen      a denial is an event of its pod: {event}");
    Ok(())
}

/// A grant whose window is over is shown as such, and in force nowhere.
fn is_over_in_time(cluster: &mut Cluster<'_>) -> Result<()> {
    let state = "jsonpath={.status.conditions[?(@.type==\"Active\")].reason}";
    let question = ["--namespace", "agents", "get", "grant/brief", "--output"];
    let lasts = cluster.pace().patience(Duration::from_secs(10));
    apply(cluster, BRIEF, &[("$TTL", &format!("{}s", lasts.as_secs()))])?;
    for wanted in ["Active", "Expired"] {
        let question = [&question[..], &[state]].concat();
        cluster.wait_for(&format!("a grant for {lasts:?} is {wanted}"), &question, wanted)?;
    }
    let nodes = [&question[..], &["jsonpath={.status.enforced}"]].concat();
    cluster.wait_for("it is in force nowhere", &nodes, "0").map(drop)
}

/// What an ordinary pod asked for from beginning to end, it got; and nothing else became of what agents
/// asked for than what is looked for.
pub(super) fn bystander_saw_nothing(_: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let count = agents.bystander.judge(Timestamp::UNIX_EPOCH, &agents.targets.of_free())?;
    println!("seen      none of {count} requests of an ordinary pod was refused");
    // Also between what was looked at nothing became of a request that is not known.
    for agent in [&agents.researcher, &agents.wide, &agents.audited] {
        agent.all()?;
    }
    Ok(())
}
