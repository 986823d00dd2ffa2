//! The numbers of the names of unix sockets that scopes mention.
//!
//! A name has one number for as long as the kernel's table holds it, and a number is never another
//! name's. Pure bookkeeping: who writes the kernel's table tells what was written. A value of one
//! owner, not shared.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use agentguard_common::UnixNameId;
use agentguard_common::allowlist::UnixName;

/// What the kernel's table holds, and the next number.
#[derive(Debug)]
pub struct UnixNames {
    names: BTreeMap<UnixName, Named>,
    next: UnixNameId,
}

#[derive(Clone, Copy, Debug)]
struct Named {
    number: UnixNameId,
    /// Since when no scope mentions the name.
    unmentioned: Option<Instant>,
}

impl UnixNames {
    /// Takes up what the kernel's table holds; numbers up to `highest` are in use.
    #[must_use]
    pub fn adopt(rows: Vec<(UnixName, UnixNameId)>, highest: UnixNameId) -> Self {
        let now = Instant::now();
        let names = rows
            .into_iter()
            .map(|(name, number)| (name, Named { number, unmentioned: Some(now) }))
            .collect();
        Self { names, next: UnixNameId(highest.0.saturating_add(1)) }
    }

    /// The number that the next new name has.
    #[must_use]
    pub const fn next(&self) -> UnixNameId {
        self.next
    }

    /// Gives out no number below `next` any more.
    pub fn begin_at(&mut self, next: UnixNameId) {
        self.next = self.next.max(next);
    }

    /// The number of a name, if the kernel knows it.
    #[must_use]
    pub fn number(&self, name: &UnixName) -> Option<UnixNameId> {
        self.names.get(name).map(|named| named.number)
    }

    /// Notes which names scopes mention now. Returns those that have no number yet.
    pub fn mention(&mut self, wanted: &BTreeSet<UnixName>) -> Vec<UnixName> {
        let now = Instant::now();
        for (name, named) in &mut self.names {
            if wanted.contains(name) {
                named.unmentioned = None;
            } else {
                named.unmentioned.get_or_insert(now);
            }
        }
        wanted.iter().filter(|name| !self.names.contains_key(*name)).copied().collect()
    }

    /// Notes that the kernel's table holds `name` under the next number.
    pub fn named(&mut self, name: UnixName) {
        self.names.insert(name, Named { number: self.next, unmentioned: None });
        self.next.0 = self.next.0.saturating_add(1);
    }

    /// Names that no scope has mentioned for `grace`.
    #[must_use]
    pub fn unmentioned(&self, grace: Duration) -> Vec<(UnixName, UnixNameId)> {
        let is_over = |named: &Named| named.unmentioned.is_some_and(|at| at.elapsed() >= grace);
        let over = self.names.iter().filter(|(_, named)| is_over(named));
        over.map(|(name, named)| (*name, named.number)).collect()
    }

    /// Notes that the kernel's table holds `name` no more. Its number stays used.
    pub fn forget(&mut self, name: &UnixName) {
        self.names.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> UnixName {
        UnixName::path(text.as_bytes()).unwrap()
    }

    fn mention(names: &mut UnixNames, texts: &[&str]) {
        for new in names.mention(&texts.iter().map(|text| name(text)).collect()) {
            names.named(new);
        }
    }

    #[test]
    fn a_number_is_never_given_to_another_name() {
        let mut names = UnixNames::adopt(vec![(name("kept"), UnixNameId(4))], UnixNameId(6));
        mention(&mut names, &["a", "kept"]);
        assert_eq!(names.number(&name("kept")), Some(UnixNameId(4)));
        assert_eq!(names.number(&name("a")), Some(UnixNameId(7)));
        mention(&mut names, &["kept"]);
        assert_eq!(names.unmentioned(Duration::ZERO), [(name("a"), UnixNameId(7))]);
        names.forget(&name("a"));
        assert_eq!(names.number(&name("a")), None);
        mention(&mut names, &["b", "a"]);
        assert_eq!(names.number(&name("a")), Some(UnixNameId(8)));
        assert_eq!(names.number(&name("b")), Some(UnixNameId(9)));
        assert_eq!(names.next(), UnixNameId(10));
        names.begin_at(UnixNameId(20));
        names.begin_at(UnixNameId(3));
        assert_eq!(names.next(), UnixNameId(20));
    }

    #[test]
    fn a_name_is_kept_while_a_scope_mentions_it_and_a_while_longer() {
        let mut names = UnixNames::adopt(vec![(name("a"), UnixNameId(1))], UnixNameId(1));
        assert_eq!(names.unmentioned(Duration::from_secs(60)), []);
        assert_eq!(names.unmentioned(Duration::ZERO).len(), 1);
        mention(&mut names, &["a"]);
        assert_eq!(names.unmentioned(Duration::ZERO), []);
    }

    #[test]
    fn a_path_and_an_abstract_name_of_the_same_bytes_are_two_names() {
        let mut names = UnixNames::adopt(Vec::new(), UnixNameId::NONE);
        let (path, abstract_name) = (name("a"), UnixName::abstract_name(b"a").unwrap());
        for new in names.mention(&BTreeSet::from([path, abstract_name])) {
            names.named(new);
        }
        assert_ne!(names.number(&path), names.number(&abstract_name));
    }
}
