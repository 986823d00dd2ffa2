//! One kind of objects, followed for as long as the daemon runs.
//!
//! What is kept of each object is made as it arrives, so that a list of many is never held whole.
//! While a new list is read, and while the API server can not be reached, what was known stays. What is
//! kept of a kind has a bound: one object that finds no room is told as left out, and takes the place of
//! none that is known.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::time::{Duration, Instant};

use backon::ExponentialBackoff;
use futures_util::StreamExt as _;
use ipnet::IpNet;
use kube::api::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::task::JoinError;

use super::{CONNECT, SILENCE};
use crate::retry;
use crate::scope::cluster::ObjectName;

/// How long one watch lasts before it is begun anew: a connection that died in silence is found
/// after this time.
pub const WATCH_SECONDS: u32 = 60;
/// How many objects of a list are asked for at once.
const PAGE: u32 = 250;
/// How long what was left out waits at least until all are listed anew.
const LIST_AGAIN: Duration = Duration::from_secs(300);
/// How many objects are counted at most that were left out.
const MOST_COUNTED: usize = 1 << 16;
/// How many blocks there are at most around the addresses of what was left out.
const MOST_BLOCKS: usize = 256;
/// The first and the longest pause before the API server is asked again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// What happened to the objects of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen<V> {
    /// All there are but those that were left out; what is not among them is gone.
    Whole(BTreeMap<ObjectName, V>, LeftOut),
    Put(ObjectName, V),
    Gone(ObjectName),
    /// There was no room for it as it was, or is, which counts as gone; all that is left out now.
    NoRoom(ObjectName, LeftOut),
    /// The API server did not answer, or refused; it is asked again.
    Lost(Loss),
}

/// A failure to hear from the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    pub error: String,
    /// Whether it took the request and then said nothing: it takes as long to find that out again.
    is_silence: bool,
}

impl<E: Error + 'static> From<&E> for Loss {
    fn from(error: &E) -> Self {
        Self { error: error.to_string(), is_silence: is_timeout(error) }
    }
}

fn is_timeout(error: &(dyn Error + 'static)) -> bool {
    let own = error.downcast_ref::<io::Error>();
    own.is_some_and(|own| own.kind() == io::ErrorKind::TimedOut)
        || error.source().is_some_and(is_timeout)
}

/// What is kept of an object.
pub trait Kept {
    /// About how much memory it takes beside itself, in bytes.
    fn bytes(&self) -> usize;

    /// The addresses that no block may cover by accident, also where nothing else is kept of it.
    fn reserved(&self) -> Vec<IpNet> {
        Vec::new()
    }
}

/// How much is kept of a kind of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    bytes: usize,
    /// How long what was left out waits at least until all are listed anew.
    pause: Duration,
}

impl Bound {
    /// A bound in bytes, about as the memory is that they take.
    #[must_use]
    pub const fn new(bytes: usize) -> Self {
        Self { bytes, pause: LIST_AGAIN }
    }

    #[cfg(test)]
    pub(super) const fn with_pause(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }
}

/// The objects of a kind for which there was no room since they were last listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// How many there are; of more than `MOST_COUNTED` not all are counted.
    pub count: u64,
    /// The bound, in bytes.
    bound: usize,
    /// Blocks around their addresses, not more than `MOST_BLOCKS`.
    pub reserved: BTreeSet<IpNet>,
}

impl LeftOut {
    fn new(bound: usize) -> Self {
        Self { bound, ..Self::default() }
    }

    fn reserve(&mut self, blocks: Vec<IpNet>) {
        self.reserved.extend(blocks);
        for length in (0..=128).rev() {
            if self.reserved.len() <= MOST_BLOCKS {
                break;
            }
            let blocks = std::mem::take(&mut self.reserved).into_iter();
            self.reserved = blocks.map(|block| shortened(block, length)).collect();
        }
    }

    /// Puts it in the place of what was left out before; whether that is another. Says so when it begins
    /// and when it is over.
    pub(super) fn note<P: Ord>(
        self,
        all: &mut BTreeMap<P, Self>,
        part: P,
        what: &str,
        effect: &str,
    ) -> bool {
        let told = self.told(what, effect);
        let is_left_out = told.is_some();
        let reserved = self.reserved.clone();
        let before = if is_left_out { all.insert(part, self) } else { all.remove(&part) };
        match (&before, told) {
            (None, Some(problem)) => tracing::error!("{problem}"),
            (Some(_), None) => tracing::info!("there is room for all {what} again"),
            (None, None) | (Some(_), Some(_)) => {}
        }
        let is_other = before.is_some() != is_left_out;
        is_other || before.map(|before| before.reserved).unwrap_or_default() != reserved
    }

    /// One sentence, where there are any. `effect` says what becomes of them.
    #[must_use]
    pub fn told(&self, what: &str, effect: &str) -> Option<String> {
        let Self { count, bound, reserved: _ } = self;
        (*count > 0).then(|| {
            format!(
                "{count} {what} found no room in kubernetes.max_kind_bytes ({bound}): {effect}; raise it, and the memory that the daemon may take"
            )
        })
    }
}

/// The block of this length around another one that is longer.
fn shortened(block: IpNet, length: u8) -> IpNet {
    if block.prefix_len() <= length {
        return block;
    }
    IpNet::new(block.addr(), length).map_or(block, |shorter| shorter.trunc())
}

/// What is known of a kind, by how much room it takes.
#[derive(Debug)]
struct Room {
    bound: Bound,
    /// Each object that is known.
    sizes: BTreeMap<ObjectName, usize>,
    used: usize,
    left_out: LeftOut,
    /// The names of what was left out, as hashes: most changes are of objects that were before.
    left_out_names: BTreeSet<u64>,
}

impl Room {
    fn new(bound: Bound) -> Self {
        Self {
            bound,
            sizes: BTreeMap::new(),
            used: 0,
            left_out: LeftOut::new(bound.bytes),
            left_out_names: BTreeSet::new(),
        }
    }

    /// Takes an object as it is now, in place of what it was; whether there was room.
    fn put<V: Kept>(&mut self, name: &ObjectName, kept: &V) -> bool {
        self.remove(name);
        let size = size_of_kept(name, kept);
        let has_room = self.used + size <= self.bound.bytes;
        if has_room {
            self.used += size;
            self.sizes.insert(name.clone(), size);
        } else {
            if self.left_out_names.len() < MOST_COUNTED {
                self.left_out_names.insert(hash_of(name));
            }
            self.left_out.count = self.left_out_names.len() as u64;
            self.left_out.reserve(kept.reserved());
        }
        has_room
    }

    /// Takes away an object that is known.
    fn remove(&mut self, name: &ObjectName) {
        self.used -= self.sizes.remove(name).unwrap_or_default();
    }

    /// Takes away an object that is gone; whether it was one that was left out.
    fn forget(&mut self, name: &ObjectName) -> bool {
        self.remove(name);
        let was_left_out = self.left_out_names.remove(&hash_of(name));
        self.left_out.count = self.left_out_names.len() as u64;
        was_left_out
    }

    /// The same, as it is told.
    fn gone<V>(&mut self, name: ObjectName) -> Seen<V> {
        if self.forget(&name) {
            Seen::NoRoom(name, self.left_out.clone())
        } else {
            Seen::Gone(name)
        }
    }

    /// Whether enough has gone since something was left out that a new list would find room for it.
    fn is_worth_a_list(&self) -> bool {
        self.left_out.count > 0 && self.used <= self.bound.bytes - self.bound.bytes / 8
    }
}

/// A list as it is being read.
#[derive(Debug)]
struct Coming<V> {
    all: BTreeMap<ObjectName, V>,
    room: Room,
    /// What was known before and has not come yet: room is kept for it.
    awaited: Room,
}

impl<V: Kept> Coming<V> {
    fn new(known: &Room) -> Self {
        let awaited =
            Room { sizes: known.sizes.clone(), used: known.used, ..Room::new(known.bound) };
        Self { all: BTreeMap::new(), room: Room::new(known.bound), awaited }
    }

    fn put(&mut self, name: ObjectName, kept: V) {
        self.awaited.remove(&name);
        self.room.bound.bytes = self.awaited.bound.bytes.saturating_sub(self.awaited.used);
        if self.room.put(&name, &kept) {
            self.all.insert(name, kept);
        }
    }

    /// The list, and the room that it takes.
    fn done(self) -> (BTreeMap<ObjectName, V>, Room) {
        (self.all, Room { bound: self.awaited.bound, ..self.room })
    }
}

fn hash_of(name: &ObjectName) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// About what it takes to know an object: it, its name twice, and their places in maps.
fn size_of_kept<V: Kept>(name: &ObjectName, kept: &V) -> usize {
    let of_name = size_of::<ObjectName>() + name.namespace.len() + name.name.len();
    size_of::<V>() + kept.bytes() + 2 * of_name + 64
}

/// About what texts take.
pub(super) fn bytes_of_texts<'a>(texts: impl IntoIterator<Item = &'a String>) -> usize {
    texts.into_iter().map(|text| size_of::<String>() + text.len() + 8).sum()
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
    bound: Bound,
    keep: impl Fn(&K) -> Option<V>,
    mut sink: impl FnMut(Seen<V>),
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    V: Kept,
{
    let mut known = Room::new(bound);
    loop {
        // Not all nodes at once.
        let mut pauses = retry::pauses(bound.pause, bound.pause);
        let mut pause = || tokio::time::Instant::now() + pauses.next().unwrap_or(bound.pause);
        let mut list_again = pause();
        let mut events =
            std::pin::pin!(watcher(api.clone(), config.clone()).backoff(Retry::default()));
        let mut coming = Coming::new(&Room::new(bound));
        let mut is_listing = true;
        loop {
            let event = match tokio::time::timeout_at(list_again, events.next()).await {
                Ok(Some(event)) => event,
                Ok(None) => return,
                // A list that is being read, however long it takes, is the one that is wanted.
                Err(_elapsed) if !is_listing && known.is_worth_a_list() => break,
                Err(_elapsed) => {
                    list_again = pause();
                    continue;
                }
            };
            match event {
                Ok(Event::Init) => {
                    is_listing = true;
                    coming = Coming::new(&known);
                }
                Ok(Event::InitApply(object)) => {
                    if let Some(kept) = keep(&object) {
                        coming.put(name_of(&object), kept);
                    }
                }
                Ok(Event::InitDone) => {
                    is_listing = false;
                    let list = std::mem::replace(&mut coming, Coming::new(&Room::new(bound)));
                    let (all, room) = list.done();
                    known = room;
                    sink(Seen::Whole(all, known.left_out.clone()));
                }
                Ok(Event::Apply(object)) => {
                    let name = name_of(&object);
                    sink(match keep(&object) {
                        Some(kept) if known.put(&name, &kept) => Seen::Put(name, kept),
                        Some(_) => Seen::NoRoom(name, known.left_out.clone()),
                        None => known.gone(name),
                    });
                }
                Ok(Event::Delete(object)) => sink(known.gone(name_of(&object))),
                Err(error) => sink(Seen::Lost(Loss::from(&error))),
            }
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

/// One of the watches ended. If it panicked, so does who waits for it: the rest would go on by what it said
/// last, as if nothing changed any more.
pub(super) fn ended(watch: Result<(), JoinError>) {
    if let Err(error) = watch
        && error.is_panic()
    {
        tracing::error!(%error, "a watch broke off");
        std::panic::resume_unwind(error.into_panic());
    }
}

/// How long the API server is taken for lost after its last failure. A watch that goes on where it
/// was says nothing by itself, and one that does not fails again before this.
const LOST: Duration = Duration::from_secs(30);
/// The same after a failure that was found out by waiting.
const LOST_IN_SILENCE: Duration = LOST.saturating_add(CONNECT).saturating_add(SILENCE);

/// What can not be watched at present.
#[derive(Debug)]
pub(super) struct Lost<P>(BTreeMap<P, (Loss, Instant)>);

impl<P: Ord> Lost<P> {
    /// Takes note of a failure; whether it is the first of an outage.
    pub(super) fn note(&mut self, part: P, loss: Loss) -> bool {
        let before = self.0.insert(part, (loss, Instant::now()));
        before.is_none_or(|before| !counts(&before))
    }

    /// Takes note of an answer; whether it ended an outage.
    pub(super) fn answered(&mut self, part: &P) -> bool {
        self.0.remove(part).is_some_and(|loss| counts(&loss))
    }

    /// Each part that is lost, with the last failure.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&P, &str)> {
        let lost = self.0.iter().filter(|(_, loss)| counts(loss));
        lost.map(|(part, (loss, _))| (part, loss.error.as_str()))
    }
}

/// Whether a failure is recent enough that nothing may have been heard since.
fn counts((loss, since): &(Loss, Instant)) -> bool {
    since.elapsed() < if loss.is_silence { LOST_IN_SILENCE } else { LOST }
}

impl<P> Default for Lost<P> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many bytes, at an address.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Thing(usize, u32);

    impl Kept for Thing {
        fn bytes(&self) -> usize {
            self.0
        }

        fn reserved(&self) -> Vec<IpNet> {
            vec![IpNet::from(std::net::IpAddr::from(self.1.to_be_bytes()))]
        }
    }

    const BOUND: Bound = Bound::new(10_000);

    fn name(number: usize) -> ObjectName {
        ObjectName::new("a", &format!("{number:03}"))
    }

    fn fits(room: &Room) {
        assert_eq!(room.used, room.sizes.values().sum::<usize>());
        assert!(room.used <= room.bound.bytes, "{}", room.used);
    }

    #[test]
    fn what_is_kept_never_exceeds_the_bound_and_evicts_nothing() {
        let mut room = Room::new(BOUND);
        let first: Vec<usize> = (0..100).filter(|n| room.put(&name(*n), &Thing(1000, 1))).collect();
        fits(&room);
        assert!((5..10).contains(&first.len()), "{first:?}");
        assert_eq!(first, (0..first.len()).collect::<Vec<_>>());
        assert_eq!(room.left_out.count, 100 - first.len() as u64);
        // Changing in place takes no more room; growing beyond it leaves out what grew, and only that.
        for number in &first {
            assert!(room.put(&name(*number), &Thing(1000, 2)));
        }
        assert!(!room.is_worth_a_list());
        assert!(!room.put(&name(0), &Thing(9000, 1)));
        fits(&room);
        assert_eq!(room.sizes.len(), first.len() - 1);
        // One that changes is left out once.
        let count = room.left_out.count;
        assert!(!room.put(&name(0), &Thing(9000, 1)));
        assert_eq!(room.left_out.count, count);
        assert!(!room.forget(&name(1)) && room.forget(&name(99)) && !room.forget(&name(99)));
        assert_eq!(room.left_out.count, count - 1);
        fits(&room);
        assert!(room.is_worth_a_list());
    }

    #[test]
    fn a_new_list_keeps_room_for_what_is_known() {
        let mut known = Room::new(BOUND);
        let kept: Vec<usize> =
            (50..100).filter(|n| known.put(&name(*n), &Thing(1000, 1))).collect();
        // Those that come first are new.
        let mut coming = Coming::new(&known);
        for number in 0..100 {
            coming.put(name(number), Thing(1000, 1));
        }
        let (all, room) = coming.done();
        fits(&room);
        assert_eq!(room.bound, BOUND);
        assert_eq!(room.left_out.count, 100 - all.len() as u64);
        for number in kept {
            assert!(all.contains_key(&name(number)), "{number}");
        }
    }

    #[test]
    fn the_addresses_of_what_is_left_out_stay_reserved_in_few_blocks() {
        let mut left_out = LeftOut::new(1);
        let addresses: Vec<u32> = (0..5000).map(|n| 0x0a00_0000 + n * 257).collect();
        for address in &addresses {
            left_out.reserve(Thing(0, *address).reserved());
        }
        left_out.reserve(vec!["2001:db8::1/128".parse().unwrap()]);
        assert!(left_out.reserved.len() <= MOST_BLOCKS, "{}", left_out.reserved.len());
        for address in addresses {
            let address = std::net::IpAddr::from(address.to_be_bytes());
            assert!(left_out.reserved.iter().any(|block| block.contains(&address)), "{address}");
        }
        let six: std::net::IpAddr = "2001:db8::1".parse().unwrap();
        assert!(left_out.reserved.iter().any(|block| block.contains(&six)));
        assert!(left_out.reserved.iter().all(|block| block.prefix_len() >= 16));
        assert_eq!(LeftOut::new(1).told("pods", "nothing"), None);
    }

    /// A failure is told until the next one of its kind would have come.
    #[test]
    fn who_takes_connections_and_says_nothing_is_lost_for_as_long_as_it_takes_to_see() {
        let now = Instant::now();
        let ago = |seconds| now.checked_sub(Duration::from_secs(seconds)).unwrap();
        let loss = |is_silence| Loss { error: String::new(), is_silence };
        let next = SILENCE + CONNECT + PAUSES.1;
        assert!(counts(&(loss(true), now.checked_sub(next).unwrap())));
        assert!(!counts(&(loss(true), ago(3600))));
        assert!(counts(&(loss(false), now.checked_sub(CONNECT + PAUSES.1).unwrap())));
        assert!(!counts(&(loss(false), ago(31))));
    }

    #[tokio::test]
    async fn silence_is_told_from_a_refusal() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let lose = async || {
            let mut config = kube::Config::new(format!("http://{address}").parse().unwrap());
            config.read_timeout = Some(Duration::from_millis(200));
            let client = kube::Client::try_from(config).unwrap();
            let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::all(client);
            let mut events = std::pin::pin!(watcher(pods, everything()).backoff(Retry::default()));
            loop {
                if let Some(Err(error)) = events.next().await {
                    return Loss::from(&error);
                }
            }
        };
        // Takes connections, by its queue, and never answers.
        let silence = lose().await;
        assert!(silence.is_silence, "{silence:?}");
        drop(listener);
        let refusal = lose().await;
        assert!(!refusal.is_silence, "{refusal:?}");
    }

    #[tokio::test]
    #[should_panic(expected = "of a watch")]
    async fn who_waits_for_a_watch_that_panics_does_too() {
        let mut watches = tokio::task::JoinSet::new();
        let cancelled = watches.spawn(std::future::pending());
        cancelled.abort();
        ended(watches.join_next().await.unwrap());
        watches.spawn(async { panic!("of a watch") });
        ended(watches.join_next().await.unwrap());
    }
}
