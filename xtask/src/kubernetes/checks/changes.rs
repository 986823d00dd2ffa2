//! How soon what is changed in the cluster is in force.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Result, ensure};
use jiff::{SignedDuration, Timestamp};

use super::{
    agents::{Agents, GRANT, LATER},
    apply, kubectl,
};
use crate::{
    interrupt,
    kubernetes::{
        cluster::Cluster,
        traffic::{Asked, Outcome, Traffic},
    },
};

const SERVICE: &str = include_str!("../manifests/later.yaml");

/// How long it may take from when `kubectl` returns.
const LIMIT: Duration = Duration::from_secs(1);

/// How often each change is measured, and how often it is made at the most for that.
const MEASURED: usize = 3;
const ROUNDS: usize = 5;

pub(super) fn take_effect(cluster: &mut Cluster<'_>, agents: &Agents) -> Result<()> {
    let cluster: &Cluster<'_> = cluster;
    let Agents { researcher, audited, targets, .. } = agents;
    let more = targets.more.as_str();
    let limit = cluster.pace().allows(LIMIT);
    let mut took: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for round in 0..ROUNDS {
        if round > 0 && took.values().all(|each| each.len() >= MEASURED) {
            break;
        }
        let mut note = |what, took_this| took.entry(what).or_default().extend(took_this);
        let grant = [("$NAME", "changing"), ("$SCOPE", "more"), ("$EXPIRES", "never")];
        let change = || apply(cluster, GRANT, &grant);
        note("a grant is added", measured(limit, researcher, more, Outcome::Passed, change)?);
        let delete = ["--namespace", "agents", "delete", "grant", "changing"];
        let change = || told(cluster, &delete);
        note("a grant is deleted", measured(limit, researcher, more, Outcome::Refused, change)?);

        let change = || apply(cluster, SERVICE, &[]);
        note("a service is added", measured(limit, researcher, LATER, Outcome::Passed, change)?);
        let delete = ["delete", "service", "later"];
        let change = || told(cluster, &delete);
        note("a service is deleted", measured(limit, researcher, LATER, Outcome::Refused, change)?);

        let chosen = targets.chosen.as_str();
        let grant = [("$NAME", "chosen"), ("$SCOPE", "chosen"), ("$EXPIRES", "never")];
        apply(cluster, GRANT, &grant)?;
        let choose = |label: &'static str| {
            move || {
                told(cluster, &["label", "--overwrite", "pod", "--selector", "app=server", label])
            }
        };
        let change = choose("chosen=yes");
        note(
            "a scope selects a pod",
            measured(limit, researcher, chosen, Outcome::Passed, change)?,
        );
        let ports = |ports: &'static str| {
            let patch = format!(
                r#"[{{"op": "replace", "path": "/spec/egress/0/ports/0/port", "value": {ports}}}]"#
            );
            move || {
                told(cluster, &["patch", "scope", "chosen", "--type", "json", "--patch", &patch])
            }
        };
        let change = ports("4448");
        note(
            "a scope loses a port",
            measured(limit, researcher, chosen, Outcome::Refused, change)?,
        );
        let change = ports("4447");
        note("a scope gets a port", measured(limit, researcher, chosen, Outcome::Passed, change)?);
        let change = choose("chosen-");
        note(
            "a scope selects it no more",
            measured(limit, researcher, chosen, Outcome::Refused, change)?,
        );
        told(cluster, &["--namespace", "agents", "delete", "grant", "chosen"])?;

        let label = |label: &'static str| {
            move || {
                let to = ["--namespace", "agents", "label", "--overwrite", "pod", "audited", label];
                told(cluster, &to)
            }
        };
        let ungranted = targets.ungranted.as_str();
        let change = label("agentguard.dev/mode=enforce");
        note(
            "the mode becomes enforce",
            measured(limit, audited, ungranted, Outcome::Refused, change)?,
        );
        let change = label("agentguard.dev/agent-");
        note(
            "a pod is no agent any more",
            measured(limit, audited, ungranted, Outcome::Passed, change)?,
        );
        let change = label("agentguard.dev/agent=true");
        note(
            "a pod becomes an agent",
            measured(limit, audited, ungranted, Outcome::Refused, change)?,
        );
        let change = label("agentguard.dev/mode=audit");
        note(
            "the mode becomes audit",
            measured(limit, audited, ungranted, Outcome::Passed, change)?,
        );
    }
    for (what, took) in &took {
        ensure!(took.len() >= MEASURED, "{what}: measured only {} times", took.len());
        let each: Vec<String> = took.iter().map(|took| took.as_millis().to_string()).collect();
        println!("seen      {what}: in force {} ms after kubectl returned", each.join(", "));
    }
    let late: Vec<&str> = took
        .iter()
        .filter(|(_, took)| took.iter().any(|took| *took > limit))
        .map(|(what, _)| *what)
        .collect();
    ensure!(late.is_empty(), "in force later than {} s: {}", limit.as_secs(), late.join(", "));
    Ok(())
}

/// How long after `change` a pod saw it, and fails if what it saw does not stay so. `None` where the
/// pod could not see it: it was waiting for an answer to what it had asked a moment before.
fn measured(
    limit: Duration,
    pod: &Traffic,
    target: &str,
    outcome: Outcome,
    change: impl FnOnce() -> Result<Timestamp>,
) -> Result<Option<Duration>> {
    let begin = Timestamp::now();
    let returned = change()?;
    // What was asked before may be in the log after it, by as much as the runtime takes.
    let seen = pod.first(target, outcome, begin)?;
    interrupt::sleep(Duration::from_millis(300))?;
    pod.judge(seen, &BTreeMap::from([(target.to_owned(), outcome)]))?;
    let meanwhile = pod.since(begin)?;
    let caught =
        meanwhile.iter().position(|asked| asked.at <= seen && asked.outcome == Outcome::Unanswered);
    let Some(index) = caught else { return Ok(Some(later(seen, returned))) };
    // What is refused of a connection that has begun is each of its packets. It is one that is refused from
    // then on, and began after what the pod had asked for before it.
    let Asked { target, outcome: became, .. } = &meanwhile[index];
    ensure!(outcome == Outcome::Refused, "{target} was {became}");
    pod.judge(seen, &BTreeMap::from([(target.clone(), Outcome::Refused)]))?;
    let before = index.checked_sub(1).map_or(begin, |index| meanwhile[index].at);
    let late = later(before, returned);
    ensure!(late <= limit, "{target} was let through {} ms after a change", late.as_millis());
    println!("seen      a connection to {target} was caught by a change as it began");
    Ok(None)
}

/// How long after `returned`; nothing where it was before: a change is often in force before `kubectl`
/// returns.
fn later(at: Timestamp, returned: Timestamp) -> Duration {
    at.duration_since(returned).max(SignedDuration::ZERO).unsigned_abs()
}

fn told(cluster: &Cluster<'_>, arguments: &[&str]) -> Result<Timestamp> {
    kubectl(cluster, arguments)?;
    Ok(Timestamp::now())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::kubernetes::cluster::Pace;

    /// What is measured of a change after which a pod's log says these: milliseconds after the change,
    /// port, and what became of it.
    fn measured_of(said: &[(i64, u16, &str)]) -> Result<Option<Duration>> {
        let logs = tempfile::tempdir()?;
        let container = logs.path().join("agents_pod_uid/agent");
        fs::create_dir_all(&container)?;
        let pod = Traffic::of(logs.path(), "agents", "pod", Pace::Own)?;
        let change = || {
            let returned = Timestamp::now();
            let lines = said.iter().map(|(after, port, became)| {
                let at = returned + SignedDuration::from_millis(*after);
                format!("{at} stdout F bash: line 5: /dev/tcp/10.0.0.1/{port}: {became}\n")
            });
            fs::write(container.join("0.log"), lines.collect::<String>())?;
            Ok(returned)
        };
        measured(Duration::from_secs(1), &pod, "10.0.0.1/2", Outcome::Refused, change)
    }

    const REFUSED: &str = "Operation not permitted";
    const REACHED: &str = "Connection refused";
    const SILENT: &str = "Connection timed out";

    #[test]
    fn a_change_is_measured_by_the_first_request_that_saw_it() {
        let took = measured_of(&[(100, 2, REACHED), (200, 2, REFUSED), (300, 2, REFUSED)]).unwrap();
        assert_eq!(took, Some(Duration::from_millis(200)));
        let error = measured_of(&[(200, 2, REFUSED), (300, 2, REACHED)]).unwrap_err();
        assert!(error.to_string().contains("it has to be refused"), "{error}");
    }

    #[test]
    fn a_measurement_is_void_only_where_the_change_caught_a_connection_that_it_refuses() {
        let then = 131_000;
        let caught = [(100, 1, REACHED), (then, 2, SILENT), (then + 10, 2, REFUSED)];
        assert_eq!(measured_of(&caught).unwrap(), None);
        // It was let through long after the change.
        let late = [(1100, 1, REACHED), (then, 2, SILENT), (then + 10, 2, REFUSED)];
        let error = measured_of(&late).unwrap_err();
        assert!(error.to_string().contains("let through 1100 ms after a change"), "{error}");
        // What is left without an answer is granted.
        let granted = [(then, 1, SILENT), (then + 10, 2, REFUSED), (then + 20, 1, REACHED)];
        let error = measured_of(&granted).unwrap_err();
        assert!(error.to_string().contains("10.0.0.1/1 was let through"), "{error}");
    }
}
