//! Events on pods: what an agent was denied, for whoever asks with `kubectl describe pod`.
//!
//! A pointer to the evidence and not the evidence, which is the audit log: each denial is told once,
//! and not more of them than somebody would read.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::Value;

use crate::audit::shown::target;
use crate::scope::cluster::ObjectName;

/// Who reports.
const CONTROLLER: &str = "agentguard.dev/agentguard";
/// The same denial is not told again before this time is over.
const ONCE_IN: Duration = Duration::from_secs(3600);
/// Events of one pod in that time.
const PER_POD: u32 = 20;
/// Events of this node: so many at once, and then one in this time.
const BURST: u32 = 50;
const PER_NODE: Duration = Duration::from_secs(2);
/// Denials that are remembered. One that finds no room is not told.
const REMEMBERED: usize = 4096;
/// The longest note, in characters; the API server takes 1,024 bytes.
const MAX_NOTE: usize = 250;

/// A denial of a pod, as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodDenial {
    pod: ObjectName,
    uid: String,
    /// What was asked for, and why it was denied.
    note: String,
    action: String,
    refused: bool,
}

impl PodDenial {
    /// The denial that a line of the audit log is, if it is one of a pod.
    #[must_use]
    pub fn of_line(line: &str) -> Option<Self> {
        // Most lines are not, and need not be read.
        if !line.contains("\"deny\"") {
            return None;
        }
        let record: Value = serde_json::from_str(line).ok()?;
        if record["kind"] != "verdict" || record["verdict"] != "deny" {
            return None;
        }
        let pod = &record["workload"]["pod"];
        let refused = record["refused"].as_bool()?;
        let action = record["request"]["action"].as_str()?;
        let outcome = if refused { "refused" } else { "let through in audit mode" };
        let identity = record["workload"]["identity"].as_str().unwrap_or("nobody known");
        let note = format!(
            "{action} {} was {outcome}: {} ({identity})",
            target(&record["request"]),
            record["reason"].as_str()?,
        );
        Some(Self {
            pod: ObjectName::new(pod["namespace"].as_str()?, pod["name"].as_str()?),
            uid: pod["uid"].as_str()?.to_owned(),
            note: note.chars().take(MAX_NOTE).collect(),
            action: action.to_owned(),
            refused,
        })
    }

    fn event(&self, node: &str, at: Timestamp) -> Event {
        Event {
            metadata: ObjectMeta {
                namespace: Some(self.pod.namespace.clone()),
                name: Some(format!("{}.{:x}", self.pod.name, at.as_nanosecond())),
                ..ObjectMeta::default()
            },
            regarding: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: Some(self.pod.namespace.clone()),
                name: Some(self.pod.name.clone()),
                uid: Some(self.uid.clone()),
                ..ObjectReference::default()
            }),
            type_: Some("Warning".to_owned()),
            reason: Some(
                if self.refused { "AgentRefused" } else { "AgentWouldBeRefused" }.to_owned(),
            ),
            action: Some(self.action.clone()),
            note: Some(self.note.clone()),
            event_time: Some(MicroTime(at)),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(node.to_owned()),
            ..Event::default()
        }
    }
}

/// What is told and what is not.
#[derive(Debug)]
struct Limits {
    told: HashMap<PodDenial, Instant>,
    of_pod: HashMap<String, (Instant, u32)>,
    /// What may be told at once, and since when that was not more.
    left: u32,
    since: Instant,
}

impl Limits {
    fn new(now: Instant) -> Self {
        Self { told: HashMap::new(), of_pod: HashMap::new(), left: BURST, since: now }
    }

    /// Whether a denial is to be told.
    fn admits(&mut self, denial: &PodDenial, now: Instant) -> bool {
        let is_recent = |at: &Instant| now.duration_since(*at) < ONCE_IN;
        if self.told.get(denial).is_some_and(is_recent) {
            return false;
        }
        if self.told.len() >= REMEMBERED {
            self.told.retain(|_, at| is_recent(at));
            self.of_pod.retain(|_, (since, _)| is_recent(since));
            if self.told.len() >= REMEMBERED {
                return false;
            }
        }
        let earned = now.duration_since(self.since).as_millis() / PER_NODE.as_millis();
        let earned = u32::try_from(earned).unwrap_or(BURST).min(BURST);
        self.left = (self.left + earned).min(BURST);
        // Nothing is saved up beyond a burst.
        self.since = if self.left == BURST { now } else { self.since + PER_NODE * earned };
        let of_pod = self.of_pod.get(&denial.uid).filter(|(since, _)| is_recent(since));
        let (since, of_pod) = of_pod.copied().unwrap_or((now, 0));
        if self.left == 0 || of_pod >= PER_POD {
            return false;
        }
        self.left -= 1;
        self.of_pod.insert(denial.uid.clone(), (since, of_pod + 1));
        self.told.insert(denial.clone(), now);
        true
    }
}

/// Tells of what comes, until nothing comes any more. An event that the API server does not take is
/// not tried again: the next one is newer.
pub async fn run(
    client: Client,
    node: String,
    mut denials: tokio::sync::mpsc::Receiver<PodDenial>,
) {
    let mut limits = Limits::new(Instant::now());
    let mut failed = false;
    while let Some(denial) = denials.recv().await {
        if !limits.admits(&denial, Instant::now()) {
            continue;
        }
        let api: Api<Event> = Api::namespaced(client.clone(), &denial.pod.namespace);
        let event = denial.event(&node, Timestamp::now());
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => failed = false,
            Err(error) => {
                if !std::mem::replace(&mut failed, true) {
                    tracing::warn!(%error, "the API server takes no events of denials; they are in the log alone");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(pod: u32, target: &str, refused: bool) -> String {
        json!({
            "kind": "verdict", "verdict": "deny", "refused": refused, "reason": "not_granted",
            "request": {"action": "exec", "path": target},
            "workload": {
                "identity": "spiffe://example.org/ns/a/sa/b",
                "pod": {"namespace": "a", "name": format!("p-{pod}"), "uid": format!("u-{pod}")},
            },
        })
        .to_string()
    }

    #[test]
    fn a_denial_of_a_pod_is_told_and_nothing_else() {
        let denial = PodDenial::of_line(&line(1, "/usr/bin/curl", true)).unwrap();
        let event = denial.event("node1", Timestamp::UNIX_EPOCH);
        assert_eq!(
            event.note.as_deref(),
            Some("exec /usr/bin/curl was refused: not_granted (spiffe://example.org/ns/a/sa/b)")
        );
        assert_eq!(event.reason.as_deref(), Some("AgentRefused"));
        assert_eq!(event.regarding.unwrap().uid.as_deref(), Some("u-1"));
        let long = PodDenial::of_line(&line(1, &"ä".repeat(4000), false)).unwrap();
        assert!(long.note.len() < 1024);
        assert_eq!(
            long.event("n", Timestamp::UNIX_EPOCH).reason.as_deref(),
            Some("AgentWouldBeRefused")
        );
        for other in [
            line(1, "/x", true).replace("\"deny\"", "\"allow\""),
            json!({"kind": "verdict", "verdict": "deny", "workload": {"pod": null}}).to_string(),
            json!({"kind": "loss", "what": "deny"}).to_string(),
            "\"deny\"".to_owned(),
        ] {
            assert_eq!(PodDenial::of_line(&other), None, "{other}");
        }
    }

    #[test]
    fn each_is_told_once_and_a_flood_not_at_all() {
        let begin = Instant::now();
        let mut limits = Limits::new(begin);
        let denial =
            |pod, number: u32| PodDenial::of_line(&line(pod, &format!("/{number}"), true)).unwrap();
        assert!(limits.admits(&denial(1, 0), begin));
        assert!(!limits.admits(&denial(1, 0), begin), "the same");
        let told = (1..100).filter(|number| limits.admits(&denial(1, *number), begin)).count();
        assert_eq!(told as u32, PER_POD - 1, "of one pod");
        let told = (2..200).filter(|pod| limits.admits(&denial(*pod, 0), begin)).count();
        assert_eq!(told as u32, BURST - PER_POD, "of one node");
        let later = begin + PER_NODE * 3;
        let told = (200..300).filter(|pod| limits.admits(&denial(*pod, 0), later)).count();
        assert_eq!(told, 3, "as time goes by");
        assert!(limits.admits(&denial(1, 0), begin + ONCE_IN), "the same an hour later");
        // What was not told for a day is not told in a day's number afterwards.
        let later = begin + ONCE_IN * 24;
        let told = (300..5000).filter(|pod| limits.admits(&denial(*pod, 0), later)).count();
        assert_eq!(told as u32, BURST, "after a while without any");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let begin = Instant::now();
        let mut limits = Limits::new(begin);
        for pod in 0..2 * REMEMBERED as u32 {
            let denial = PodDenial::of_line(&line(pod, "/x", true)).unwrap();
            // Slow enough that nothing else is a limit.
            limits.admits(&denial, begin + Duration::from_millis(1) * pod);
            limits.left = BURST;
        }
        assert_eq!(limits.told.len(), REMEMBERED);
        assert_eq!(limits.of_pod.len(), REMEMBERED);
    }
}
