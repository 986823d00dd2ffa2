//! The words behind the kernel's numbers.
//!
//! Shared by the engine, which gives numbers out, and the witness, which reads records: a number
//! keeps its word for as long as the daemon lives, so that a record that waited in a ring is still
//! told rightly after a change. Locked for single look-ups only.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use agentguard_common::{GrantId, IdentityId, ScopeId, WorkloadId};
use serde::{Deserialize, Serialize};

/// Words by number, from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Numbered {
    words: Vec<String>,
    #[serde(skip)]
    numbers: HashMap<String, u32>,
}

impl Numbered {
    fn number(&mut self, word: &str) -> u32 {
        if self.numbers.len() != self.words.len() {
            let known = self.words.iter().enumerate();
            self.numbers = known.map(|(index, word)| (word.clone(), number_at(index))).collect();
        }
        if let Some(number) = self.numbers.get(word) {
            return *number;
        }
        self.words.push(word.to_owned());
        let number = number_at(self.words.len() - 1);
        self.numbers.insert(word.to_owned(), number);
        number
    }

    fn word(&self, number: u32) -> Option<String> {
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        self.words.get(index).cloned()
    }
}

fn number_at(index: usize) -> u32 {
    // More words than that do not fit into memory.
    u32::try_from(index + 1).unwrap_or(u32::MAX)
}

/// How records name a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadName {
    pub name: String,
    /// Below the cgroup root, with a leading slash.
    pub cgroup: String,
    pub unit: Option<String>,
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
        Self(RwLock::new(Words { identities, scopes, grants, workloads: HashMap::new() }))
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

    pub fn name_workload(&self, id: WorkloadId, name: WorkloadName) {
        self.write().workloads.insert(id, name);
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
        assert_eq!(names.grant("c"), GrantId(3));
    }
}
