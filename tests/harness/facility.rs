//! What a kernel may lack so that an attack on it cannot be made at all.
//!
//! A kernel without SCTP has no way out by SCTP. That is no proof that a guard closes it, so a test
//! that finds its facility missing says so on a line of its own, which whoever counts the tests
//! takes off the passed ones. Where the row of a matrix declares what its kernel has
//! (`AGENTGUARD_KERNEL_HAS`, words separated by blanks), a missing facility that was declared fails
//! the test.
//!
//! Facilities are seen by using them, outside every workload, never by a version number.

use std::{
    fs,
    io::{self, Write as _},
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
    thread,
};

use socket2::{Domain, Protocol, Socket, Type};

/// What the row of a matrix says its kernel has.
const DECLARED: &str = "AGENTGUARD_KERNEL_HAS";

/// Something that not every supported kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Facility {
    /// Sockets of this family, type and protocol.
    Socket { word: &'static str, family: i32, kind: i32, protocol: i32 },
    /// An operation of `io_uring`, by its number.
    Ring { word: &'static str, operation: u8 },
    /// A network device of this kind.
    Device { kind: &'static str },
    /// Interpreters that a user namespace registers for itself (`binfmt_misc`). Where the machine has
    /// them for all, only its own root registers one, which is outside of what is promised.
    OwnFormats,
    /// The file of a device.
    DeviceFile { word: &'static str, path: &'static str },
    /// A network device that only the initial network namespace may have is no help: packets can be
    /// sent by what `ip mptcp` sets up.
    MultipathLimits,
}

/// Everything that a matrix can declare.
pub const ALL: [Facility; 23] = [
    Facility::SCTP,
    Facility::DCCP,
    Facility::MPTCP,
    Facility::UDP_LITE,
    Facility::SMC_OVER_IP,
    Facility::ALG,
    Facility::VSOCK,
    Facility::VSOCK_PACKETS,
    Facility::XDP,
    Facility::KEY,
    Facility::TIPC,
    Facility::RDS,
    Facility::KCM,
    Facility::SMC,
    Facility::NETLINK_DIAG,
    Facility::VETH,
    Facility::TUN,
    Facility::IPIP,
    Facility::RING_SEND,
    Facility::RING_SOCKET,
    Facility::RING_LISTEN,
    Facility::OwnFormats,
    Facility::MultipathLimits,
];

const STREAM: i32 = libc::SOCK_STREAM;
const RAW: i32 = libc::SOCK_RAW;
const SEQPACKET: i32 = libc::SOCK_SEQPACKET;

impl Facility {
    pub const SCTP: Self = Self::ip("sctp", STREAM, libc::IPPROTO_SCTP);
    pub const DCCP: Self = Self::ip("dccp", 6, libc::IPPROTO_DCCP);
    pub const MPTCP: Self = Self::ip("mptcp", STREAM, libc::IPPROTO_MPTCP);
    pub const UDP_LITE: Self = Self::ip("udp-lite", libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE);
    pub const SMC_OVER_IP: Self = Self::ip("smc-over-ip", STREAM, 256);
    pub const ALG: Self = Self::family("alg", libc::AF_ALG, SEQPACKET, 0);
    pub const VSOCK: Self = Self::family("vsock", libc::AF_VSOCK, STREAM, 0);
    pub const VSOCK_PACKETS: Self = Self::family("vsock-packets", libc::AF_VSOCK, SEQPACKET, 0);
    pub const XDP: Self = Self::family("xdp", libc::AF_XDP, RAW, 0);
    pub const KEY: Self = Self::family("key", libc::AF_KEY, RAW, 2);
    pub const TIPC: Self = Self::family("tipc", libc::AF_TIPC, SEQPACKET, 0);
    pub const RDS: Self = Self::family("rds", libc::AF_RDS, SEQPACKET, 0);
    pub const KCM: Self = Self::family("kcm", 41, SEQPACKET, 0);
    pub const SMC: Self = Self::family("smc", 43, STREAM, 0);
    pub const NETLINK_DIAG: Self =
        Self::family("netlink-diag", libc::AF_NETLINK, RAW, libc::NETLINK_SOCK_DIAG);
    pub const VETH: Self = Self::Device { kind: "veth" };
    pub const TUN: Self = Self::DeviceFile { word: "tun", path: "/dev/net/tun" };
    pub const IPIP: Self = Self::Device { kind: "ipip" };
    pub const RING_SEND: Self = Self::Ring { word: "io-uring-send", operation: 26 };
    pub const RING_SOCKET: Self = Self::Ring { word: "io-uring-socket", operation: 45 };
    pub const RING_LISTEN: Self = Self::Ring { word: "io-uring-listen", operation: 57 };

    /// Sockets of an IP protocol.
    #[must_use]
    pub const fn ip(word: &'static str, kind: i32, protocol: i32) -> Self {
        Self::Socket { word, family: libc::AF_INET, kind, protocol }
    }

    /// Sockets of a family that has no name here.
    #[must_use]
    pub const fn family(word: &'static str, family: i32, kind: i32, protocol: i32) -> Self {
        Self::Socket { word, family, kind, protocol }
    }

    /// The word by which a matrix declares it.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Socket { word, .. } | Self::Ring { word, .. } | Self::DeviceFile { word, .. } => {
                word
            }
            Self::Device { kind } => kind,
            Self::OwnFormats => "own-binfmt_misc",
            Self::MultipathLimits => "mptcp-join",
        }
    }

    /// Whether the running kernel has it.
    #[must_use]
    pub fn is_there(&self) -> bool {
        match *self {
            Self::Socket { family, kind, protocol, .. } => {
                let protocol = Some(Protocol::from(protocol));
                Socket::new(Domain::from(family), Type::from(kind), protocol).is_ok()
            }
            Self::Ring { operation, .. } => has_operation(operation).unwrap_or(false),
            Self::Device { kind } => has_device(kind),
            Self::OwnFormats => has_own_formats(),
            Self::DeviceFile { path, .. } => fs::File::open(path).is_ok(),
            Self::MultipathLimits => has_multipath_limits(),
        }
    }
}

/// Whether a test that needs all of `needs` can be made here. Says so where it cannot.
///
/// # Panics
///
/// When something is missing that the matrix declares.
#[track_caller]
#[must_use]
pub fn can_be_attacked_by(needs: &[Facility]) -> bool {
    let Some(missing) = needs.iter().find(|facility| !facility.is_there()) else {
        return true;
    };
    let word = missing.word();
    let declared = declared();
    assert!(
        !declared.split(' ').any(|declared| declared == word),
        "this kernel has no {word}, though {DECLARED} says that it has"
    );
    let current = thread::current();
    let name = current.name().unwrap_or("a test");
    // Not by `println!`: what passing tests print is kept back.
    let said = writeln!(io::stdout(), "not applicable: {name}: this kernel has no {word}");
    said.expect("standard output is open");
    false
}

/// Words that are declared of this kernel.
fn declared() -> String {
    std::env::var(DECLARED).unwrap_or_default()
}

/// What is declared of this kernel and missing from it, and words that nothing goes by, which would
/// promise nothing; what is there and not declared.
#[must_use]
pub fn compare_with_declared() -> (Vec<String>, Vec<&'static str>) {
    let declared = declared();
    let declared: Vec<&str> = declared.split_whitespace().collect();
    let missing = declared
        .iter()
        .filter(|word| !ALL.iter().any(|facility| facility.word() == **word && facility.is_there()))
        .map(|word| (*word).to_owned())
        .collect();
    let more = ALL
        .iter()
        .filter(|facility| !declared.contains(&facility.word()) && facility.is_there())
        .map(Facility::word)
        .collect();
    (missing, more)
}

fn has_operation(operation: u8) -> io::Result<bool> {
    let ring = io_uring::IoUring::new(2)?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    Ok(ring.as_raw_fd() >= 0 && probe.is_supported(operation))
}

fn has_device(kind: &str) -> bool {
    crate::world::in_own_network(&["ip", "link", "add", "probe", "type", kind])
}

fn has_multipath_limits() -> bool {
    Facility::ip("mptcp", libc::SOCK_STREAM, libc::IPPROTO_MPTCP).is_there()
        && crate::world::in_own_network(&["ip", "mptcp", "limits", "show"])
}

fn has_own_formats() -> bool {
    let Ok(directory) = tempfile::tempdir() else { return false };
    let mut mount = Command::new("unshare");
    mount.args(["--user", "--map-root-user", "--mount", "mount", "-t", "binfmt_misc", "none"]);
    mount.arg(directory.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // The mount ends with its namespace.
    mount.status().is_ok_and(|status| status.success())
}
