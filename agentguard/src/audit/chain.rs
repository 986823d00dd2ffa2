//! The hash chain: turns a record into a line that carries the hash of the line before, and reads
//! such a line back.
//!
//! A line is one JSON object whose last two keys are `prev` and `hash`, both 64 lower-case
//! hexadecimal digits. `hash` is the SHA-256 of the line's own bytes up to and without
//! `,"hash":`, exactly as they stand in the file: nothing is parsed or sorted first. `prev` is the
//! `hash` of the line before, and 64 zeros in the first line. `seq` counts lines from 1. So a line
//! is checked with standard tools:
//!
//! ```sh
//! line=$(sed -n 5p audit.log)
//! printf '%s' "${line%,\"hash\":*}" | sha256sum   # equals: printf '%s' "$line" | jq -r .hash
//! ```
//!
//! The chain has no secret: who can rewrite every line from some point to the end can make a new
//! chain. That shows against a [`Head`] noted elsewhere (the control API and the records shipped to
//! another machine carry it); so does the loss of the last lines.
//!
//! Must not know files.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::record::{Record, RecordBody, VerdictRecord};
use super::text::Text;

/// Longest line that the log writes, in bytes. What records hold is bounded, so that no line
/// comes near it.
pub const MAX_LINE_BYTES: usize = 256 * 1024;

/// What stands between the hashed bytes and the hash.
const HASH_KEY: &str = ",\"hash\":\"";

/// A SHA-256 sum; 64 lower-case hexadecimal digits in text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Hash([u8; 32]);

impl Hash {
    /// What the first line of a chain carries as `prev`.
    pub const ZERO: Self = Self([0; 32]);

    /// The sum of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// Text that is not a hash.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a hash; give 64 lower-case hexadecimal digits")]
pub struct HashError(Text);

impl FromStr for Hash {
    type Err = HashError;

    fn from_str(text: &str) -> Result<Self, HashError> {
        let error = || HashError(text.into());
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(error()),
        };
        let digits: &[u8; 64] = text.as_bytes().try_into().map_err(|_| error())?;
        let mut sum = [0; 32];
        for (byte, pair) in sum.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(sum))
    }
}

impl TryFrom<String> for Hash {
    type Error = HashError;

    fn try_from(text: String) -> Result<Self, HashError> {
        text.parse()
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> Self {
        hash.to_string()
    }
}

/// The end of a chain: what the next line continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Head {
    /// The last line's `seq`; 0 before the first.
    pub seq: u64,
    /// The last line's `hash`.
    pub hash: Hash,
}

impl Head {
    /// Before the first line.
    pub const EMPTY: Self = Self { seq: 0, hash: Hash::ZERO };
}

impl fmt::Display for Head {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.seq, self.hash)
    }
}

/// Text that is not a [`Head`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the end of a log; give `SEQ:HASH` as `agentguard status` shows it")]
pub struct HeadError(Text);

impl FromStr for Head {
    type Err = HeadError;

    fn from_str(text: &str) -> Result<Self, HeadError> {
        let error = || HeadError(text.into());
        let (seq, hash) = text.split_once(':').ok_or_else(error)?;
        let seq = seq.parse().map_err(|_| error())?;
        Ok(Self { seq, hash: hash.parse().map_err(|_| error())? })
    }
}

/// A record that does not fit the log.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    #[error("the record can not be written as JSON")]
    Json(#[from] serde_json::Error),
    #[error("the record takes {0} bytes, and a line holds at most {MAX_LINE_BYTES}")]
    TooLong(usize),
}

/// The line, without its newline, that continues the chain at `head`, and the new end.
pub(crate) fn line(
    head: &Head,
    time: Timestamp,
    node: &Text,
    body: &RecordBody,
) -> Result<(String, Head), LineError> {
    let seq = head.seq + 1;
    let unsigned = Unsigned { seq, time: NanosecondTime(time), node, body, prev: head.hash };
    let mut line = serde_json::to_string(&unsigned)?;
    if line.len() > MAX_LINE_BYTES {
        return Err(LineError::TooLong(line.len()));
    }
    line.pop();
    let hash = Hash::of(line.as_bytes());
    line.push_str(HASH_KEY);
    line.push_str(&hash.to_string());
    line.push_str("\"}");
    Ok((line, Head { seq, hash }))
}

/// What the chain needs of a line that is whole.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) head: Head,
    pub(crate) prev: Hash,
    pub(crate) role: Role,
}

/// Records that say something about the log itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Ordinary,
    /// Closes off bytes that a crash left behind.
    Recovered {
        torn_bytes: u64,
        torn_sha256: Hash,
    },
    /// The first of a file; older records than `first_kept` were removed.
    Rotated {
        first_kept: u64,
    },
}

/// Why a line is no part of any chain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BrokenLine {
    #[error("it does not read as a record")]
    Malformed,
    #[error("its content does not match its hash")]
    Changed { seq: u64 },
}

/// Reads a line, without its newline, and checks it against its own hash.
pub(crate) fn read(line: &[u8]) -> Result<Link, BrokenLine> {
    #[derive(Deserialize)]
    struct Signed {
        seq: u64,
        kind: String,
        prev: Hash,
        hash: Hash,
        torn_bytes: Option<u64>,
        torn_sha256: Option<Hash>,
        first_kept: Option<u64>,
    }
    let tail = HASH_KEY.len() + 64 + 2;
    let signed: Signed = serde_json::from_slice(line).map_err(|_| BrokenLine::Malformed)?;
    let (content, end) =
        line.split_at_checked(line.len().saturating_sub(tail)).ok_or(BrokenLine::Malformed)?;
    if end != format!("{HASH_KEY}{}\"}}", signed.hash).as_bytes() {
        return Err(BrokenLine::Malformed);
    }
    if Hash::of(content) != signed.hash {
        return Err(BrokenLine::Changed { seq: signed.seq });
    }
    let role = match (signed.kind.as_str(), &signed) {
        (
            "recovered",
            &Signed { torn_bytes: Some(torn_bytes), torn_sha256: Some(torn_sha256), .. },
        ) => Role::Recovered { torn_bytes, torn_sha256 },
        ("rotated", &Signed { first_kept: Some(first_kept), .. }) => Role::Rotated { first_kept },
        _ => Role::Ordinary,
    };
    Ok(Link { head: Head { seq: signed.seq, hash: signed.hash }, prev: signed.prev, role })
}

/// A [`Record`] without its hash; the same keys in the same order.
#[derive(Serialize)]
struct Unsigned<'a> {
    seq: u64,
    time: NanosecondTime,
    node: &'a Text,
    #[serde(flatten)]
    body: &'a RecordBody,
    prev: Hash,
}

/// RFC 3339 in UTC, always with nine digits of a second, so that text sorts by time.
#[derive(Clone, Copy)]
pub(crate) struct NanosecondTime(pub(crate) Timestamp);

impl Serialize for NanosecondTime {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:.9}", self.0))
    }
}

/// `#[serde(with)]` for times in records.
pub(crate) mod nanoseconds {
    use jiff::Timestamp;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
        super::NanosecondTime(*time).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
        Timestamp::deserialize(from)
    }

    /// The same where there may be no time.
    pub(crate) mod option {
        use super::*;

        pub(crate) fn serialize<S: Serializer>(
            time: &Option<Timestamp>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            time.map(super::super::NanosecondTime).serialize(to)
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Timestamp>, D::Error> {
            Option::deserialize(from)
        }
    }
}

/// Reads a line back with all that it says.
///
/// # Errors
/// When the line is not a record of this version, or does not match its hash.
pub fn parse(line: &str) -> Result<Record, ParseError> {
    read(line.as_bytes()).map_err(|fault| ParseError::Broken(fault.to_string()))?;
    Ok(serde_json::from_str(line)?)
}

/// The verdict that a line tells of; `None` where it tells of something else, or can not be read back.
pub(crate) fn verdict(line: &[u8]) -> Option<VerdictRecord> {
    /// Of a line of another kind no more is read.
    #[derive(Deserialize)]
    struct Kind {
        kind: String,
    }
    let line = str::from_utf8(line).ok()?;
    let kind: Kind = serde_json::from_str(line).ok()?;
    if kind.kind != "verdict" {
        return None;
    }
    let RecordBody::Verdict(record) = parse(line).ok()?.body else { return None };
    Some(*record)
}

/// Why a line can not be read back.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    #[error("the line is not part of an audit log: {0}")]
    Broken(String),
    #[error("the line holds a record that this version does not know; read it with a newer one")]
    Unknown(#[from] serde_json::Error),
}
