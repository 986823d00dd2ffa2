//! What several watches fill together, and one reader takes: whole, and only when it has changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::watch::{LeftOut, Lost, Seen};
use crate::scope::cluster::ObjectName;

/// A kind of objects that one of the watches sees.
pub(super) trait Part: Copy + Ord + 'static {
    const ALL: &'static [Self];

    /// In the plural, as sentences have it.
    fn as_str(self) -> &'static str;

    /// What becomes of those for which there is no room.
    fn without_room(self) -> &'static str;
}

/// What is known, as it is being filled.
#[derive(Debug)]
pub(super) struct Filled<P, K> {
    state: Mutex<State<P, K>>,
    changed: Notify,
}

#[derive(Debug)]
struct State<P, K> {
    known: K,
    listed: BTreeSet<P>,
    lost: Lost<P>,
    left_out: BTreeMap<P, LeftOut>,
    /// Whether it has changed since it was last taken.
    fresh: bool,
}

/// What becomes of what is known.
pub(super) enum Change<V> {
    All(BTreeMap<ObjectName, V>),
    Put(ObjectName, V),
    Gone(ObjectName),
}

impl<P: Part, K: Clone> Filled<P, K> {
    /// What is known and what was left out of it, if every part has been listed and something has
    /// changed since this was last asked.
    pub(super) fn take(&self) -> Option<(K, Vec<LeftOut>)> {
        let mut state = self.state();
        if state.listed.len() < P::ALL.len() || !std::mem::take(&mut state.fresh) {
            return None;
        }
        Some((state.known.clone(), state.left_out.values().cloned().collect()))
    }

    /// How many objects were left out.
    pub(super) fn left_out(&self) -> u64 {
        self.state().left_out.values().map(|left_out| left_out.count).sum()
    }

    /// Waits until [`Self::take`] may have something.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Whether something of a part was left out.
    pub(super) fn is_short_of(&self, part: P) -> bool {
        self.state().left_out.contains_key(&part)
    }

    /// What can not be watched at present, and what there is no room for, one sentence each.
    pub(super) fn problems(&self) -> Vec<String> {
        let state = self.state();
        let lost = state.lost.iter();
        let lost = lost
            .map(|(part, error)| format!("{} are as they were last known: {error}", part.as_str()));
        let left_out = state.left_out.iter();
        let left_out = left_out
            .filter_map(|(part, left_out)| left_out.told(part.as_str(), part.without_room()));
        lost.chain(left_out).collect()
    }

    /// Takes what was seen of a part. `change` says whether that changed anything: most changes of
    /// an object are of its status, of which nothing is kept.
    pub(super) fn see<V>(
        &self,
        part: P,
        seen: Seen<V>,
        change: impl FnOnce(&mut K, Change<V>) -> bool,
    ) {
        let mut state = self.state();
        let State { known, listed, lost, left_out, fresh } = &mut *state;
        let has_changed = match seen {
            Seen::Lost(loss) => {
                let error = loss.error.clone();
                if lost.note(part, loss) {
                    tracing::warn!(
                        error,
                        what = part.as_str(),
                        "the API server does not answer; what was known stays"
                    );
                }
                return;
            }
            Seen::Whole(all, without) => {
                change(known, Change::All(all))
                    | listed.insert(part)
                    | without.note(left_out, part, part.as_str(), part.without_room())
            }
            Seen::Put(name, kept) => change(known, Change::Put(name, kept)),
            Seen::Gone(name) => change(known, Change::Gone(name)),
            Seen::NoRoom(name, without) => {
                change(known, Change::Gone(name))
                    | without.note(left_out, part, part.as_str(), part.without_room())
            }
        };
        if lost.answered(&part) {
            tracing::info!(what = part.as_str(), "the API server answers again");
        }
        if has_changed {
            *fresh = true;
            drop(state);
            self.changed.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State<P, K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<P: Ord, K: Default> Default for Filled<P, K> {
    fn default() -> Self {
        let state = State {
            known: K::default(),
            listed: BTreeSet::new(),
            lost: Lost::default(),
            left_out: BTreeMap::new(),
            fresh: false,
        };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }
}

/// Changes a map by the names its keys are made of; whether it is another one then.
pub(super) fn change_map<N: Ord, V: PartialEq>(
    map: &mut BTreeMap<N, V>,
    change: Change<V>,
    key: impl Fn(ObjectName) -> N,
) -> bool {
    match change {
        Change::All(all) => {
            let all = all.into_iter().map(|(name, kept)| (key(name), kept)).collect();
            std::mem::replace(map, all) != *map
        }
        Change::Put(name, kept) => {
            let name = key(name);
            let is_same = map.get(&name) == Some(&kept);
            map.insert(name, kept);
            !is_same
        }
        Change::Gone(name) => map.remove(&key(name)).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::watch::Loss;
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Side {
        Left,
        Right,
    }

    impl Part for Side {
        const ALL: &'static [Self] = &[Self::Left, Self::Right];

        fn as_str(self) -> &'static str {
            match self {
                Self::Left => "the left ones",
                Self::Right => "the right ones",
            }
        }

        fn without_room(self) -> &'static str {
            "nothing is made of them"
        }
    }

    type Sides = [BTreeMap<String, u8>; 2];

    fn see(filled: &Filled<Side, Sides>, side: Side, seen: Seen<u8>) {
        filled.see(side, seen, |sides, change| {
            change_map(&mut sides[side as usize], change, |name| name.name)
        });
    }

    fn refused() -> Loss {
        Loss::from(&std::io::Error::other("refused"))
    }

    fn all(pairs: &[(&str, u8)]) -> Seen<u8> {
        let all = pairs.iter().map(|(name, value)| (ObjectName::new("", name), *value));
        Seen::Whole(all.collect(), LeftOut::default())
    }

    #[test]
    fn it_is_handed_out_whole_and_only_when_it_has_changed() {
        let filled = Filled::default();
        see(&filled, Side::Left, all(&[("a", 1)]));
        assert_eq!(filled.take(), None, "the other part is not known");
        see(&filled, Side::Right, all(&[]));
        assert_eq!(filled.take().unwrap().0[0].len(), 1);
        let name = |name| ObjectName::new("", name);
        for (seen, changes) in [
            (all(&[("a", 1)]), false),
            (Seen::Put(name("a"), 1), false),
            (Seen::Gone(name("b")), false),
            (Seen::Lost(refused()), false),
            (Seen::Put(name("a"), 2), true),
            (Seen::Put(name("b"), 3), true),
            (Seen::Gone(name("b")), true),
            (all(&[]), true),
        ] {
            let text = format!("{seen:?}");
            see(&filled, Side::Left, seen);
            assert_eq!(filled.take().is_some(), changes, "{text}");
        }
    }

    #[test]
    fn what_is_lost_is_said_until_it_answers() {
        let filled = Filled::<Side, Sides>::default();
        see(&filled, Side::Right, Seen::Lost(refused()));
        assert_eq!(filled.problems(), ["the right ones are as they were last known: refused"]);
        see(&filled, Side::Right, all(&[]));
        assert_eq!(filled.problems(), [""; 0]);
    }
}
