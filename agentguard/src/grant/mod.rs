//! Which scopes which identities hold, from when and until when.

pub mod document;

pub use document::{Expiry, GrantDocument, GrantId, Ttl};
