//! What a process in a container asks of the kernel, and how each attempt ended.
//!
//! Its one job is the words that the program in the container and the test outside share.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Something to ask for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ask {
    /// A TCP connect.
    Tcp(SocketAddr),
    /// A connect of a datagram socket and a send on it.
    Udp(SocketAddr),
    /// A send on a datagram socket that is not connected.
    SendTo(SocketAddr),
    /// A child that runs this file.
    Exec(PathBuf),
}

impl Ask {
    /// Reads what its `Display` writes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, target) = text.split_once(',')?;
        Some(match kind {
            "tcp" => Self::Tcp(target.parse().ok()?),
            "udp" => Self::Udp(target.parse().ok()?),
            "sendto" => Self::SendTo(target.parse().ok()?),
            "exec" => Self::Exec(target.into()),
            _ => return None,
        })
    }
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp,{address}"),
            Self::Udp(address) => write!(f, "udp,{address}"),
            Self::SendTo(address) => write!(f, "sendto,{address}"),
            Self::Exec(path) => write!(f, "exec,{}", path.display()),
        }
    }
}

/// How one attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// It was done.
    Allowed,
    /// The call failed with this number.
    Errno(i32),
    /// What was run was killed.
    Killed,
    /// What was run ended otherwise than it does when nobody interferes.
    Otherwise,
}

/// How the attempts at one thing ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub ask: Ask,
    /// The first one, which is the one that a guard which comes late misses.
    pub first: Ended,
    pub allowed: u64,
    pub killed: u64,
    pub otherwise: u64,
    /// How many failed, by number.
    pub errnos: BTreeMap<i32, u64>,
}

impl Tally {
    /// None yet but the first.
    #[must_use]
    pub fn begin(ask: Ask, first: Ended) -> Self {
        let mut tally =
            Self { ask, first, allowed: 0, killed: 0, otherwise: 0, errnos: BTreeMap::new() };
        tally.add(first);
        tally
    }

    /// Counts one more.
    pub fn add(&mut self, ended: Ended) {
        match ended {
            Ended::Allowed => self.allowed += 1,
            Ended::Killed => self.killed += 1,
            Ended::Otherwise => self.otherwise += 1,
            Ended::Errno(number) => *self.errnos.entry(number).or_default() += 1,
        }
    }

    /// How many there were.
    #[must_use]
    pub fn attempts(&self) -> u64 {
        self.allowed + self.killed + self.otherwise + self.errnos.values().sum::<u64>()
    }

    /// How many were refused as a guard refuses: with `EPERM`, or by ending what was run.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.killed + self.errnos.get(&libc::EPERM).copied().unwrap_or_default()
    }
}

/// What the program says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// When it began, in nanoseconds since boot: its first instructions of its own.
    pub began: u64,
    /// In the order in which it was asked.
    pub tallies: Vec<Tally>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_read_back() {
        for text in ["tcp,192.0.2.10:443", "udp,[2001:db8::10]:53", "sendto,192.0.2.10:9"] {
            assert_eq!(Ask::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Ask::parse("exec,/bin/tool"), Some(Ask::Exec("/bin/tool".into())));
        for text in ["tcp", "tcp,here", "ping,192.0.2.10:1", ""] {
            assert_eq!(Ask::parse(text), None, "{text}");
        }
    }

    #[test]
    fn every_attempt_is_counted_once() {
        let mut tally = Tally::begin(Ask::Exec("/bin/tool".into()), Ended::Killed);
        for ended in
            [Ended::Allowed, Ended::Errno(1), Ended::Errno(111), Ended::Errno(1), Ended::Otherwise]
        {
            tally.add(ended);
        }
        assert_eq!((tally.attempts(), tally.refused(), tally.allowed), (6, 3, 1));
    }
}
