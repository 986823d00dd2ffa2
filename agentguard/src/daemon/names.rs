//! The words behind the kernel's numbers.
//!
//! Shared by the engine, which gives numbers out, and the witness, which reads records: a number
//! keeps its word for a while after nothing has it any more, so that a record that waited in a ring is
//! still told rightly after a change. No number is given out twice. Locked for single look-ups only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use agentguard_common::{GrantId, IdentityId, ScopeId, WorkloadId};
use serde::{Deserialize, Serialize};

use crate::audit::record;
use crate::audit::text::Text;
use crate::identity::container::PodName;

/// How many numbers a restart leaves out, beyond those that it knows to be given out: what was given out
/// just before a daemon died is not written down, and the kernel or a record may remember it.
pub(super) const NUMBERS_AHEAD: u32 = 1024;

/// Words by number, from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "SavedNumbered", into = "SavedNumbered")]
struct Numbered {
    /// The number given out last.
    last: u32,
    words: BTreeMap<u32, String>,
    numbers: HashMap<String, u32>,
    /// Those that had no use when this was last asked.
    unused: BTreeSet<u32>,
}

/// The same, as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum SavedNumbered {
    Kept {
        last: u32,
        words: Vec<(u32, String)>,
    },
    /// Of version 0.1.0, which forgot nothing.
    All(Vec<String>),
}

impl Numbered {
    /// As the next daemon goes on with it.
    fn restored(self) -> Self {
        Self { last: self.last.saturating_add(NUMBERS_AHEAD), ..self }
    }

    fn number(&mut self, word: &str) -> u32 {
        if let Some(number) = self.numbers.get(word) {
            return *number;
        }
        // More words than there are numbers do not fit into a life.
        self.last = self.last.saturating_add(1);
        self.words.insert(self.last, word.to_owned());
        self.numbers.insert(word.to_owned(), self.last);
        self.last
    }

    fn word(&self, number: u32) -> Option<String> {
        self.words.get(&number).cloned()
    }

    /// Forgets every word that was in no use the last time and is in none now. Whether there was
    /// one.
    fn forget_unused(&mut self, is_used: impl Fn(&str) -> bool) -> bool {
        let unused: BTreeSet<u32> = self
            .words
            .iter()
            .filter(|(_, word)| !is_used(word))
            .map(|(number, _)| *number)
            .collect();
        let (forgotten, waiting) =
            unused.into_iter().partition(|number| self.unused.contains(number));
        self.unused = waiting;
        let forgotten: BTreeSet<u32> = forgotten;
        for number in &forgotten {
            if let Some(word) = self.words.remove(number) {
                self.numbers.remove(&word);
            }
        }
        !forgotten.is_empty()
    }
}

impl From<SavedNumbered> for Numbered {
    fn from(saved: SavedNumbered) -> Self {
        let (last, words): (u32, BTreeMap<u32, String>) = match saved {
            SavedNumbered::Kept { last, words } => (last, words.into_iter().collect()),
            SavedNumbered::All(words) => {
                let words: BTreeMap<u32, String> = (1..).zip(words).collect();
                (words.keys().next_back().copied().unwrap_or(0), words)
            }
        };
        let numbers = words.iter().map(|(number, word)| (word.clone(), *number)).collect();
        Self { last, words, numbers, unused: BTreeSet::new() }
    }
}

impl From<Numbered> for SavedNumbered {
    fn from(numbered: Numbered) -> Self {
        Self::Kept { last: numbered.last, words: numbered.words.into_iter().collect() }
    }
}

/// How records name a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadName {
    pub name: String,
    /// Below the cgroup root, with a leading slash.
    pub cgroup: String,
    pub unit: Option<String>,
    pub pod: Option<PodName>,
    /// Containers in it, by their cgroups' numbers.
    pub containers: BTreeMap<u64, ContainerName>,
}

/// How records name a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerName {
    pub id: String,
    pub name: String,
}

/// A container, as records have it.
#[must_use]
pub fn container_record(container: &ContainerName) -> record::Container {
    let ContainerName { id, name } = container;
    record::Container { id: Text::new(id), name: Some(Text::new(name)), image: None }
}

/// A pod, as records have it.
#[must_use]
pub fn pod_record(pod: &PodName) -> record::Pod {
    let PodName { namespace, name, uid } = pod;
    record::Pod { namespace: Text::new(namespace), name: Text::new(name), uid: Text::new(uid) }
}

#[derive(Debug, Default)]
struct Words {
    identities: Numbered,
    scopes: Numbered,
    grants: Numbered,
    workloads: HashMap<WorkloadId, WorkloadName>,
}

/// What survives a restart: a record may still be in a ring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedNames {
    identities: Numbered,
    scopes: Numbered,
    grants: Numbered,
}

/// The words behind the numbers.
#[derive(Debug, Default)]
pub struct Names(RwLock<Words>);

impl Names {
    #[must_use]
    pub fn restore(saved: SavedNames) -> Self {
        let SavedNames { identities, scopes, grants } = saved;
        Self(RwLock::new(Words {
            identities: identities.restored(),
            scopes: scopes.restored(),
            grants: grants.restored(),
            workloads: HashMap::new(),
        }))
    }

    #[must_use]
    pub fn save(&self) -> SavedNames {
        let words = self.read();
        SavedNames {
            identities: words.identities.clone(),
            scopes: words.scopes.clone(),
            grants: words.grants.clone(),
        }
    }

    pub fn identity(&self, word: &str) -> IdentityId {
        IdentityId(self.write().identities.number(word))
    }

    pub fn scope(&self, word: &str) -> ScopeId {
        ScopeId(self.write().scopes.number(word))
    }

    pub fn grant(&self, word: &str) -> GrantId {
        GrantId(self.write().grants.number(word))
    }

    #[must_use]
    pub fn identity_word(&self, number: IdentityId) -> Option<String> {
        self.read().identities.word(number.0)
    }

    #[must_use]
    pub fn scope_word(&self, number: ScopeId) -> Option<String> {
        self.read().scopes.word(number.0)
    }

    #[must_use]
    pub fn grant_word(&self, number: GrantId) -> Option<String> {
        self.read().grants.word(number.0)
    }

    /// Forgets the words that nothing has any more, the second time that this finds them so: until
    /// then a record in a ring may have their numbers. Whether there was one.
    pub fn forget_unused(
        &self,
        is_identity: impl Fn(&str) -> bool,
        is_scope: impl Fn(&str) -> bool,
        is_grant: impl Fn(&str) -> bool,
    ) -> bool {
        let mut words = self.write();
        let identities = words.identities.forget_unused(is_identity);
        let scopes = words.scopes.forget_unused(is_scope);
        let grants = words.grants.forget_unused(is_grant);
        identities || scopes || grants
    }

    pub fn name_workload(&self, id: WorkloadId, name: WorkloadName) {
        self.write().workloads.insert(id, name);
    }

    /// Names the containers of a workload. Those that it had before this keep their names once more:
    /// their last records may still be in a ring.
    pub fn name_containers(
        &self,
        id: WorkloadId,
        before: impl IntoIterator<Item = (u64, ContainerName)>,
        now: impl IntoIterator<Item = (u64, ContainerName)>,
    ) {
        if let Some(workload) = self.write().workloads.get_mut(&id) {
            workload.containers = before.into_iter().chain(now).collect();
        }
    }

    /// To be called a while after the workload is gone, when its last records are written.
    pub fn forget_workload(&self, id: WorkloadId) {
        self.write().workloads.remove(&id);
    }

    #[must_use]
    pub fn workload(&self, id: WorkloadId) -> Option<WorkloadName> {
        self.read().workloads.get(&id).cloned()
    }

    // A thread that panicked while it held the lock left whole words: each change is one insert.
    fn read(&self) -> RwLockReadGuard<'_, Words> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Words> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_keeps_its_number_and_numbers_begin_at_one() {
        let names = Names::default();
        let first = names.scope("a");
        assert_eq!(first, ScopeId(1));
        assert_eq!(names.scope("b"), ScopeId(2));
        assert_eq!(names.scope("a"), first);
        assert_eq!(names.scope_word(ScopeId(2)).as_deref(), Some("b"));
        assert_eq!(names.scope_word(ScopeId::NONE), None);
        assert_eq!(names.scope_word(ScopeId(3)), None);
    }

    #[test]
    fn numbers_survive_a_restart() {
        let names = Names::default();
        names.grant("a");
        names.grant("b");
        let saved = serde_json::to_string(&names.save()).unwrap();
        let names = Names::restore(serde_json::from_str(&saved).unwrap());
        assert_eq!(names.grant("b"), GrantId(2));
        // What had the third was not written down.
        assert_eq!(names.grant("c"), GrantId(2 + NUMBERS_AHEAD + 1));
        // As version 0.1.0 wrote them.
        let old = r#"{"identities":["i"],"scopes":[],"grants":["a","b"]}"#;
        let names = Names::restore(serde_json::from_str(old).unwrap());
        assert_eq!(names.grant("b"), GrantId(2));
        assert_eq!(names.grant("c"), GrantId(2 + NUMBERS_AHEAD + 1));
        assert_eq!(names.identity_word(IdentityId(1)).as_deref(), Some("i"));
    }

    #[test]
    fn what_is_not_used_is_forgotten_the_second_time_and_its_number_never_used_again() {
        let names = Names::default();
        for word in ["a", "b", "c"] {
            names.grant(word);
        }
        let forget = |used: &'static [&'static str]| {
            names.forget_unused(|_| true, |_| true, |word| used.contains(&word))
        };
        assert!(!forget(&["a"]));
        // One that is used again meanwhile stays.
        assert!(forget(&["a", "b"]));
        assert_eq!(names.grant_word(GrantId(3)), None);
        assert_eq!(names.grant("b"), GrantId(2));
        assert_eq!(names.grant("c"), GrantId(4));
        assert!(!forget(&["a", "b"]) && forget(&["a", "b"]));
        let saved = serde_json::to_string(&names.save()).unwrap();
        let names = Names::restore(serde_json::from_str(&saved).unwrap());
        assert_eq!(names.grant("d"), GrantId(4 + NUMBERS_AHEAD + 1));
    }
}
