//! The words behind the kernel's numbers.
//!
//! Shared by the engine, which gives numbers out, and the witness, which reads records: a number
//! keeps its word for a while after nothing has it any more, so that a record that waited in a ring is
//! still told rightly after a change. No number is given out twice. Locked for single look-ups only.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use agentguard_common::{GrantId, IdentityId, ScopeId, WorkloadId};
use serde::{Deserialize, Serialize};

use crate::audit::record;
use crate::audit::text::Text;
use crate::identity::container::PodName;

/// How many numbers a restart leaves out, beyond those that it knows to be given out: what was given out
/// just before a daemon died is not written down, and the kernel or a record may remember it.
pub(super) const NUMBERS_AHEAD: u32 = 1024;

/// From how many words on, or workloads that are gone, those without a use are forgotten although records
/// that name them may wait: while the log can not be written nothing else bounds them.
const MOST_KEPT: usize = 65_536;
/// Rounds of the witness after which all is told that was in the rings when they were counted: one was
/// going on then.
const WHOLE_ROUNDS: u64 = 2;

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
    /// Those that are gone, since when and after how many rounds of the witness.
    gone: VecDeque<(WorkloadId, Instant, u64)>,
    /// After how many rounds it was last asked which words have no use.
    asked: u64,
}

impl Words {
    fn count(&self) -> usize {
        [&self.identities, &self.scopes, &self.grants].map(|kind| kind.words.len()).iter().sum()
    }
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
pub struct Names {
    words: RwLock<Words>,
    /// How often the witness has found nothing in the rings that was not written.
    rounds: AtomicU64,
}

impl Names {
    #[must_use]
    pub fn restore(saved: SavedNames) -> Self {
        let SavedNames { identities, scopes, grants } = saved;
        let words = Words {
            identities: identities.restored(),
            scopes: scopes.restored(),
            grants: grants.restored(),
            ..Words::default()
        };
        Self { words: RwLock::new(words), rounds: AtomicU64::new(0) }
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

    /// Notes that whatever was in the rings lately is written.
    pub fn note_all_told(&self) {
        self.rounds.fetch_add(1, Ordering::AcqRel);
    }

    fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Acquire)
    }

    /// Forgets the words that nothing has any more, the second time that this finds them so, and all that
    /// was in the rings the first time is written: until then a record may have their numbers. Whether
    /// there was one.
    pub fn forget_unused(
        &self,
        is_identity: impl Fn(&str) -> bool,
        is_scope: impl Fn(&str) -> bool,
        is_grant: impl Fn(&str) -> bool,
    ) -> bool {
        let rounds = self.rounds();
        let mut words = self.write();
        if rounds < words.asked + WHOLE_ROUNDS && words.count() < MOST_KEPT {
            return false;
        }
        words.asked = rounds;
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

    /// Notes that a workload is gone. Its name is kept for its last records.
    pub fn workload_is_gone(&self, id: WorkloadId) {
        let rounds = self.rounds();
        self.write().gone.push_back((id, Instant::now(), rounds));
    }

    /// Forgets the workloads that are gone since `grace` at least and whose last records are written. Some
    /// of those may have been put in a ring a moment after the end.
    pub fn forget_gone(&self, grace: Duration) {
        let rounds = self.rounds();
        let mut words = self.write();
        while let Some((id, since, before)) = words.gone.front().copied() {
            let is_told = since.elapsed() >= grace && rounds >= before + WHOLE_ROUNDS;
            if !is_told && words.gone.len() <= MOST_KEPT {
                break;
            }
            words.gone.pop_front();
            words.workloads.remove(&id);
        }
    }

    #[must_use]
    pub fn workload(&self, id: WorkloadId) -> Option<WorkloadName> {
        self.read().workloads.get(&id).cloned()
    }

    // A thread that panicked while it held the lock left whole words: each change is one insert.
    fn read(&self) -> RwLockReadGuard<'_, Words> {
        self.words.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Words> {
        self.words.write().unwrap_or_else(PoisonError::into_inner)
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
            names.note_all_told();
            names.note_all_told();
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

    #[test]
    fn nothing_is_forgotten_before_the_records_that_name_it_are_written() {
        let (gone, name) = (WorkloadId(7), || WorkloadName {
            name: "gone".to_owned(),
            cgroup: "/gone".to_owned(),
            unit: None,
            pod: None,
            containers: BTreeMap::new(),
        });
        let names = Names::default();
        let grant = names.grant("a");
        names.name_workload(gone, name());
        names.workload_is_gone(gone);
        let forget = || {
            names.forget_gone(Duration::ZERO);
            names.forget_unused(|_| false, |_| false, |_| false);
        };
        // However often it is asked while records wait; a round that goes on already may have read on.
        for _ in 0..4 {
            forget();
            assert!(names.workload(gone).is_some() && names.grant_word(grant).is_some());
        }
        names.note_all_told();
        forget();
        assert!(names.workload(gone).is_some() && names.grant_word(grant).is_some());
        names.note_all_told();
        forget();
        assert_eq!(names.workload(gone), None);
        // Only now is it known to be unused.
        assert_eq!(names.grant_word(grant).as_deref(), Some("a"));
        names.note_all_told();
        names.note_all_told();
        forget();
        assert_eq!(names.grant_word(grant), None);
        // A moment is left to it where all is written, too.
        names.name_workload(gone, name());
        names.workload_is_gone(gone);
        names.note_all_told();
        names.note_all_told();
        names.forget_gone(Duration::from_secs(3600));
        assert!(names.workload(gone).is_some());
    }

    #[test]
    fn what_is_kept_for_records_that_wait_is_bounded() {
        let names = Names::default();
        for number in 0..=MOST_KEPT as u32 {
            names.workload_is_gone(WorkloadId(number));
            names.grant(&number.to_string());
        }
        names.forget_gone(Duration::ZERO);
        assert_eq!(names.read().gone.len(), MOST_KEPT);
        assert!(!names.forget_unused(|_| true, |_| true, |_| false));
        assert!(names.forget_unused(|_| true, |_| true, |_| false));
    }
}
