//! Which scopes which identities hold, from when and until when.

pub mod clock;
pub mod document;
pub mod snapshot;
pub mod store;

pub use clock::{Clock, ClockError};
pub use document::{Expiry, GrantDocument, GrantId, Ttl};
pub use snapshot::{RestoreError, Snapshot};
pub use store::{
    AddError, Changes, Counts, GrantStore, Revocation, RevokeError, Source, State, StoredGrant,
};
