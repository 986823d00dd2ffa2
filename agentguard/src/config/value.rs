//! The values that configuration keys take: read once, valid from then on.
//!
//! Each type refuses what it can not mean, names it, and says what it could be. The same reading
//! serves the file and the flags. Must not know which key a value is for.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use jiff::SignedDuration;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::identity::template::{IdentityTemplate, TemplateError};

/// A value that a key can not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` {remedy}")]
pub struct ValueError {
    given: String,
    remedy: Cow<'static, str>,
}

impl ValueError {
    fn new(given: impl fmt::Display, remedy: impl Into<Cow<'static, str>>) -> Self {
        Self { given: given.to_string(), remedy: remedy.into() }
    }
}

/// Serde and schema of a type that is a string in the file.
macro_rules! spelled {
    ($type:ty, $name:literal) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string" })
            }
        }
    };
}

/// Serde and schema of a type that is a whole number in the file.
macro_rules! counted {
    ($type:ty, $inner:ty, $minimum:expr, $maximum:expr) => {
        impl $type {
            /// The number.
            #[must_use]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl TryFrom<$inner> for $type {
            type Error = ValueError;

            fn try_from(number: $inner) -> Result<Self, ValueError> {
                Self::new(number)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let number = deserializer.deserialize_any(WholeNumber)?;
                <$inner>::try_from(number)
                    .map_err(|_| ValueError::new(number, "is too large a number"))
                    .and_then(Self::new)
                    .map_err(serde::de::Error::custom)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "integer", "minimum": $minimum, "maximum": $maximum })
            }
        }
    };
}

/// Reads a whole number, and names whatever else it meets.
struct WholeNumber;

impl Visitor<'_> for WholeNumber {
    type Value = u64;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a whole number")
    }

    fn visit_u64<E>(self, number: u64) -> Result<u64, E> {
        Ok(number)
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<u64, E> {
        u64::try_from(number).map_err(|_| self.refuse(number))
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<u64, E> {
        Err(self.refuse(number))
    }

    fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<u64, E> {
        Err(self.refuse(word))
    }
}

impl WholeNumber {
    fn refuse<E: serde::de::Error>(&self, given: impl fmt::Display) -> E {
        E::custom(ValueError::new(given, "is no whole number; give digits alone"))
    }
}

/// The name of a SPIFFE trust domain: 1 to 255 of `a-z`, `0-9`, `.`, `-` and `_`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustDomainName(String);

impl TrustDomainName {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomainName {
    type Err = ValueError;

    fn from_str(name: &str) -> Result<Self, ValueError> {
        let known = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > 255 || !name.bytes().all(known) {
            return Err(ValueError::new(
                name,
                "is not a trust domain; give 1 to 255 lower-case letters, digits, `.`, `-` or `_`",
            ));
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for TrustDomainName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

spelled!(TrustDomainName, "TrustDomainName");

/// The template of the SPIFFE IDs of pods and containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(IdentityTemplate);

impl Template {
    #[must_use]
    pub const fn get(&self) -> &IdentityTemplate {
        &self.0
    }
}

impl FromStr for Template {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        text.parse()
            .map(Self)
            .map_err(|error: TemplateError| ValueError::new(text, error.to_string()))
    }
}

impl fmt::Display for Template {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0.as_str())
    }
}

spelled!(Template, "Template");

/// The name of a node: 1 to 253 printable ASCII characters without spaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeName(String);

impl NodeName {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = ValueError;

    fn from_str(name: &str) -> Result<Self, ValueError> {
        if name.is_empty() || name.len() > 253 || !name.bytes().all(|b| b.is_ascii_graphic()) {
            let remedy = "is not a node's name; give 1 to 253 printable ASCII characters";
            return Err(ValueError::new(name.escape_debug(), remedy));
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

spelled!(NodeName, "NodeName");

/// A path from the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AbsolutePath(PathBuf);

impl std::ops::Deref for AbsolutePath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for AbsolutePath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl FromStr for AbsolutePath {
    type Err = ValueError;

    fn from_str(path: &str) -> Result<Self, ValueError> {
        if !Path::new(path).is_absolute() || path.contains('\0') {
            return Err(ValueError::new(path, "is not an absolute path; begin it with `/`"));
        }
        Ok(Self(path.into()))
    }
}

impl fmt::Display for AbsolutePath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(formatter)
    }
}

spelled!(AbsolutePath, "AbsolutePath");

/// A path of one or more names below another, without `.` and `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelativePath(PathBuf);

impl AsRef<Path> for RelativePath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl FromStr for RelativePath {
    type Err = ValueError;

    fn from_str(path: &str) -> Result<Self, ValueError> {
        let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
        if !path.split('/').all(is_name) {
            return Err(ValueError::new(
                path.escape_debug(),
                "is not a path below another; give a name, or names with `/` between them",
            ));
        }
        Ok(Self(path.into()))
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(formatter)
    }
}

spelled!(RelativePath, "RelativePath");

/// Where the audit log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuditOutput {
    Stdout,
    File(AbsolutePath),
}

impl FromStr for AuditOutput {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        match word {
            "stdout" => Ok(Self::Stdout),
            path => path.parse().map(Self::File).map_err(|_| {
                ValueError::new(path, "is no audit output; give `stdout` or an absolute path")
            }),
        }
    }
}

impl fmt::Display for AuditOutput {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => formatter.write_str("stdout"),
            Self::File(path) => path.fmt(formatter),
        }
    }
}

spelled!(AuditOutput, "AuditOutput");

/// Where metrics are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    Off,
    At(SocketAddr),
}

impl FromStr for Listen {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        match word {
            "off" => Ok(Self::Off),
            address => address.parse().map(Self::At).map_err(|_| {
                ValueError::new(
                    address,
                    "is no address to listen on; give `ADDRESS:PORT` as `127.0.0.1:9469`, or `off`",
                )
            }),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => formatter.write_str("off"),
            Self::At(address) => address.fmt(formatter),
        }
    }
}

spelled!(Listen, "Listen");

/// How the Kubernetes API server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KubernetesAccess {
    /// Not at all.
    Off,
    /// As a pod, by its service account.
    InCluster,
    /// By the current context of this kubeconfig.
    Kubeconfig(AbsolutePath),
}

impl FromStr for KubernetesAccess {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        match word {
            "off" => Ok(Self::Off),
            "in-cluster" => Ok(Self::InCluster),
            path => path.parse().map(Self::Kubeconfig).map_err(|_| {
                ValueError::new(
                    path,
                    "says no way to an API server; give `in-cluster`, the absolute path of a kubeconfig, or `off`",
                )
            }),
        }
    }
}

impl fmt::Display for KubernetesAccess {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => formatter.write_str("off"),
            Self::InCluster => formatter.write_str("in-cluster"),
            Self::Kubeconfig(path) => path.fmt(formatter),
        }
    }
}

spelled!(KubernetesAccess, "KubernetesAccess");

/// Where a runtime offers the Node Resource Interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NriSocket {
    /// It is not used.
    Off,
    /// Where runtimes put it, if one does.
    Auto,
    /// There.
    At(AbsolutePath),
}

impl FromStr for NriSocket {
    type Err = ValueError;

    fn from_str(word: &str) -> Result<Self, ValueError> {
        match word {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            path => path.parse().map(Self::At).map_err(|_| {
                ValueError::new(
                    path,
                    "says no socket; give `auto`, the absolute path of one, or `off`",
                )
            }),
        }
    }
}

impl fmt::Display for NriSocket {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => formatter.write_str("off"),
            Self::Auto => formatter.write_str("auto"),
            Self::At(path) => path.fmt(formatter),
        }
    }
}

spelled!(NriSocket, "NriSocket");

/// A span of time, from a millisecond to an hour, written as `500ms`, `1s` or `2m 30s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval(Duration);

impl Interval {
    const MIN: Duration = Duration::from_millis(1);
    const MAX: Duration = Duration::from_secs(3600);

    /// One second.
    pub const SECOND: Self = Self(Duration::from_secs(1));

    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl FromStr for Interval {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        text.parse::<SignedDuration>()
            .ok()
            .and_then(|duration| Duration::try_from(duration).ok())
            .filter(|duration| (Self::MIN..=Self::MAX).contains(duration))
            .map(Self)
            .ok_or_else(|| {
                ValueError::new(
                    text,
                    "is no span of time from 1ms to 1h; write it as `500ms` or `1s`",
                )
            })
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Bounded by `MAX`, so it fits.
        let duration = SignedDuration::try_from(self.0).unwrap_or(SignedDuration::MAX);
        write!(formatter, "{duration:#}")
    }
}

spelled!(Interval, "Interval");

/// Size of a ring buffer: a power of two from 4 KiB (a page) to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingBytes(u32);

impl RingBytes {
    const MIN: u32 = 1 << 12;
    const MAX: u32 = 1 << 30;

    pub const KIB_512: Self = Self(512 << 10);
    pub const MIB_2: Self = Self(2 << 20);

    fn new(bytes: u32) -> Result<Self, ValueError> {
        if (Self::MIN..=Self::MAX).contains(&bytes) && bytes.is_power_of_two() {
            return Ok(Self(bytes));
        }
        let nearest = bytes.clamp(Self::MIN, Self::MAX).next_power_of_two();
        let remedy = format!(
            "is no size for a ring buffer; give a power of two from 4096 to 1073741824, as {nearest}"
        );
        Err(ValueError::new(bytes, remedy))
    }
}

counted!(RingBytes, u32, Self::MIN, Self::MAX);

/// Entries of a kernel map: 1 to 16,777,216.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity(u32);

impl Capacity {
    const MIN: u32 = 1;
    const MAX: u32 = 1 << 24;

    pub const KIB_1: Self = Self(1 << 10);
    pub const KIB_4: Self = Self(4 << 10);
    pub const KIB_8: Self = Self(8 << 10);
    pub const KIB_16: Self = Self(16 << 10);
    pub const KIB_64: Self = Self(64 << 10);
    pub const KIB_256: Self = Self(256 << 10);

    fn new(entries: u32) -> Result<Self, ValueError> {
        if (Self::MIN..=Self::MAX).contains(&entries) {
            return Ok(Self(entries));
        }
        Err(ValueError::new(entries, "is no size for a kernel map; give 1 to 16777216 entries"))
    }
}

counted!(Capacity, u32, Self::MIN, Self::MAX);

/// Size at which a file of the audit log is rotated: 1 MiB to 1 TiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileBytes(u64);

impl FileBytes {
    const MIN: u64 = crate::audit::Limits::MIN_FILE_BYTES;
    const MAX: u64 = 1 << 40;

    pub const MIB_64: Self = Self(64 << 20);

    fn new(bytes: u64) -> Result<Self, ValueError> {
        if (Self::MIN..=Self::MAX).contains(&bytes) {
            return Ok(Self(bytes));
        }
        let remedy = format!("is no size for a file of the log; give at least {} bytes", Self::MIN);
        Err(ValueError::new(bytes, remedy))
    }
}

counted!(FileBytes, u64, Self::MIN, Self::MAX);

/// Memory for what is kept of a kind of the cluster's objects: 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindBytes(u32);

impl KindBytes {
    const MIN: u32 = 1 << 20;
    const MAX: u32 = 1 << 30;

    pub const MIB_16: Self = Self(16 << 20);

    fn new(bytes: u32) -> Result<Self, ValueError> {
        if (Self::MIN..=Self::MAX).contains(&bytes) {
            return Ok(Self(bytes));
        }
        Err(ValueError::new(bytes, "is no room for objects; give 1048576 to 1073741824 bytes"))
    }
}

counted!(KindBytes, u32, Self::MIN, Self::MAX);

/// Files of the audit log that are kept: 2 to 10,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileCount(u32);

impl FileCount {
    const MIN: u32 = crate::audit::Limits::MIN_FILES;
    const MAX: u32 = 10_000;

    pub const EIGHT: Self = Self(8);

    fn new(files: u32) -> Result<Self, ValueError> {
        if (Self::MIN..=Self::MAX).contains(&files) {
            return Ok(Self(files));
        }
        Err(ValueError::new(files, "is no number of files to keep; give 2 to 10000"))
    }
}

counted!(FileCount, u32, Self::MIN, Self::MAX);

/// Workload identities that get a label in the metrics: 0 to 10,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdentityCount(u32);

impl IdentityCount {
    const MIN: u32 = 0;
    const MAX: u32 = 10_000;

    pub const DEFAULT: Self = Self(128);

    fn new(identities: u32) -> Result<Self, ValueError> {
        if identities <= Self::MAX {
            return Ok(Self(identities));
        }
        Err(ValueError::new(identities, "labels are too many for Prometheus; give 0 to 10000"))
    }
}

counted!(IdentityCount, u32, Self::MIN, Self::MAX);
