//! What this node says of the custom resources, written into their status.
//!
//! Each node has an entry of its own (server-side apply, one manager per node). The sum is written by
//! one of them, the first by name, so that there is no contention and no controller; the same one
//! takes away the entries of nodes that the cluster has no more. Only nodes that an object concerns
//! say anything of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::manifests::{ObjectKind, Objects};
use super::watch::{Retry, bytes_of_texts};
use crate::grant::store::Phase;
use crate::manifest::API_VERSION;
use crate::scope::cluster::ObjectName;

/// Who writes the sum.
const SUMMARY: &str = "agentguard-summary";
/// Changes that come together are written together.
const SETTLE: Duration = Duration::from_millis(200);
/// What is said where nothing is wrong. Not nothing: old API servers take an empty text that is applied
/// for one that is missing, and refuse the whole status.
const FINE: &str = "nothing is wrong with it";
/// The longest error that is written.
const MAX_ERROR_CHARACTERS: usize = 1024;

/// What a node says of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Word {
    /// The generation that counts there.
    pub generation: Option<i64>,
    /// Why it is not the newest one; or, where it is, why it is not in force.
    pub error: Option<String>,
    /// Where a grant is in its life.
    pub state: Option<Phase>,
}

impl Word {
    /// Whether `newest` is what counts, and permits.
    fn enforces(&self, newest: i64) -> bool {
        let permits = match self.state {
            None | Some(Phase::Active) => true,
            Some(Phase::Pending | Phase::Expired | Phase::Revoked) => false,
        };
        permits && self.error.is_none() && self.generation == Some(newest)
    }
}

/// The status of an object, as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectStatus {
    /// The newest generation there is.
    pub generation: i64,
    pub nodes: BTreeMap<String, Word>,
    summary: Summary,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Summary {
    observed: Option<i64>,
    enforced: Option<i64>,
    conditions: BTreeMap<String, Condition>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Condition {
    status: String,
    reason: String,
    message: String,
    since: String,
}

impl ObjectStatus {
    /// About how much memory it takes.
    pub(super) fn bytes(&self) -> usize {
        let Self { generation: _, nodes, summary: Summary { conditions, .. } } = self;
        let words = nodes.iter().map(|(name, word)| {
            size_of::<Word>() + name.len() + word.error.as_ref().map_or(0, String::len) + 64
        });
        let conditions = conditions.iter().map(|(name, condition)| {
            let Condition { status, reason, message, since } = condition;
            bytes_of_texts([name, status, reason, message, since])
        });
        words.sum::<usize>() + conditions.sum::<usize>()
    }
}

/// Who is there to say something.
#[derive(Clone, Copy, Debug)]
pub struct Nodes<'a> {
    /// The nodes of the cluster, where they are known.
    pub cluster: Option<&'a BTreeSet<String>>,
    pub watch: Watchers,
}

/// Which nodes see an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watchers {
    All,
    /// Those that it concerns, or did a moment ago.
    Concerned,
}

/// An apply that is due.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    pub kind: ObjectKind,
    pub name: ObjectName,
    pub manager: String,
    pub status: Value,
}

impl ObjectStatus {
    /// What the API server says the status is.
    #[must_use]
    pub fn read(generation: i64, status: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let entries = status["nodes"].as_array().into_iter().flatten().map(|entry| {
            let word = Word {
                generation: entry["generation"].as_i64(),
                error: entry["error"].as_str().map(str::to_owned),
                state: Phase::ALL.into_iter().find(|phase| entry["state"] == phase.as_str()),
            };
            (text(&entry["name"]), word)
        });
        let conditions = status["conditions"].as_array().into_iter().flatten().map(|condition| {
            let read = Condition {
                status: text(&condition["status"]),
                reason: text(&condition["reason"]),
                message: text(&condition["message"]),
                since: text(&condition["lastTransitionTime"]),
            };
            (text(&condition["type"]), read)
        });
        Self {
            generation,
            nodes: entries.collect(),
            summary: Summary {
                observed: status["observedGeneration"].as_i64(),
                enforced: status["enforced"].as_i64(),
                conditions: conditions.collect(),
            },
        }
    }

    /// What is to be written so that the status says what `node` says and what all together say.
    #[must_use]
    pub fn due(
        &self,
        node: &str,
        word: Option<&Word>,
        nodes: Nodes<'_>,
        now: Timestamp,
    ) -> Vec<(String, Value)> {
        let Nodes { cluster, watch } = nodes;
        let mut due = Vec::new();
        if self.nodes.get(node) != word {
            let entry = word.map(|Word { generation, error, state }| {
                let mut entry = json!({"name": node});
                if let Some(state) = state {
                    entry["state"] = state.as_str().into();
                }
                if let Some(generation) = generation {
                    entry["generation"] = (*generation).into();
                }
                if let Some(error) = error {
                    entry["error"] = error.clone().into();
                }
                entry
            });
            let entries: Vec<Value> = entry.into_iter().collect();
            due.push((manager(node), json!({"nodes": entries})));
        }
        let is_there = |name: &String| cluster.is_none_or(|nodes| nodes.contains(name));
        let (there, gone): (Vec<_>, Vec<_>) =
            self.nodes.iter().partition(|(name, _)| name.as_str() == node || is_there(name));
        // Where nobody says anything any more, somebody has to say that: of those who see it one, where
        // it is known who they are, and else each, to the same effect.
        let first = there.first().map(|(name, _)| *name).or_else(|| match watch {
            Watchers::All => cluster.and_then(BTreeSet::first),
            Watchers::Concerned => None,
        });
        let is_responsible = first.is_none_or(|first| first == node);
        if is_responsible && (self.summary.enforced.is_some() || !self.nodes.is_empty()) {
            let none: [Value; 0] = [];
            due.extend(gone.iter().map(|(name, _)| (manager(name), json!({"nodes": none}))));
            let summary = self.summed(&there, now);
            if summary != self.summary {
                due.push((SUMMARY.to_owned(), summary.written()));
            }
        }
        due
    }

    fn summed(&self, nodes: &[(&String, &Word)], now: Timestamp) -> Summary {
        let enforced =
            nodes.iter().filter(|(_, word)| word.enforces(self.generation)).count() as i64;
        let error = |is_newest: bool| {
            let is = |word: &Word| (word.generation == Some(self.generation)) == is_newest;
            let mut words = nodes.iter().filter(|(_, word)| is(word));
            words.find_map(|(node, word)| Some(format!("{node}: {}", word.error.as_ref()?)))
        };
        let (invalid, not_in_force) = (error(false), error(true));
        let on_nodes = format!("on {enforced} of {} nodes that it concerns", nodes.len());
        let words = |name: &str, holds: bool| match holds {
            true => ("True", name.to_owned()),
            false => ("False", format!("Not{name}")),
        };
        let mut said = vec![
            (
                "Enforced",
                words("Enforced", enforced > 0),
                not_in_force.map_or(on_nodes.clone(), |why| format!("{on_nodes}; {why}")),
            ),
            (
                "Valid",
                words("Valid", invalid.is_none()),
                invalid.unwrap_or_else(|| FINE.to_owned()),
            ),
        ];
        // Clocks differ by a little: what permits somewhere is not said to be over.
        let order = [Phase::Active, Phase::Pending, Phase::Expired, Phase::Revoked];
        let is = |state: &Phase| nodes.iter().any(|(_, word)| word.state == Some(*state));
        said.extend(order.into_iter().find(is).map(|state| {
            let (status, reason, message) = match state {
                Phase::Active => ("True", "Active", "its window is open"),
                Phase::Pending => ("False", "Pending", "its window has not begun"),
                Phase::Expired => ("False", "Expired", "its window is over"),
                Phase::Revoked => ("False", "Revoked", "it was taken back on a node"),
            };
            ("Active", (status, reason.to_owned()), message.to_owned())
        }));
        let conditions = said.into_iter().map(|(name, (status, reason), message)| {
            let before = self.summary.conditions.get(name);
            let since = match before.filter(|before| before.status == status) {
                Some(before) => before.since.clone(),
                None => seconds(now),
            };
            (name.to_owned(), Condition { status: status.to_owned(), reason, message, since })
        });
        Summary {
            observed: Some(self.generation),
            enforced: Some(enforced),
            conditions: conditions.collect(),
        }
    }
}

impl Summary {
    fn written(&self) -> Value {
        let conditions: Vec<Value> = self
            .conditions
            .iter()
            .map(|(name, condition)| {
                json!({
                    "type": name,
                    "status": condition.status,
                    "reason": condition.reason,
                    "message": condition.message,
                    "lastTransitionTime": condition.since,
                    "observedGeneration": self.observed,
                })
            })
            .collect();
        json!({
            "observedGeneration": self.observed,
            "enforced": self.enforced,
            "conditions": conditions,
        })
    }
}

/// A time as API servers keep it.
fn seconds(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

/// A node's name may be longer than a manager's.
fn manager(node: &str) -> String {
    let digest = Sha256::digest(node);
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("agentguard-node-{hex}")
}

/// An error, as short as a status should be.
#[must_use]
pub fn shortened(error: &str) -> String {
    error.chars().take(MAX_ERROR_CHARACTERS).collect()
}

/// Writes what is due for as long as the daemon runs.
pub async fn run(client: Client, node: String, objects: Arc<Objects>) {
    let mut pauses = Retry::default();
    loop {
        objects.to_report().await;
        tokio::time::sleep(SETTLE).await;
        let mut has_failed = false;
        for due in objects.due(&node, Timestamp::now()) {
            // What can not be said is said later; what is enforced does not depend on it.
            match apply(&client, &due).await {
                Ok(()) => {}
                // One that the API server refuses is no reason to say nothing of the others.
                Err(error @ kube::Error::Api(_)) => {
                    tracing::warn!(%error, object = due.kind.path(&due.name), "a status is refused");
                    has_failed = true;
                }
                Err(error) => {
                    tracing::debug!(%error, object = due.kind.path(&due.name), "a status is not written");
                    has_failed = true;
                    break;
                }
            }
        }
        if has_failed {
            tokio::time::sleep(pauses.pause()).await;
            objects.report_again();
        } else {
            pauses = Retry::default();
        }
    }
}

async fn apply(client: &Client, due: &Due) -> Result<(), kube::Error> {
    let Due { kind, name, manager, status } = due;
    let resource = kind.resource();
    let api: Api<DynamicObject> = match name.namespace.as_str() {
        "" => Api::all_with(client.clone(), &resource),
        namespace => Api::namespaced_with(client.clone(), namespace, &resource),
    };
    let mut metadata = json!({"name": name.name});
    if !name.namespace.is_empty() {
        metadata["namespace"] = name.namespace.clone().into();
    }
    let body = json!({
        "apiVersion": API_VERSION,
        "kind": kind.as_str(),
        "metadata": metadata,
        "status": status,
    });
    let parameters = PatchParams::apply(manager).force();
    match api.patch_status(&name.name, &parameters, &Patch::Apply(&body)).await {
        Ok(_) => Ok(()),
        // It was deleted meanwhile.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(generation: i64) -> Word {
        Word { generation: Some(generation), ..Word::default() }
    }

    fn of(cluster: Option<&BTreeSet<String>>) -> Nodes<'_> {
        Nodes { cluster, watch: Watchers::All }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// Applies what is due as an API server does, manager by manager.
    fn written(status: &Value, due: &[(String, Value)]) -> Value {
        let mut status = status.clone();
        for (manager, change) in due {
            if manager == SUMMARY {
                for (name, value) in change.as_object().unwrap() {
                    status[name] = value.clone();
                }
                continue;
            }
            let mut nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            nodes.retain(|entry| self::manager(entry["name"].as_str().unwrap()) != *manager);
            nodes.extend(change["nodes"].as_array().unwrap().iter().cloned());
            status["nodes"] = nodes.into();
        }
        status
    }

    #[test]
    fn each_node_writes_its_own_and_the_first_one_the_sum_until_nothing_is_due() {
        let words = BTreeMap::from([
            ("b", Some(word(2))),
            ("a", Some(Word { error: Some("spec: is wrong".to_owned()), ..word(1) })),
            ("c", None),
        ]);
        let mut status = json!({});
        for _round in 0..3 {
            for (node, word) in &words {
                let known = ObjectStatus::read(2, &status);
                let due = known.due(node, word.as_ref(), of(None), at(100));
                status = written(&status, &due);
            }
        }
        for (node, word) in &words {
            let known = ObjectStatus::read(2, &status);
            assert_eq!(known.due(node, word.as_ref(), of(None), at(200)), [], "{node}");
        }
        assert_eq!((&status["enforced"], &status["observedGeneration"]), (&json!(1), &json!(2)));
        let valid = &status["conditions"][1];
        assert_eq!((&valid["type"], &valid["status"]), (&json!("Valid"), &json!("False")));
        assert_eq!(valid["message"], "a: spec: is wrong");
        assert_eq!(valid["lastTransitionTime"], "1970-01-01T00:01:40Z");
        assert_eq!(status["nodes"].as_array().unwrap().len(), 2);
        // The time of a condition is that of its last change.
        let known = ObjectStatus::read(2, &status);
        let due = known.due("a", Some(&word(2)), of(None), at(300));
        status = written(&status, &due);
        let due = ObjectStatus::read(2, &status).due("a", Some(&word(2)), of(None), at(300));
        status = written(&status, &due);
        assert_eq!(status["conditions"][0]["lastTransitionTime"], "1970-01-01T00:01:40Z");
        assert_eq!(status["conditions"][1]["lastTransitionTime"], "1970-01-01T00:05:00Z");
        assert_eq!(status["enforced"], 2);
        // Once it concerns nobody, nobody is counted.
        for node in ["a", "b", "a"] {
            let due = ObjectStatus::read(2, &status).due(node, None, of(None), at(400));
            status = written(&status, &due);
        }
        assert_eq!((&status["enforced"], &status["nodes"]), (&json!(0), &json!([])));
    }

    #[test]
    fn what_is_valid_and_finds_no_room_is_not_in_force_and_not_invalid() {
        let word = Word { error: Some("a table is full".to_owned()), ..word(2) };
        let mut status = json!({});
        for _round in 0..2 {
            let due = ObjectStatus::read(2, &status).due("a", Some(&word), of(None), at(1));
            status = written(&status, &due);
        }
        assert_eq!(status["enforced"], 0);
        let said = |index: usize| {
            let condition = &status["conditions"][index];
            ["type", "status", "message"].map(|field| condition[field].as_str().unwrap().to_owned())
        };
        let why = "on 0 of 1 nodes that it concerns; a: a table is full";
        assert_eq!(said(0), ["Enforced", "False", why]);
        assert_eq!(said(1), ["Valid", "True", FINE]);
    }

    #[test]
    fn a_grant_that_is_over_is_in_force_nowhere_and_said_to_be_over() {
        use Phase::{Active, Expired, Pending, Revoked};
        let mut status = json!({});
        let mut say = |a: Phase, b: Phase, second: i64| {
            for (node, state) in [("a", a), ("b", b), ("a", a)] {
                let word = Word { state: Some(state), ..word(1) };
                let due =
                    ObjectStatus::read(1, &status).due(node, Some(&word), of(None), at(second));
                status = written(&status, &due);
                let known = ObjectStatus::read(1, &status);
                assert_eq!(known.nodes[node], word);
            }
            let active = status["conditions"].as_array().unwrap()[0].clone();
            assert_eq!(active["type"], "Active");
            let text = |name: &str| active[name].as_str().unwrap().to_owned();
            (text("status"), text("reason"), text("lastTransitionTime"), status["enforced"].clone())
        };
        let told = |status: &str, reason: &str, time: &str, enforced: i64| {
            (status.to_owned(), reason.to_owned(), time.to_owned(), json!(enforced))
        };
        let [first, second] = ["1970-01-01T00:00:01Z", "1970-01-01T00:00:03Z"];
        assert_eq!(say(Pending, Pending, 1), told("False", "Pending", first, 0));
        assert_eq!(say(Active, Active, 3), told("True", "Active", second, 2));
        assert_eq!(say(Expired, Active, 4), told("True", "Active", second, 1));
        let third = "1970-01-01T00:00:05Z";
        assert_eq!(say(Expired, Expired, 5), told("False", "Expired", third, 0));
        assert_eq!(say(Revoked, Expired, 6), told("False", "Expired", third, 0));
    }

    #[test]
    fn what_a_node_said_goes_with_it() {
        let now = at(100);
        let mut status = json!({});
        for node in ["a", "b", "c", "b", "c", "a"] {
            let due = ObjectStatus::read(1, &status).due(node, Some(&word(1)), of(None), now);
            status = written(&status, &due);
        }
        assert_eq!(status["enforced"], 3);
        // Not by one that is not the first of those that are left, and not by one that does not know.
        let left = BTreeSet::from(["b".to_owned(), "c".to_owned()]);
        let due = |status: &Value, node: &str, cluster| {
            ObjectStatus::read(1, status).due(node, Some(&word(1)), of(cluster), now)
        };
        assert_eq!(due(&status, "c", Some(&left)), []);
        assert_eq!(due(&status, "b", None), []);
        status = written(&status, &due(&status, "b", Some(&left)));
        let entry = |name| json!({"name": name, "generation": 1});
        assert_eq!(
            (&status["nodes"], &status["enforced"]),
            (&json!([entry("b"), entry("c")]), &json!(2))
        );
        assert_eq!(due(&status, "b", Some(&left)), []);
        // One that the cluster is not yet said to have does not take away what it says itself.
        let due =
            ObjectStatus::read(1, &status).due("b", Some(&word(1)), of(Some(&[].into())), now);
        let managers: Vec<_> = due.iter().map(|(manager, _)| manager.clone()).collect();
        assert_eq!(managers, [manager("c"), SUMMARY.to_owned()]);
        // When all have gone, another says so.
        let other = BTreeSet::from(["d".to_owned(), "e".to_owned()]);
        let due =
            |node: &str| ObjectStatus::read(1, &status).due(node, None, of(Some(&other)), at(200));
        assert_eq!(due("e"), []);
        // But by one that sees it: of a namespace that may be none of them.
        let concerned = Nodes { cluster: Some(&other), watch: Watchers::Concerned };
        assert_ne!(ObjectStatus::read(1, &status).due("e", None, concerned, at(200)), []);
        status = written(&status, &due("d"));
        assert_eq!((&status["enforced"], &status["nodes"]), (&json!(0), &json!([])));
    }

    #[test]
    fn nothing_is_said_of_what_concerns_nobody() {
        let status = ObjectStatus::read(1, &Value::Null);
        assert_eq!(status.due("a", None, of(None), at(1)), []);
        let long = "x".repeat(300);
        assert!(manager(&long).len() <= 128 && manager(&long) != manager("y"));
    }
}
