//! What a `Grant` manifest says: subject, scopes, time window, who granted it and why.
//!
//! Knows nothing of YAML; [`crate::manifest`] builds these values. Times are wall-clock time; the
//! datapath turns them into boot time.

use std::{fmt, str::FromStr};

use jiff::{SignedDuration, Timestamp};

use crate::{identity::Subject, name::ResourceName, scope::ScopeName};

/// The longest time to live: ten years of 365 days, in seconds.
const MAX_TTL_SECONDS: u64 = 10 * 365 * 86_400;
/// The units of a time to live, largest first, in seconds.
const UNITS: [(char, u64); 4] = [('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];

/// Scopes for a subject within a time window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantDocument {
    pub id: GrantId,
    pub subject: Subject,
    /// Never empty, no scope twice.
    pub scopes: Vec<ScopeName>,
    /// The grant permits from this moment on; without one, from its creation on.
    pub not_before: Option<Timestamp>,
    pub expiry: Expiry,
    pub granted_by: String,
    pub reason: String,
}

/// The identity of a grant: its `metadata.name`, after its namespace and `/` where it has one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantId(String);

/// When a grant ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expiry {
    /// The grant permits until this moment, which is no longer part of it.
    At(Timestamp),
    /// A standing grant; only revocation ends it.
    Never,
}

/// How long a grant lives, counted from its creation; a whole number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ttl {
    seconds: u64,
}

/// Why a text is no [`Ttl`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TtlError {
    #[error(
        "is no duration; write whole numbers with the units d, h, m, s, largest first, such as 1h30m"
    )]
    Grammar,
    #[error("has no unit after its last number; write d, h, m or s there, such as {0}s")]
    NoUnit(String),
    #[error(
        "has the unit `{0}` twice or after a smaller one; write every unit once, largest first"
    )]
    Order(char),
    #[error("is no time at all; write a duration of at least 1s")]
    Zero,
    #[error(
        "is longer than ten years; write at most 3650d, or expiresAt: never for a standing grant"
    )]
    TooLong,
}

impl GrantId {
    /// The text of the id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The namespace of a grant that has one, and the name.
    #[must_use]
    pub fn parts(&self) -> (Option<&str>, &str) {
        match self.0.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, &self.0),
        }
    }

    /// The grant `name` of `namespace`: the names of two namespaces have nothing to do with each
    /// other.
    #[must_use]
    pub fn in_namespace(namespace: &ResourceName, name: &ResourceName) -> Self {
        Self(format!("{namespace}/{name}"))
    }
}

impl From<ResourceName> for GrantId {
    fn from(name: ResourceName) -> Self {
        Self(name.to_string())
    }
}

impl FromStr for GrantId {
    type Err = crate::name::ResourceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) => Ok(Self::in_namespace(&namespace.parse()?, &name.parse()?)),
            None => text.parse::<ResourceName>().map(Self::from),
        }
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl serde::Serialize for GrantId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl Expiry {
    /// Whether the grant is over at `now`.
    #[must_use]
    pub fn is_over(self, now: Timestamp) -> bool {
        match self {
            Self::At(end) => end <= now,
            Self::Never => false,
        }
    }
}

/// An RFC 3339 time in UTC, or the word `never`.
impl fmt::Display for Expiry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(end) => end.fmt(formatter),
            Self::Never => formatter.write_str("never"),
        }
    }
}

impl Ttl {
    /// The time to live, in seconds.
    #[must_use]
    pub const fn seconds(self) -> u64 {
        self.seconds
    }

    /// The moment this long after `creation`; nothing beyond the end of representable time.
    #[must_use]
    pub fn after(self, creation: Timestamp) -> Option<Timestamp> {
        let seconds = i64::try_from(self.seconds).ok()?;
        creation.checked_add(SignedDuration::from_secs(seconds)).ok()
    }
}

impl FromStr for Ttl {
    type Err = TtlError;

    fn from_str(text: &str) -> Result<Self, TtlError> {
        let mut seconds = 0_u64;
        let mut larger_than = u64::MAX;
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let (number, after) = rest.split_at(digits);
            if number.is_empty() {
                return Err(TtlError::Grammar);
            }
            let Some(letter) = after.chars().next() else {
                return Err(TtlError::NoUnit(text.chars().take(20).collect()));
            };
            let Some((_, unit)) = UNITS.into_iter().find(|(unit, _)| *unit == letter) else {
                return Err(TtlError::Grammar);
            };
            if unit >= larger_than {
                return Err(TtlError::Order(letter));
            }
            larger_than = unit;
            // Only digits are left, so the one way to fail is to be too large.
            let number: u64 = number.parse().map_err(|_| TtlError::TooLong)?;
            seconds = number
                .checked_mul(unit)
                .and_then(|part| seconds.checked_add(part))
                .filter(|sum| *sum <= MAX_TTL_SECONDS)
                .ok_or(TtlError::TooLong)?;
            rest = &after[letter.len_utf8()..];
        }
        match (text, seconds) {
            ("", _) => Err(TtlError::Grammar),
            (_, 0) => Err(TtlError::Zero),
            (_, seconds) => Ok(Self { seconds }),
        }
    }
}

/// The shortest spelling that reads back as the same duration.
impl fmt::Display for Ttl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.seconds;
        for (letter, unit) in UNITS {
            if left >= unit {
                write!(formatter, "{}{letter}", left / unit)?;
                left %= unit;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_ttl_is_units_largest_first() {
        let cases = [
            ("8h", 8 * 3600),
            ("1h30m", 5400),
            ("1d1s", 86_401),
            ("90m", 5400),
            ("007s", 7),
            ("3650d", MAX_TTL_SECONDS),
        ];
        for (text, seconds) in cases {
            assert_eq!(text.parse::<Ttl>().map(Ttl::seconds), Ok(seconds), "{text}");
        }
    }

    #[test]
    fn any_other_ttl_is_refused_with_its_reason() {
        let cases = [
            ("", TtlError::Grammar),
            ("h", TtlError::Grammar),
            ("-1h", TtlError::Grammar),
            ("1.5h", TtlError::Grammar),
            ("1h 30m", TtlError::Grammar),
            ("1w", TtlError::Grammar),
            ("1H", TtlError::Grammar),
            ("30", TtlError::NoUnit("30".to_owned())),
            ("30m1h", TtlError::Order('h')),
            ("1h1h", TtlError::Order('h')),
            ("0s", TtlError::Zero),
            ("0h0m", TtlError::Zero),
            ("3650d1s", TtlError::TooLong),
            ("99999999999999999999s", TtlError::TooLong),
            ("9999999999999999999d", TtlError::TooLong),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<Ttl>(), Err(reason), "{text:?}");
        }
    }

    #[test]
    fn a_grant_is_over_at_the_very_moment_it_expires() {
        let end = Timestamp::from_second(1000).unwrap();
        let at = |second| Timestamp::from_second(second).unwrap();
        assert!(!Expiry::At(end).is_over(at(999)));
        assert!(Expiry::At(end).is_over(at(1000)));
        assert!(!Expiry::Never.is_over(at(1000)));
    }

    proptest! {
        #[test]
        fn a_ttl_reads_back_as_it_is_displayed(seconds in 1..=MAX_TTL_SECONDS) {
            let ttl = Ttl { seconds };
            prop_assert_eq!(ttl.to_string().parse::<Ttl>(), Ok(ttl));
        }
    }
}
