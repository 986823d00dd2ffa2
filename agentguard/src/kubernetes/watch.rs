//! One kind of objects, followed for as long as the daemon runs.
//!
//! What is kept of each object is made as it arrives, so that a list of many is never held whole.
//! While a new list is read, and while the API server can not be reached, what was known stays.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use backon::ExponentialBackoff;
use futures_util::StreamExt as _;
use kube::api::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;

use crate::retry;
use crate::scope::cluster::ObjectName;

/// How long one watch lasts before it is begun anew: a connection that died in silence is found
/// after this time.
pub const WATCH_SECONDS: u32 = 60;
/// How many objects of a list are asked for at once.
const PAGE: u32 = 250;
/// The first and the longest pause before the API server is asked again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// What happened to the objects of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen<V> {
    /// All there are; what is not among them is gone.
    Whole(BTreeMap<ObjectName, V>),
    Put(ObjectName, V),
    Gone(ObjectName),
    /// The API server did not answer, or refused; it is asked again.
    Lost(String),
}

/// What a watch is asked for.
#[must_use]
pub fn everything() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE)
}

/// Tells `sink` of every object of a kind, as what `keep` makes of it; one of which it keeps nothing
/// counts as gone. Ends never.
pub async fn follow<K, V>(
    api: Api<K>,
    config: watcher::Config,
    keep: impl Fn(&K) -> Option<V>,
    mut sink: impl FnMut(Seen<V>),
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut events = std::pin::pin!(watcher(api, config).backoff(Retry::default()));
    let mut coming = BTreeMap::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => coming.clear(),
            Ok(Event::InitApply(object)) => {
                if let Some(kept) = keep(&object) {
                    coming.insert(name_of(&object), kept);
                }
            }
            Ok(Event::InitDone) => sink(Seen::Whole(std::mem::take(&mut coming))),
            Ok(Event::Apply(object)) => {
                let name = name_of(&object);
                sink(keep(&object).map_or(Seen::Gone(name.clone()), |kept| Seen::Put(name, kept)));
            }
            Ok(Event::Delete(object)) => sink(Seen::Gone(name_of(&object))),
            Err(error) => sink(Seen::Lost(error.to_string())),
        }
    }
}

/// A cluster-scoped object has no namespace.
pub(super) fn name_of<K: Resource>(object: &K) -> ObjectName {
    ObjectName { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
}

/// Pauses that grow, each of random length, so that nodes do not come back all at once.
pub(super) struct Retry(ExponentialBackoff);

impl Retry {
    fn pauses() -> ExponentialBackoff {
        retry::pauses(PAUSES.0, PAUSES.1)
    }

    /// The next pause.
    pub(super) fn pause(&mut self) -> Duration {
        // There is always one; without, the longest.
        self.0.next().unwrap_or(PAUSES.1)
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self(Self::pauses())
    }
}

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.pause())
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        self.0 = Self::pauses();
    }
}

/// How long the API server is taken for lost after its last failure. A watch that goes on where it
/// was says nothing by itself, and one that does not fails again before this.
const LOST: Duration = Duration::from_secs(30);

/// What can not be watched at present.
#[derive(Debug)]
pub(super) struct Lost<P>(BTreeMap<P, (String, Instant)>);

impl<P: Ord> Lost<P> {
    /// Takes note of a failure; whether it is the first of an outage.
    pub(super) fn note(&mut self, part: P, error: String) -> bool {
        let before = self.0.insert(part, (error, Instant::now()));
        before.is_none_or(|(_, since)| since.elapsed() >= LOST)
    }

    /// Takes note of an answer; whether it ended an outage.
    pub(super) fn answered(&mut self, part: &P) -> bool {
        self.0.remove(part).is_some_and(|(_, since)| since.elapsed() < LOST)
    }

    /// Each part that is lost, with the last failure.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&P, &str)> {
        let lost = self.0.iter().filter(|(_, (_, since))| since.elapsed() < LOST);
        lost.map(|(part, (error, _))| (part, error.as_str()))
    }
}

impl<P> Default for Lost<P> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}
