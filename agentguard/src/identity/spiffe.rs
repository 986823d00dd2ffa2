//! SPIFFE IDs as the SPIFFE-ID standard writes them, and the subjects that select them.
//!
//! The grammar is the strict one: there is one spelling for each identity, so that text equality
//! is identity. A workload identity always has a path; a bare trust domain names no workload.

use std::str::FromStr;

use crate::name::text_type;

/// The longest SPIFFE ID, in bytes.
pub const MAX_ID_BYTES: usize = 2048;
/// The longest trust domain, in bytes.
pub const MAX_TRUST_DOMAIN_BYTES: usize = 255;

const SCHEME: &str = "spiffe://";

/// The workload identity: `spiffe://<trust domain>/<path>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId(String);

text_type!(SpiffeId);

/// The beginning that several workload identities share: `spiffe://<trust domain>/<path>/`.
///
/// It ends with `/`, so it ends where a path segment ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffePrefix(String);

text_type!(SpiffePrefix);

/// The authority part of a SPIFFE ID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(String);

text_type!(TrustDomain);

/// The pattern in a grant that selects identities.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// One identity.
    Exact(SpiffeId),
    /// Every identity below a path.
    Prefix(SpiffePrefix),
}

/// Why a text is no [`SpiffeId`], [`SpiffePrefix`] or [`TrustDomain`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    #[error("is no SPIFFE ID; begin it with spiffe://")]
    Scheme,
    #[error("is longer than {MAX_ID_BYTES} bytes; shorten the path")]
    TooLong,
    #[error("has a query; remove everything from the `?` on")]
    Query,
    #[error("has a fragment; remove everything from the `#` on")]
    Fragment,
    #[error("has user information; remove everything up to the `@`")]
    User,
    #[error("has a port; remove everything from the `:` to the end of the trust domain")]
    Port,
    #[error("has no trust domain; write one, such as spiffe://example.org/agent")]
    NoTrustDomain,
    #[error("has a trust domain of more than {MAX_TRUST_DOMAIN_BYTES} bytes; shorten it")]
    TrustDomainTooLong,
    #[error("has upper-case letters in its trust domain; write {0}")]
    TrustDomainUpperCase(String),
    #[error("has {0:?} in its trust domain; only a-z, 0-9, `.`, `-` and `_` are allowed there")]
    TrustDomainCharacter(char),
    #[error("names a trust domain and no workload; add a path, such as {0}/agent")]
    NoPath(String),
    #[error("ends with `/`; remove the slash, or use spiffeIdPrefix for everything below it")]
    TrailingSlash,
    #[error("does not end with `/`; add the slash, or use spiffeId for this one identity")]
    NoTrailingSlash,
    #[error("has an empty path segment; write every `/` once")]
    EmptySegment,
    #[error("has the path segment `{0}`; write the path without `.` and `..`")]
    DotSegment(String),
    #[error("has a wildcard; use spiffeIdPrefix with a path that ends in `/`")]
    Wildcard,
    #[error("has {0:?} in its path; only letters, digits, `.`, `-` and `_` are allowed there")]
    PathCharacter(char),
}

impl SpiffeId {
    /// The trust domain this identity belongs to.
    #[must_use]
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(authority_and_path(&self.0).0.to_owned())
    }

    /// The path, with its leading `/`.
    #[must_use]
    pub fn path(&self) -> &str {
        authority_and_path(&self.0).1
    }
}

impl SpiffePrefix {
    /// Whether `id` lies below this path.
    #[must_use]
    pub fn matches(&self, id: &SpiffeId) -> bool {
        id.0.starts_with(&self.0)
    }
}

impl Subject {
    /// Whether a grant to this subject is a grant to `id`.
    #[must_use]
    pub fn matches(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Exact(exact) => exact == id,
            Self::Prefix(prefix) => prefix.matches(id),
        }
    }

    /// The identity or the prefix as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Exact(id) => id.as_str(),
            Self::Prefix(prefix) => prefix.as_str(),
        }
    }
}

impl std::fmt::Display for Subject {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl serde::Serialize for Subject {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        check_frame(text)?;
        let (_, path) = authority_and_path(text);
        match path {
            "" | "/" => Err(SpiffeIdError::NoPath(text.trim_end_matches('/').to_owned())),
            path if path.ends_with('/') => Err(SpiffeIdError::TrailingSlash),
            path => check_segments(&path[1..]).map(|()| Self(text.to_owned())),
        }
    }
}

impl FromStr for SpiffePrefix {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        check_frame(text)?;
        let (_, path) = authority_and_path(text);
        let Some(segments) = path.strip_suffix('/') else {
            return Err(SpiffeIdError::NoTrailingSlash);
        };
        if let Some(segments) = segments.strip_prefix('/') {
            check_segments(segments)?;
        }
        Ok(Self(text.to_owned()))
    }
}

/// Reads a subject the way [`Subject`] displays it: a trailing `/` makes it a prefix.
impl FromStr for Subject {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        if text.ends_with('/') {
            text.parse().map(Self::Prefix)
        } else {
            text.parse().map(Self::Exact)
        }
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        check_trust_domain(text).map(|()| Self(text.to_owned()))
    }
}

/// Checks all that an identity and a prefix have in common.
fn check_frame(text: &str) -> Result<(), SpiffeIdError> {
    if !text.starts_with(SCHEME) {
        return Err(SpiffeIdError::Scheme);
    }
    if text.len() > MAX_ID_BYTES {
        return Err(SpiffeIdError::TooLong);
    }
    if text.contains('?') {
        return Err(SpiffeIdError::Query);
    }
    if text.contains('#') {
        return Err(SpiffeIdError::Fragment);
    }
    check_trust_domain(authority_and_path(text).0)
}

fn check_trust_domain(text: &str) -> Result<(), SpiffeIdError> {
    if text.is_empty() {
        return Err(SpiffeIdError::NoTrustDomain);
    }
    if text.contains('@') {
        return Err(SpiffeIdError::User);
    }
    if text.contains(':') {
        return Err(SpiffeIdError::Port);
    }
    if text.len() > MAX_TRUST_DOMAIN_BYTES {
        return Err(SpiffeIdError::TrustDomainTooLong);
    }
    let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_');
    if let Some(stranger) = text.chars().find(|c| !allowed(c.to_ascii_lowercase())) {
        return Err(SpiffeIdError::TrustDomainCharacter(stranger));
    }
    if text.contains(|c: char| c.is_ascii_uppercase()) {
        return Err(SpiffeIdError::TrustDomainUpperCase(text.to_ascii_lowercase()));
    }
    Ok(())
}

fn check_segments(segments: &str) -> Result<(), SpiffeIdError> {
    segments.split('/').try_for_each(|segment| match segment {
        "" => Err(SpiffeIdError::EmptySegment),
        "." | ".." => Err(SpiffeIdError::DotSegment(segment.to_owned())),
        segment if segment.contains('*') => Err(SpiffeIdError::Wildcard),
        segment => {
            let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            match segment.chars().find(|c| !allowed(c)) {
                Some(stranger) => Err(SpiffeIdError::PathCharacter(stranger)),
                None => Ok(()),
            }
        }
    })
}

/// Splits a text with a checked scheme; the path keeps its leading `/`.
fn authority_and_path(text: &str) -> (&str, &str) {
    let rest = text.strip_prefix(SCHEME).unwrap_or_default();
    rest.split_at(rest.find('/').unwrap_or(rest.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> SpiffeId {
        text.parse().unwrap()
    }

    #[test]
    fn an_identity_keeps_its_text_and_gives_its_parts() {
        let id = id("spiffe://example.org/ns/Agents/sa/re.search_er-1");
        assert_eq!(id.to_string(), "spiffe://example.org/ns/Agents/sa/re.search_er-1");
        assert_eq!(id.trust_domain().as_str(), "example.org");
        assert_eq!(id.path(), "/ns/Agents/sa/re.search_er-1");
        assert_eq!(serde_json::to_value(&id).unwrap(), serde_json::json!(id.as_str()));
    }

    #[test]
    fn what_the_standard_forbids_is_refused_with_its_reason() {
        let long = format!("spiffe://example.org/{}", "a".repeat(2048));
        let long_domain = format!("spiffe://{}/a", "a".repeat(256));
        let cases = [
            ("https://example.org/a", SpiffeIdError::Scheme),
            ("SPIFFE://example.org/a", SpiffeIdError::Scheme),
            ("", SpiffeIdError::Scheme),
            (long.as_str(), SpiffeIdError::TooLong),
            (long_domain.as_str(), SpiffeIdError::TrustDomainTooLong),
            ("spiffe://example.org/a?b", SpiffeIdError::Query),
            ("spiffe://example.org/a#b", SpiffeIdError::Fragment),
            ("spiffe://me@example.org/a", SpiffeIdError::User),
            ("spiffe://example.org:443/a", SpiffeIdError::Port),
            ("spiffe:///a", SpiffeIdError::NoTrustDomain),
            (
                "spiffe://Example.org/a",
                SpiffeIdError::TrustDomainUpperCase("example.org".to_owned()),
            ),
            ("spiffe://exämple.org/a", SpiffeIdError::TrustDomainCharacter('ä')),
            ("spiffe://example.org", SpiffeIdError::NoPath("spiffe://example.org".to_owned())),
            ("spiffe://example.org/", SpiffeIdError::NoPath("spiffe://example.org".to_owned())),
            ("spiffe://example.org/a/", SpiffeIdError::TrailingSlash),
            ("spiffe://example.org/a//b", SpiffeIdError::EmptySegment),
            ("spiffe://example.org//a", SpiffeIdError::EmptySegment),
            ("spiffe://example.org/a/../b", SpiffeIdError::DotSegment("..".to_owned())),
            ("spiffe://example.org/./b", SpiffeIdError::DotSegment(".".to_owned())),
            ("spiffe://example.org/a*", SpiffeIdError::Wildcard),
            ("spiffe://example.org/a%20b", SpiffeIdError::PathCharacter('%')),
            ("spiffe://example.org/a b", SpiffeIdError::PathCharacter(' ')),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<SpiffeId>(), Err(reason), "{text:?}");
        }
    }

    #[test]
    fn the_longest_identity_is_accepted() {
        let head = "spiffe://example.org/";
        let text = format!("{head}{}", "a".repeat(MAX_ID_BYTES - head.len()));
        assert_eq!(text.parse::<SpiffeId>().map(|id| id.as_str().len()), Ok(MAX_ID_BYTES));
    }

    #[test]
    fn a_prefix_matches_whole_segments_only() {
        let prefix: Subject = "spiffe://example.org/ns/agents/".parse().unwrap();
        assert!(prefix.matches(&id("spiffe://example.org/ns/agents/sa/a")));
        assert!(!prefix.matches(&id("spiffe://example.org/ns/agents")));
        assert!(!prefix.matches(&id("spiffe://example.org/ns/agents-2/sa/a")));
        assert!(!prefix.matches(&id("spiffe://example.org.evil/ns/agents/a")));
    }

    #[test]
    fn an_exact_subject_matches_one_identity() {
        let exact: Subject = "spiffe://example.org/a".parse().unwrap();
        assert!(exact.matches(&id("spiffe://example.org/a")));
        assert!(!exact.matches(&id("spiffe://example.org/a/b")));
        assert!(!exact.matches(&id("spiffe://example.org/A")));
    }

    #[test]
    fn a_prefix_may_be_a_whole_trust_domain_and_must_end_with_a_slash() {
        assert!("spiffe://example.org/".parse::<SpiffePrefix>().is_ok());
        let cases = [
            ("spiffe://example.org", SpiffeIdError::NoTrailingSlash),
            ("spiffe://example.org/a", SpiffeIdError::NoTrailingSlash),
            ("spiffe://example.org//", SpiffeIdError::EmptySegment),
            ("spiffe://example.org/a//", SpiffeIdError::EmptySegment),
            ("spiffe://example.org/*/", SpiffeIdError::Wildcard),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<SpiffePrefix>(), Err(reason), "{text:?}");
        }
    }
}
