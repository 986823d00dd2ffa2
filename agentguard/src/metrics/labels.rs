//! Which workload identities get a label of their own.
//!
//! The first so many do, the rest share one. Must not know metrics.

use std::collections::{HashMap, HashSet};

/// The label of identities that have none of their own. No SPIFFE ID reads like this.
pub(super) const OTHER: &str = "other";

/// Hands out labels.
pub(super) struct IdentityLabels {
    max: usize,
    /// Every identity, and whether its name is its label.
    known: HashMap<String, bool>,
    labelled: usize,
}

impl IdentityLabels {
    pub(super) fn new(max: usize) -> Self {
        Self { max, known: HashMap::new(), labelled: 0 }
    }

    /// The label of an identity: its name while there is room, else [`OTHER`].
    pub(super) fn label<'a>(&mut self, identity: &'a str) -> &'a str {
        let room = self.labelled < self.max;
        let labelled = match self.known.get_mut(identity) {
            Some(labelled) => labelled,
            None => self.known.entry(identity.to_owned()).or_insert(false),
        };
        if !*labelled && room {
            *labelled = true;
            self.labelled += 1;
        }
        if *labelled { identity } else { OTHER }
    }

    /// The label of an identity as it was given out; it does not get one by this.
    pub(super) fn known<'a>(&self, identity: &'a str) -> &'a str {
        if self.known.get(identity).is_some_and(|labelled| *labelled) { identity } else { OTHER }
    }

    /// Forgets all identities but `present`; says which were forgotten, with the label of those
    /// that had one of their own.
    pub(super) fn retain<'a>(
        &mut self,
        present: impl Iterator<Item = &'a str>,
    ) -> Vec<(String, Option<String>)> {
        let present: HashSet<&str> = present.collect();
        let gone: Vec<(String, Option<String>)> = self
            .known
            .extract_if(|identity, _| !present.contains(identity.as_str()))
            .map(|(identity, labelled)| {
                let label = labelled.then(|| identity.clone());
                (identity, label)
            })
            .collect();
        self.labelled -= gone.iter().filter(|(_, label)| label.is_some()).count();
        gone
    }

    /// How many identities share [`OTHER`].
    pub(super) fn unlabelled(&self) -> usize {
        self.known.len() - self.labelled
    }
}
