//! What of the grant store outlives the daemon, as plain data to write down and read back.
//!
//! Manifests are not part of it: they are read again. Knows nothing of files.

use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    document::{Expiry, GrantDocument},
    store::{Revocation, Source, StoredGrant},
};

/// The version of the shape below.
const VERSION: u32 = 1;

/// Grants that came at run time, and all revocations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    version: u32,
    grants: Vec<WireGrant>,
    revocations: Vec<WireRevocation>,
}

impl Default for Snapshot {
    /// Of a store that never held anything.
    fn default() -> Self {
        Self { version: VERSION, grants: Vec::new(), revocations: Vec::new() }
    }
}

/// Why a [`Snapshot`] can not be restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    #[error(
        "the grant store was written in version {0}, this is {VERSION}; use the agentguard that wrote it"
    )]
    Version(u32),
    #[error("grant {id:?} of the grant store has the {field} {value:?}, which {error}")]
    Field { id: String, field: &'static str, value: String, error: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireGrant {
    source: Source,
    document: WireDocument,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireRevocation {
    at: Timestamp,
    by: String,
    reason: String,
    removed: bool,
    document: WireDocument,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireDocument {
    id: String,
    subject: String,
    scopes: Vec<String>,
    not_before: Option<Timestamp>,
    /// Nothing for a standing grant, which is said by `standing`, so that a lost field is an error.
    expires_at: Option<Timestamp>,
    standing: bool,
    granted_by: String,
    reason: String,
}

/// What a [`Snapshot`] holds, as the store keeps it.
pub(super) type Values = (Vec<(GrantDocument, Source)>, Vec<Revocation>);

impl Snapshot {
    pub(super) fn new<'a>(
        grants: impl Iterator<Item = &'a StoredGrant>,
        revocations: impl Iterator<Item = &'a Revocation>,
    ) -> Self {
        let grants = grants.map(|grant| WireGrant {
            source: grant.source,
            document: WireDocument::from(&grant.document),
        });
        let revocations = revocations.map(|revocation| {
            let Revocation { at, by, reason, document, removed } = revocation;
            let (by, reason) = (by.clone(), reason.clone());
            let document = WireDocument::from(document);
            WireRevocation { at: *at, by, reason, removed: *removed, document }
        });
        Self { version: VERSION, grants: grants.collect(), revocations: revocations.collect() }
    }

    /// The values that were written down.
    pub(super) fn into_values(self) -> Result<Values, RestoreError> {
        if self.version != VERSION {
            return Err(RestoreError::Version(self.version));
        }
        let grants = self
            .grants
            .into_iter()
            .map(|WireGrant { source, document }| Ok((document.into_value()?, source)))
            .collect::<Result<_, _>>()?;
        let revocations = self
            .revocations
            .into_iter()
            .map(|WireRevocation { at, by, reason, removed, document }| {
                Ok(Revocation { at, by, reason, removed, document: document.into_value()? })
            })
            .collect::<Result<_, _>>()?;
        Ok((grants, revocations))
    }
}

impl From<&GrantDocument> for WireDocument {
    fn from(document: &GrantDocument) -> Self {
        let GrantDocument { id, subject, scopes, not_before, expiry, granted_by, reason } =
            document;
        let (expires_at, standing) = match expiry {
            Expiry::At(end) => (Some(*end), false),
            Expiry::Never => (None, true),
        };
        Self {
            id: id.to_string(),
            subject: subject.to_string(),
            scopes: scopes.iter().map(ToString::to_string).collect(),
            not_before: *not_before,
            expires_at,
            standing,
            granted_by: granted_by.clone(),
            reason: reason.clone(),
        }
    }
}

impl WireDocument {
    fn into_value(self) -> Result<GrantDocument, RestoreError> {
        let refuse = |field, value: &str, error: &str| RestoreError::Field {
            id: self.id.clone(),
            field,
            value: value.to_owned(),
            error: error.to_owned(),
        };
        let expiry = match (self.expires_at, self.standing) {
            (Some(end), false) => Expiry::At(end),
            (None, true) => Expiry::Never,
            (Some(_), true) => {
                return Err(refuse(
                    "expires_at",
                    "standing",
                    "contradicts its end; grant it again",
                ));
            }
            (None, false) => {
                return Err(refuse("expires_at", "", "is no end; grant it again"));
            }
        };
        if self.scopes.is_empty() {
            return Err(refuse("scopes", "", "is empty; grant it again"));
        }
        let scopes = self.scopes.iter().map(|scope| parse(scope, "scope", &refuse));
        Ok(GrantDocument {
            id: parse(&self.id, "id", &refuse)?,
            subject: parse(&self.subject, "subject", &refuse)?,
            scopes: scopes.collect::<Result<_, _>>()?,
            not_before: self.not_before,
            expiry,
            granted_by: self.granted_by.clone(),
            reason: self.reason.clone(),
        })
    }
}

fn parse<T: FromStr<Err: ToString>>(
    text: &str,
    field: &'static str,
    refuse: &impl Fn(&'static str, &str, &str) -> RestoreError,
) -> Result<T, RestoreError> {
    text.parse().map_err(|error: T::Err| refuse(field, text, &error.to_string()))
}
