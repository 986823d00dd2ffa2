//! Reads the `spec` of a `Grant` manifest.

use jiff::Timestamp;

use super::{Creation, reader::Value};
use crate::{
    grant::{Expiry, GrantDocument, GrantId, Ttl},
    identity::Subject,
    name::ResourceName,
};

/// The word for a grant that only revocation ends.
const NEVER: &str = "never";

/// Why a text is no time.
#[derive(Debug, thiserror::Error)]
enum TimeError {
    #[error("has no offset; add Z for UTC or an offset such as +01:00")]
    NoOffset,
    #[error("is no RFC 3339 time; write one such as 2030-01-31T17:00:00Z")]
    Grammar,
    #[error("is a time that does not exist; write one such as 2030-01-31T17:00:00Z")]
    Nonexistent,
}

pub(super) fn read(
    name: Option<ResourceName>,
    namespace: Option<ResourceName>,
    spec: &Value<'_>,
    creation: Creation,
) -> Option<GrantDocument> {
    let [subject, scopes, not_before, expires_at, ttl, granted_by, reason] =
        spec.fields(["subject", "scopes", "notBefore", "expiresAt", "ttl", "grantedBy", "reason"])?;
    let subject = subject.required(read_subject);
    let scopes = scopes.required(|value| {
        value.list(|item| {
            item.note();
            item.parse()
        })
    });
    let not_before = not_before.optional(|value| value.parse_with(parse_time));
    match creation {
        // Only one of the two can be right here, so only that one is asked for.
        Creation::Unknown if !expires_at.is_present() && !ttl.is_present() => {
            spec.refuse(
                "has no expiresAt",
                "write the time at which the grant ends, or `never` for a standing grant",
            );
        }
        Creation::Unknown | Creation::At(_) => spec.check_exactly_one([&expires_at, &ttl]),
    }
    let opens = not_before.flatten();
    let expires_at = expires_at.optional(|value| {
        value.note();
        let expiry = value.parse_with(parse_expiry)?;
        check_window(value, opens, expiry)
    });
    let ttl = ttl.optional(|value| {
        let ttl: Ttl = value.parse()?;
        let expiry = end_of(ttl, creation, value)?;
        check_window(value, opens, expiry)
    });
    let granted_by = granted_by.required(Value::text);
    let reason = reason.required(Value::text);
    Some(GrantDocument {
        id: match namespace {
            Some(namespace) => GrantId::in_namespace(&namespace, &name?),
            None => GrantId::from(name?),
        },
        subject: subject?,
        scopes: scopes?,
        not_before: not_before?,
        expiry: expires_at?.or(ttl?)?,
        granted_by: granted_by?.to_owned(),
        reason: reason?.to_owned(),
    })
}

fn read_subject(subject: &Value<'_>) -> Option<Subject> {
    let [exact, prefix] = subject.fields(["spiffeId", "spiffeIdPrefix"])?;
    subject.check_exactly_one([&exact, &prefix]);
    let exact = exact.optional(|value| {
        value.note();
        value.parse()
    });
    let prefix = prefix.optional(|value| {
        value.note();
        value.parse()
    });
    exact?.map(Subject::Exact).or(prefix?.map(Subject::Prefix))
}

fn parse_expiry(text: &str) -> Result<Expiry, TimeError> {
    if text == NEVER { Ok(Expiry::Never) } else { parse_time(text).map(Expiry::At) }
}

fn end_of(ttl: Ttl, creation: Creation, value: &Value<'_>) -> Option<Expiry> {
    match creation {
        Creation::Unknown => {
            value.refuse(
                "counts from a time of creation, which a file does not have",
                "write expiresAt with the time at which the grant ends",
            );
            None
        }
        Creation::At(created) => match ttl.after(created) {
            Some(end) => Some(Expiry::At(end)),
            None => {
                value.refuse("ends after the last time that can be written", "write a shorter one");
                None
            }
        },
    }
}

fn check_window(value: &Value<'_>, opens: Option<Timestamp>, expiry: Expiry) -> Option<Expiry> {
    match (opens, expiry) {
        (Some(opens), Expiry::At(end)) if end <= opens => {
            value.refuse(
                format!(
                    "is not after notBefore ({opens}), so the grant would never permit anything"
                ),
                "write a later time",
            );
            None
        }
        (Some(_) | None, Expiry::At(_) | Expiry::Never) => Some(expiry),
    }
}

/// An RFC 3339 time with its offset, and nothing that RFC 3339 leaves to agreement.
fn parse_time(text: &str) -> Result<Timestamp, TimeError> {
    let (clock, offset) = text.split_at_checked(19).ok_or(TimeError::Grammar)?;
    if !has_shape(clock, "dddd-dd-ddTdd:dd:dd") {
        return Err(TimeError::Grammar);
    }
    let offset = match offset.strip_prefix('.') {
        None => offset,
        Some(rest) => {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            if !(1..=9).contains(&digits) {
                return Err(TimeError::Grammar);
            }
            &rest[digits..]
        }
    };
    match offset {
        "" => Err(TimeError::NoOffset),
        "Z" => text.parse().map_err(|_| TimeError::Nonexistent),
        _ if has_shape(offset, "+dd:dd") || has_shape(offset, "-dd:dd") => {
            text.parse().map_err(|_| TimeError::Nonexistent)
        }
        _ => Err(TimeError::Grammar),
    }
}

/// Whether `text` is `shape` with a digit for every `d`.
fn has_shape(text: &str, shape: &str) -> bool {
    text.len() == shape.len()
        && text.bytes().zip(shape.bytes()).all(|(byte, expected)| match expected {
            b'd' => byte.is_ascii_digit(),
            other => byte == other,
        })
}
