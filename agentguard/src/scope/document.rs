//! What a `Scope` manifest says: a named capability and what it permits.
//!
//! Knows nothing of YAML; [`crate::manifest`] builds these values. A list that is empty permits
//! nothing of its kind.

use std::{fmt, net::IpAddr, str::FromStr};

use agentguard_common::Protocol;
use ipnet::IpNet;

use crate::{
    name::{ResourceName, text_type},
    pattern::{PathPattern, PathPatternError},
};

use super::{cluster::ObjectName, selector::LabelSelector};

/// The longest scope name, in bytes.
const MAX_SCOPE_BYTES: usize = 128;
/// The longest DNS name, in bytes.
const MAX_DNS_NAME_BYTES: usize = 253;
/// The longest label of a DNS name, in bytes.
const MAX_DNS_LABEL_BYTES: usize = 63;
/// The characters that join the parts of a scope name.
const SCOPE_JOINTS: [char; 5] = [':', '.', '_', '/', '-'];

/// A named capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScopeDocument {
    pub name: ResourceName,
    /// What grants and tokens say.
    pub scope: ScopeName,
    pub description: String,
    /// Where connections and datagrams may go.
    pub egress: Vec<EgressRule>,
    /// What may be executed.
    pub exec: Vec<ExecutablePattern>,
    /// Which unix sockets may be connected to.
    pub unix_sockets: Vec<UnixSocket>,
    /// Where the workload may listen.
    pub listen: Vec<PortRange>,
}

/// Every one of `to`, at every one of `ports`. Neither is ever empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EgressRule {
    pub to: Vec<Destination>,
    pub ports: Vec<PortRange>,
}

/// One end that an egress rule permits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Destination {
    /// Every address in `cidr` that is in none of `except`.
    IpBlock { cidr: IpNet, except: Vec<IpNet> },
    /// Every address the name resolves to. No manifest with one is accepted yet.
    DnsName(DnsName),
    /// A Kubernetes service at those of its ports that the rule names, and its endpoints at the
    /// ports that these lead to.
    Service(ObjectName),
    /// The pods that `pods` selects, or all, in the namespaces that `namespaces` selects.
    Pods { pods: Option<LabelSelector>, namespaces: LabelSelector },
}

/// Ports of one protocol, `first` and `last` included.
///
/// All ports, and every protocol without ports, are `0..=65535`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    pub protocol: Protocol,
    pub first: u16,
    pub last: u16,
}

/// A unix socket by the address its server binds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UnixSocket {
    /// The socket file at this literal path.
    Path(PathPattern),
    /// The name in the abstract namespace, without its leading NUL.
    Abstract(String),
}

/// `[a-z0-9]+` parts joined by one of `:`, `.`, `_`, `/`, `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScopeName(String);

text_type!(ScopeName);

/// A DNS name in lower case; a leading `*.` stands for one or more labels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DnsName(String);

text_type!(DnsName);

/// Which files may be executed, by the path they have in the workload's mounts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExecutablePattern {
    path: PathPattern,
    reach: Reach,
}

/// What an [`ExecutablePattern`] asks the resolver to look up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecutablePatternKind<'a> {
    /// The one file at this literal path.
    Exact(&'a PathPattern),
    /// Every file whose path matches, name by name.
    Glob(&'a PathPattern),
    /// Every file below every directory whose path matches; the directory can be `/`.
    Tree { directory: &'a PathPattern },
}

/// Why a text is no [`ScopeName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScopeNameError {
    #[error("is longer than {MAX_SCOPE_BYTES} bytes; write a shorter scope")]
    TooLong,
    #[error("has upper-case letters; write {0}")]
    UpperCase(String),
    #[error(
        "contains {0:?}; a scope has only a-z, 0-9 and single `:`, `.`, `_`, `/`, `-` between them"
    )]
    Character(char),
    #[error(
        "has an empty part; begin and end with a letter or digit and join parts by one character"
    )]
    EmptyPart,
}

/// Why a text is no [`DnsName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DnsNameError {
    #[error("is an IP address; write it as an ipBlock")]
    Address,
    #[error("is longer than {MAX_DNS_NAME_BYTES} bytes; write a shorter name")]
    TooLong,
    #[error("has upper-case letters; write {0}")]
    UpperCase(String),
    #[error("has a wildcard inside; `*.` is allowed once, at the beginning")]
    Wildcard,
    #[error("contains {0:?}; a DNS name has only a-z, 0-9, `-`, `_` and `.`")]
    Character(char),
    #[error(
        "has a label that is empty, longer than {MAX_DNS_LABEL_BYTES} bytes, or begins or ends \
         with `-`; write the name without a final dot"
    )]
    Label,
}

/// Why a text is no [`ExecutablePattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExecutablePatternError {
    #[error("is the root directory; name an executable, or end with `/**` for a tree")]
    Root,
    #[error(
        "has `**` elsewhere than as its last name; write `*` within one name or end with `/**`"
    )]
    DoubleStar,
    #[error(transparent)]
    Path(PathPatternError),
}

/// Why a text is no address of a [`UnixSocket`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnixSocketError {
    #[error("has a wildcard, which unix sockets can not have; name one socket")]
    Wildcard,
    #[error("is the root directory; name a socket")]
    Root,
    #[error(
        "has a name of more than 107 bytes, which no unix socket can have; write the name it is \
         bound by"
    )]
    TooLong,
    #[error(transparent)]
    Path(#[from] PathPatternError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Reach {
    Files,
    Tree,
}

impl PortRange {
    /// Every port of `protocol`; the whole of a protocol without ports.
    #[must_use]
    pub const fn every(protocol: Protocol) -> Self {
        Self { protocol, first: 0, last: u16::MAX }
    }

    /// Whether no port is excluded.
    #[must_use]
    pub const fn is_every_port(self) -> bool {
        self.first == 0 && self.last == u16::MAX
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, first, last } = *self;
        let protocol = protocol.as_str();
        match () {
            () if self.is_every_port() => formatter.write_str(protocol),
            () if first == last => write!(formatter, "{protocol} {first}"),
            () => write!(formatter, "{protocol} {first}-{last}"),
        }
    }
}

impl ExecutablePattern {
    /// What to look up in the workload's mounts.
    #[must_use]
    pub fn kind(&self) -> ExecutablePatternKind<'_> {
        match self.reach {
            Reach::Tree => ExecutablePatternKind::Tree { directory: &self.path },
            Reach::Files if self.path.is_literal() => ExecutablePatternKind::Exact(&self.path),
            Reach::Files => ExecutablePatternKind::Glob(&self.path),
        }
    }

    /// Whether the executable at `path`, absolute and normalised, is meant.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self.reach {
            Reach::Files => self.path.matches(path),
            Reach::Tree => self.path.matches_above(path),
        }
    }
}

impl FromStr for ExecutablePattern {
    type Err = ExecutablePatternError;

    fn from_str(text: &str) -> Result<Self, ExecutablePatternError> {
        let explain = |error| match error {
            PathPatternError::DoubleStar => ExecutablePatternError::DoubleStar,
            PathPatternError::Relative
            | PathPatternError::EmptyName
            | PathPatternError::DotName(_)
            | PathPatternError::Control(_)
            | PathPatternError::TooLong
            | PathPatternError::NameTooLong => ExecutablePatternError::Path(error),
        };
        let (directory, reach) = match text.strip_suffix("/**") {
            Some("") => ("/", Reach::Tree),
            Some(directory) => (directory, Reach::Tree),
            None => (text, Reach::Files),
        };
        let path: PathPattern = directory.parse().map_err(explain)?;
        match reach {
            Reach::Files if path.is_root() => Err(ExecutablePatternError::Root),
            // `//**` would otherwise pass for `/**`.
            Reach::Tree if path.is_root() && text != "/**" => {
                Err(ExecutablePatternError::Path(PathPatternError::EmptyName))
            }
            Reach::Files | Reach::Tree => Ok(Self { path, reach }),
        }
    }
}

impl fmt::Display for ExecutablePattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reach {
            Reach::Files => self.path.fmt(formatter),
            Reach::Tree if self.path.is_root() => formatter.write_str("/**"),
            Reach::Tree => write!(formatter, "{}/**", self.path),
        }
    }
}

impl UnixSocket {
    /// The longest name, in bytes. A path may be longer: a server can bind by a relative one.
    const MAX_BYTES: usize = 107;

    /// The socket file at `path`.
    ///
    /// # Errors
    ///
    /// When the path is not absolute and literal, or its last name too long for a socket.
    pub fn at_path(path: &str) -> Result<Self, UnixSocketError> {
        let pattern: PathPattern = path.parse()?;
        match () {
            () if !pattern.is_literal() => Err(UnixSocketError::Wildcard),
            () if pattern.is_root() => Err(UnixSocketError::Root),
            () if pattern.names().last().is_some_and(|name| name.len() > Self::MAX_BYTES) => {
                Err(UnixSocketError::TooLong)
            }
            () => Ok(Self::Path(pattern)),
        }
    }

    /// The socket with `name` in the abstract namespace.
    ///
    /// # Errors
    ///
    /// When the name is too long for a socket address or has a wildcard.
    pub fn abstract_name(name: &str) -> Result<Self, UnixSocketError> {
        match () {
            () if name.contains('*') => Err(UnixSocketError::Wildcard),
            () if name.len() > Self::MAX_BYTES => Err(UnixSocketError::TooLong),
            () => Ok(Self::Abstract(name.to_owned())),
        }
    }
}

impl FromStr for ScopeName {
    type Err = ScopeNameError;

    fn from_str(text: &str) -> Result<Self, ScopeNameError> {
        if text.len() > MAX_SCOPE_BYTES {
            return Err(ScopeNameError::TooLong);
        }
        let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9') || SCOPE_JOINTS.contains(&c);
        if let Some(stranger) = text.chars().find(|c| !allowed(c.to_ascii_lowercase())) {
            return Err(ScopeNameError::Character(stranger));
        }
        if text.contains(|c: char| c.is_ascii_uppercase()) {
            return Err(ScopeNameError::UpperCase(text.to_ascii_lowercase()));
        }
        if text.split(SCOPE_JOINTS).any(str::is_empty) {
            return Err(ScopeNameError::EmptyPart);
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for DnsName {
    type Err = DnsNameError;

    fn from_str(text: &str) -> Result<Self, DnsNameError> {
        if text.parse::<IpAddr>().is_ok() || text.parse::<IpNet>().is_ok() {
            return Err(DnsNameError::Address);
        }
        if text.len() > MAX_DNS_NAME_BYTES {
            return Err(DnsNameError::TooLong);
        }
        let name = text.strip_prefix("*.").unwrap_or(text);
        if name.contains('*') {
            return Err(DnsNameError::Wildcard);
        }
        let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '_' | '.');
        if let Some(stranger) = name.chars().find(|c| !allowed(c.to_ascii_lowercase())) {
            return Err(DnsNameError::Character(stranger));
        }
        if name.contains(|c: char| c.is_ascii_uppercase()) {
            return Err(DnsNameError::UpperCase(text.to_ascii_lowercase()));
        }
        let sound = |label: &str| {
            (1..=MAX_DNS_LABEL_BYTES).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !name.split('.').all(sound) {
            return Err(DnsNameError::Label);
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_parts_joined_by_one_character() {
        for text in ["github:read", "a", "0", "a.b_c/d-e:f"] {
            assert_eq!(text.parse::<ScopeName>().unwrap().as_str(), text);
        }
        let long = "a".repeat(129);
        let cases = [
            ("GitHub:read", ScopeNameError::UpperCase("github:read".to_owned())),
            ("github read", ScopeNameError::Character(' ')),
            ("github:*", ScopeNameError::Character('*')),
            ("github::read", ScopeNameError::EmptyPart),
            (":read", ScopeNameError::EmptyPart),
            ("github:", ScopeNameError::EmptyPart),
            ("", ScopeNameError::EmptyPart),
            (long.as_str(), ScopeNameError::TooLong),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<ScopeName>(), Err(reason), "{text:?}");
        }
    }

    #[test]
    fn a_dns_name_is_lower_case_with_a_wildcard_only_in_front() {
        for text in ["api.github.com", "*.example.org", "_srv.example.org", "localhost"] {
            assert_eq!(text.parse::<DnsName>().unwrap().as_str(), text);
        }
        let cases = [
            ("192.0.2.1", DnsNameError::Address),
            ("2001:db8::/32", DnsNameError::Address),
            ("API.example.org", DnsNameError::UpperCase("api.example.org".to_owned())),
            ("a.*.example.org", DnsNameError::Wildcard),
            ("*", DnsNameError::Wildcard),
            ("*example.org", DnsNameError::Wildcard),
            ("exämple.org", DnsNameError::Character('ä')),
            ("https://example.org", DnsNameError::Character(':')),
            ("example.org.", DnsNameError::Label),
            ("a..b", DnsNameError::Label),
            ("-a.b", DnsNameError::Label),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<DnsName>(), Err(reason), "{text:?}");
        }
    }

    #[test]
    fn a_unix_socket_is_one_path_or_one_name() {
        let long = "n".repeat(107);
        for path in ["/run/a.sock", "/s", &format!("/{}/{long}", "d".repeat(200))] {
            assert!(matches!(UnixSocket::at_path(path), Ok(UnixSocket::Path(_))), "{path}");
        }
        let too_long = format!("/run/{long}n");
        let cases = [
            ("/run/*.sock", UnixSocketError::Wildcard),
            ("/run/*/a.sock", UnixSocketError::Wildcard),
            ("/", UnixSocketError::Root),
            (too_long.as_str(), UnixSocketError::TooLong),
            ("run/a.sock", UnixSocketError::Path(PathPatternError::Relative)),
            ("/run/**", UnixSocketError::Path(PathPatternError::DoubleStar)),
        ];
        for (path, reason) in cases {
            assert_eq!(UnixSocket::at_path(path), Err(reason), "{path:?}");
        }
        assert_eq!(UnixSocket::abstract_name(&long), Ok(UnixSocket::Abstract(long.clone())));
        let longer = format!("{long}n");
        assert_eq!(UnixSocket::abstract_name(&longer), Err(UnixSocketError::TooLong));
        assert_eq!(UnixSocket::abstract_name("a*"), Err(UnixSocketError::Wildcard));
    }

    #[test]
    fn an_exact_executable_is_one_path() {
        let pattern: ExecutablePattern = "/usr/bin/git".parse().unwrap();
        assert!(matches!(pattern.kind(), ExecutablePatternKind::Exact(_)));
        assert!(pattern.matches("/usr/bin/git"));
        assert!(!pattern.matches("/usr/bin/git2"));
        assert!(!pattern.matches("/usr/bin/git/x"));
    }

    #[test]
    fn a_star_in_an_executable_stays_within_one_name() {
        let pattern: ExecutablePattern = "/usr/bin/python3*".parse().unwrap();
        assert!(matches!(pattern.kind(), ExecutablePatternKind::Glob(_)));
        assert!(pattern.matches("/usr/bin/python3.12"));
        assert!(!pattern.matches("/usr/bin/python3/x"));
    }

    #[test]
    fn a_tree_is_everything_below_its_directory() {
        let pattern: ExecutablePattern = "/usr/lib/git-core/**".parse().unwrap();
        let ExecutablePatternKind::Tree { directory } = pattern.kind() else {
            panic!("not a tree: {pattern:?}");
        };
        assert_eq!(directory.to_string(), "/usr/lib/git-core");
        assert!(pattern.matches("/usr/lib/git-core/git"));
        assert!(pattern.matches("/usr/lib/git-core/a/b"));
        assert!(!pattern.matches("/usr/lib/git-core"));
        assert!(!pattern.matches("/usr/lib/git-core-2/git"));
        assert!(!pattern.matches("/usr/lib/git-core/../../bin/sh"));
    }

    #[test]
    fn every_executable_is_displayed_as_it_was_written() {
        for text in ["/bin/sh", "/usr/bin/*", "/opt/*/bin/**", "/**"] {
            assert_eq!(text.parse::<ExecutablePattern>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_executables_are_refused_with_their_reason() {
        let cases = [
            ("/", ExecutablePatternError::Root),
            ("/a/**/b", ExecutablePatternError::DoubleStar),
            ("/a**", ExecutablePatternError::DoubleStar),
            ("/a/**/**", ExecutablePatternError::DoubleStar),
            ("//**", ExecutablePatternError::Path(PathPatternError::EmptyName)),
            ("git", ExecutablePatternError::Path(PathPatternError::Relative)),
            ("**", ExecutablePatternError::Path(PathPatternError::Relative)),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<ExecutablePattern>(), Err(reason), "{text:?}");
        }
    }
}
