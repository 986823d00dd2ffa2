//! All grants of this node: where each came from, where it is in its life, who took it back.
//!
//! Nothing here reads a clock: `now` is always an argument, wall-clock time. Knows neither files
//! nor the kernel. One writer; the daemon owns it.
//!
//! States follow the wall clock, also when it is set back; the end of a grant in boot time is
//! worked out once and kept until [`GrantStore::set_clock`].

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{
    clock::Clock,
    document::{Expiry, GrantDocument, GrantId},
    snapshot::{RestoreError, Snapshot},
};
use crate::{
    identity::SpiffeId,
    scope::{Catalogue, ScopeName},
};

/// Every grant by its id, and every revocation.
#[derive(Clone, Debug)]
pub struct GrantStore {
    clock: Clock,
    grants: BTreeMap<GrantId, StoredGrant>,
    /// Also of grants that are not there at the moment.
    revocations: BTreeMap<GrantId, Revocation>,
}

/// A grant and what the store knows about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredGrant {
    pub document: GrantDocument,
    pub source: Source,
    /// Nanoseconds of boot time; [`NEVER`](agentguard_common::allowlist::NEVER) for a standing
    /// grant. The same from one compilation to the next.
    pub boot_expiry: u64,
}

/// Where a grant came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Source {
    /// The manifest directory, or a custom resource.
    Manifest,
    /// The control API, called by this user.
    Api { uid: u32 },
    /// `agentguard exec`, started by this user.
    Exec { uid: u32 },
}

/// Where a grant is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State<'a> {
    /// Its window has not begun.
    Pending,
    /// It permits.
    Active,
    /// Its window is over.
    Expired,
    /// It was taken back; stays so also after its window.
    Revoked(&'a Revocation),
}

/// A [`State`] by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Pending,
    Active,
    Expired,
    Revoked,
}

impl Phase {
    pub const ALL: [Self; 4] = [Self::Pending, Self::Active, Self::Expired, Self::Revoked];

    /// As statuses spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

impl From<&State<'_>> for Phase {
    fn from(state: &State<'_>) -> Self {
        match state {
            State::Pending => Self::Pending,
            State::Active => Self::Active,
            State::Expired => Self::Expired,
            State::Revoked(_) => Self::Revoked,
        }
    }
}

/// Who took a grant back, when and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    pub at: Timestamp,
    pub by: String,
    pub reason: String,
    /// What was taken back.
    pub(super) document: GrantDocument,
    /// Whether the grant has been gone since.
    pub(super) removed: bool,
}

/// What [`GrantStore::replace_manifests`] did, ids in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: Vec<GrantId>,
    pub changed: Vec<GrantId>,
    pub removed: Vec<GrantId>,
    /// Not taken, because a grant of the same id is there from another source or came before.
    pub refused: Vec<GrantId>,
}

/// How many grants are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub pending: usize,
    pub active: usize,
    pub expired: usize,
    pub revoked: usize,
    /// How many of `pending` and `active` never expire.
    pub standing: usize,
}

/// Why a grant was not added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    #[error("there is a grant {0} already; choose another name")]
    IdTaken(GrantId),
    #[error(
        "grant {grant} names the scope {scope}, which no Scope defines; define it, or name another"
    )]
    UnknownScope { grant: GrantId, scope: ScopeName },
    #[error("grant {0} was revoked, and this is the same grant again; give it another name")]
    Revoked(GrantId),
}

/// Why a grant was not revoked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevokeError {
    #[error("there is no grant {0}; see the names with `agentguard grants`")]
    Unknown(GrantId),
    #[error("grant {0} is over already; there is nothing to revoke")]
    AlreadyOver(GrantId),
}

impl Source {
    /// The word for the kind of source, used in records and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Api { .. } => "api",
            Self::Exec { .. } => "exec",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest => formatter.write_str("manifest"),
            Self::Api { uid } => write!(formatter, "api (uid {uid})"),
            Self::Exec { uid } => write!(formatter, "exec (uid {uid})"),
        }
    }
}

impl Changes {
    /// Whether the store is as it was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }
}

impl GrantStore {
    /// A store without grants that works out ends by `clock`.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { clock, grants: BTreeMap::new(), revocations: BTreeMap::new() }
    }

    /// Takes over a clock after the wall clock was set, and works out every end again.
    pub fn set_clock(&mut self, clock: Clock) {
        self.clock = clock;
        for grant in self.grants.values_mut() {
            grant.boot_expiry = clock.expiry(grant.document.expiry);
        }
    }

    /// Makes `documents` all the grants that come from manifests.
    ///
    /// A grant that was revoked stays revoked, also when its document is edited. Only one that was
    /// gone and comes back with other content is another grant.
    pub fn replace_manifests(&mut self, documents: Vec<GrantDocument>) -> Changes {
        let mut changes = Changes::default();
        let mut wanted = BTreeMap::new();
        for document in documents {
            let taken =
                self.grants.get(&document.id).is_some_and(|grant| grant.source != Source::Manifest);
            match wanted.entry(document.id.clone()) {
                Entry::Vacant(place) if !taken => drop(place.insert(document)),
                Entry::Vacant(_) | Entry::Occupied(_) => changes.refused.push(document.id),
            }
        }
        changes.refused.sort();

        let is_gone = |grant: &StoredGrant| {
            grant.source == Source::Manifest && !wanted.contains_key(&grant.document.id)
        };
        let gone = self.grants.values().filter(|grant| is_gone(grant));
        changes.removed = gone.map(|grant| grant.document.id.clone()).collect();
        for id in &changes.removed {
            self.remove(id);
        }

        for (id, document) in wanted {
            match self.grants.get_mut(&id) {
                Some(grant) if grant.document == document => {}
                Some(grant) => {
                    grant.boot_expiry = self.clock.expiry(document.expiry);
                    grant.document = document;
                    changes.changed.push(id);
                }
                None => {
                    self.insert(document, Source::Manifest);
                    changes.added.push(id);
                }
            }
        }
        // Also what went while no daemon was there to see it.
        for (id, revocation) in &mut self.revocations {
            revocation.removed |= !self.grants.contains_key(id);
        }
        changes
    }

    /// Adds a grant that came at run time.
    ///
    /// # Errors
    ///
    /// When its id is taken, one of its scopes is not in `catalogue`, or the very same grant was
    /// revoked; nothing changes then.
    pub fn add(
        &mut self,
        document: GrantDocument,
        source: Source,
        catalogue: &Catalogue,
    ) -> Result<(), AddError> {
        let grant = document.id.clone();
        if self.grants.contains_key(&grant) {
            return Err(AddError::IdTaken(grant));
        }
        if let Some(scope) = document.scopes.iter().find(|scope| catalogue.get(scope).is_none()) {
            return Err(AddError::UnknownScope { grant, scope: scope.clone() });
        }
        if self.revocations.get(&grant).is_some_and(|revoked| revoked.document == document) {
            return Err(AddError::Revoked(grant));
        }
        self.insert(document, source);
        Ok(())
    }

    /// Takes a grant back.
    ///
    /// # Errors
    ///
    /// When there is none of this id, or it is over at `at` anyway.
    pub fn revoke(
        &mut self,
        id: &GrantId,
        by: String,
        reason: String,
        at: Timestamp,
    ) -> Result<&StoredGrant, RevokeError> {
        let grant = self.grants.get(id).ok_or_else(|| RevokeError::Unknown(id.clone()))?;
        match self.state_of(grant, at) {
            State::Pending | State::Active => {}
            State::Expired | State::Revoked(_) => return Err(RevokeError::AlreadyOver(id.clone())),
        }
        let document = grant.document.clone();
        let revocation = Revocation { at, by, reason, document, removed: false };
        self.revocations.insert(id.clone(), revocation);
        Ok(grant)
    }

    /// Forgets a grant that came at run time, because what it was given for has ended. Whether there
    /// was one.
    pub fn end(&mut self, id: &GrantId) -> bool {
        let is_there = self.grants.get(id).is_some_and(|grant| grant.source != Source::Manifest);
        if is_there {
            self.remove(id);
        }
        is_there
    }

    /// Every grant, in the order of the ids.
    pub fn grants(&self) -> impl ExactSizeIterator<Item = &StoredGrant> {
        self.grants.values()
    }

    /// The grant of this id.
    #[must_use]
    pub fn get(&self, id: &GrantId) -> Option<&StoredGrant> {
        self.grants.get(id)
    }

    /// Where the grant of this id is in its life at `now`.
    #[must_use]
    pub fn state(&self, id: &GrantId, now: Timestamp) -> Option<State<'_>> {
        self.grants.get(id).map(|grant| self.state_of(grant, now))
    }

    /// Where a grant of this store is in its life at `now`.
    #[must_use]
    pub fn state_of(&self, grant: &StoredGrant, now: Timestamp) -> State<'_> {
        let GrantDocument { id, not_before, expiry, .. } = &grant.document;
        match self.revocations.get(id) {
            Some(revocation) => State::Revoked(revocation),
            None if expiry.is_over(now) => State::Expired,
            None if not_before.is_some_and(|start| start > now) => State::Pending,
            None => State::Active,
        }
    }

    /// The active grants whose subject is `identity`.
    pub fn of<'a>(
        &'a self,
        identity: &'a SpiffeId,
        now: Timestamp,
    ) -> impl Iterator<Item = &'a StoredGrant> {
        self.grants.values().filter(move |grant| {
            grant.document.subject.matches(identity) && self.state_of(grant, now) == State::Active
        })
    }

    /// The first moment after `now` at which a state changes by itself.
    #[must_use]
    pub fn next_change(&self, now: Timestamp) -> Option<Timestamp> {
        let moments = self.grants.values().flat_map(|grant| {
            let GrantDocument { not_before, expiry, .. } = &grant.document;
            let end = match *expiry {
                Expiry::At(end) => Some(end),
                Expiry::Never => None,
            };
            match self.state_of(grant, now) {
                State::Pending | State::Active => [*not_before, end],
                State::Expired | State::Revoked(_) => [None, None],
            }
        });
        moments.flatten().filter(|moment| *moment > now).min()
    }

    /// How many grants are in which state at `now`.
    #[must_use]
    pub fn counts(&self, now: Timestamp) -> Counts {
        let mut counts = Counts::default();
        for grant in self.grants.values() {
            let standing = usize::from(grant.document.expiry == Expiry::Never);
            match self.state_of(grant, now) {
                State::Pending => {
                    counts.pending += 1;
                    counts.standing += standing;
                }
                State::Active => {
                    counts.active += 1;
                    counts.standing += standing;
                }
                State::Expired => counts.expired += 1,
                State::Revoked(_) => counts.revoked += 1,
            }
        }
        counts
    }

    /// Forgets the grants that came at run time and have been over for `keep_over`, and the
    /// revocations that no grant needs any more; gives the ids of the grants, in order.
    ///
    /// Grants from manifests stay as long as their manifests. A revocation outlives its grant until
    /// the grant would have expired, so that the same grant can not simply be added again.
    pub fn prune(&mut self, now: Timestamp, keep_over: Duration) -> Vec<GrantId> {
        // What can not be subtracted is longer than time itself: nothing is that old.
        let before = SignedDuration::try_from(keep_over)
            .ok()
            .and_then(|keep| now.checked_sub(keep).ok())
            .unwrap_or(Timestamp::MIN);
        let is_old = |grant: &&StoredGrant| {
            let over_since = match (self.state_of(grant, now), grant.document.expiry) {
                (State::Revoked(revocation), _) => Some(revocation.at),
                (State::Expired, Expiry::At(end)) => Some(end),
                (State::Expired, Expiry::Never) | (State::Pending | State::Active, _) => None,
            };
            grant.source != Source::Manifest && over_since.is_some_and(|since| since <= before)
        };
        let old: Vec<GrantId> =
            self.grants.values().filter(is_old).map(|grant| grant.document.id.clone()).collect();
        for id in &old {
            self.remove(id);
        }
        self.revocations.retain(|_, revocation| {
            !revocation.removed || !revocation.document.expiry.is_over(before)
        });
        old
    }

    /// What must outlive the daemon: grants that came at run time, and all revocations.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let grants = self.grants.values().filter(|grant| grant.source != Source::Manifest);
        Snapshot::new(grants, self.revocations.values())
    }

    /// Takes back what [`GrantStore::snapshot`] gave. Called before any manifest is read: a
    /// manifest that took the id of a grant in the meantime is then refused as it would have been.
    ///
    /// # Errors
    ///
    /// When any value in it is not valid; nothing changes then.
    pub fn restore(&mut self, snapshot: Snapshot) -> Result<(), RestoreError> {
        let (grants, revocations) = snapshot.into_values()?;
        for revocation in revocations {
            self.revocations.insert(revocation.document.id.clone(), revocation);
        }
        for (document, source) in grants {
            let boot_expiry = self.clock.expiry(document.expiry);
            let grant = StoredGrant { document, source, boot_expiry };
            self.grants.insert(grant.document.id.clone(), grant);
        }
        Ok(())
    }

    /// Adds a grant whose id is free.
    fn insert(&mut self, document: GrantDocument, source: Source) {
        if let Entry::Occupied(mut place) = self.revocations.entry(document.id.clone()) {
            if place.get().removed && place.get().document != document {
                place.remove();
            } else {
                place.get_mut().removed = false;
            }
        }
        let boot_expiry = self.clock.expiry(document.expiry);
        self.grants.insert(document.id.clone(), StoredGrant { document, source, boot_expiry });
    }

    fn remove(&mut self, id: &GrantId) {
        self.grants.remove(id);
        if let Some(revocation) = self.revocations.get_mut(id) {
            revocation.removed = true;
        }
    }
}

#[cfg(test)]
mod tests;
