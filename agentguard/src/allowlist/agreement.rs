//! Whether the compiled tables decide as the specification does, over random permits.
//!
//! The generators draw from few addresses, ports and times, so that blocks nest, touch, repeat and
//! except one another, and ask at the edges of what they drew.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use agentguard_common::{
    Address, AllowlistId, Destination, Endpoint, FileId, GrantId, IdentityId, Mode, Naming, Peer,
    Protocol, Reason, Request, RuleSetId, ScopeId, Tag, UnixNameId, UnixSocket, Verdict,
    allowlist::NEVER, decide,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::{prelude::*, sample::Index, strategy::ValueTree, test_runner::TestRunner};

use super::{
    Block, EgressPermit, Permit, PortRange,
    compile::{CompiledAllowlist, compile, compile_within},
    reserved::Reserved,
    specification::Specification,
    tables::TableSet,
};

const ALLOWLIST: AllowlistId = AllowlistId(7);
const OTHER_ALLOWLIST: AllowlistId = AllowlistId(6);

/// What the decision needs, loaded beside an allow-list that permits everything.
pub(super) fn load(compiled: &CompiledAllowlist) -> (TableSet, Tag) {
    let everything = Permit {
        scope: ScopeId(99),
        grant: GrantId(99),
        expires_at: NEVER,
        egress: vec![EgressPermit {
            blocks: ["0.0.0.0/0", "::/0", "169.254.169.254/32", "10.0.0.1/32"]
                .map(|cidr| Block { cidr: cidr.parse().unwrap(), except: vec![] })
                .to_vec(),
            ports: vec![PortRange { protocol: Protocol::Any, first: 0, last: u16::MAX }],
        }],
        executables: vec![FileId { inode: 1, device: 1, generation: 0 }],
        unix_sockets: vec![UnixSocket { directory: 1, device: 1, name: UnixNameId(1) }],
        listening: vec![PortRange { protocol: Protocol::Any, first: 0, last: u16::MAX }],
    };
    let mut tables = TableSet::default();
    let other = compile(&[everything]).unwrap().rows(OTHER_ALLOWLIST, RuleSetId(1)).unwrap();
    let first = RuleSetId(1 + other.rules.len() as u32);
    let rows = compiled.rows(ALLOWLIST, first).unwrap();
    let tag = Tag::new(IdentityId(1), Mode::Enforce, ALLOWLIST, rows.listening, 0);
    tables.load(other).unwrap();
    tables.load(rows).unwrap();
    (tables, tag)
}

/// An IPv4 CIDR in one of its spellings, or an IPv6 CIDR; host bits are not always zero.
pub(super) fn any_cidr() -> impl Strategy<Value = IpNet> {
    let v4_length = prop_oneof![
        2 => prop::sample::select(vec![0_u8, 8, 16, 24, 30, 31, 32]),
        1 => 0_u8..=32,
        1 => Just(32),
    ];
    let v6_length = prop_oneof![
        3 => prop::sample::select(vec![0_u8, 1, 3, 15, 16, 17, 48, 64, 80, 95, 96, 97, 126, 127]),
        1 => 0_u8..=128,
        1 => Just(128),
    ];
    prop_oneof![
        6 => (v4_anchor(), v4_length, 0_usize..8)
            .prop_map(|(address, length, form)| spell_cidr(address, length, form)),
        4 => (v6_anchor(), v6_length)
            .prop_map(|(address, length)| IpNet::V6(Ipv6Net::new(address, length).unwrap())),
    ]
}

fn v4_anchor() -> impl Strategy<Value = Ipv4Addr> {
    let base = prop::sample::select(vec![
        0x0a00_0000_u32, // 10.0.0.0
        0x0a00_0080,     // 10.0.0.128
        0x0a01_0000,     // 10.1.0.0
        0xa9fe_a9fe,     // 169.254.169.254, metadata
        0xa9fe_a9fc,     // 169.254.169.252
        0x7f00_0000,     // 127.0.0.0
        0x0000_0000,
        0xffff_fffc,
    ]);
    (base, 0_u32..4).prop_map(|(base, offset)| base.wrapping_add(offset).into())
}

fn v6_anchor() -> impl Strategy<Value = Ipv6Addr> {
    let base = prop::sample::select(
        [
            "::",
            "2001:db8::",
            "2001:db8:0:0:8000::",
            "fd00:ec2::254",
            "fd00:ec2::",
            "::fffe:ffff:fffc",
            "::ffff:0:0",
            "::1:0:0:0",
            "::ffff:0:0:0",
            "64:ff9b::",
            "64:ff9b::1:0:0:0",
            "2001:ffff:ffff:ffff:ffff:ffff:ffff:fffe",
            "2002::",
            "2002:a00:1::",
            "2003::",
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc",
        ]
        .map(|text| u128::from(text.parse::<Ipv6Addr>().unwrap()))
        .to_vec(),
    );
    (base, 0_u128..4).prop_map(|(base, offset)| base.wrapping_add(offset).into())
}

/// The IPv6 spellings of an IPv4 address; `below` is what a 6to4 address says beyond it.
fn spell(address: Ipv4Addr, form: usize, below: u16) -> IpAddr {
    let embedded = u128::from(u32::from(address));
    let bits = match form {
        0 => (0xffff << 32) | embedded,
        1 => embedded,
        2 => (0xffff << 48) | embedded,
        3 => (0x0064_ff9b << 96) | embedded,
        4 => (0x2002 << 112) | (embedded << 80) | u128::from(below),
        _ => return IpAddr::V4(address),
    };
    IpAddr::V6(bits.into())
}

fn spell_cidr(address: Ipv4Addr, length: u8, form: usize) -> IpNet {
    match spell(address, form, 0) {
        IpAddr::V4(address) => IpNet::V4(Ipv4Net::new(address, length).unwrap()),
        IpAddr::V6(address) => {
            let length = match (form, length) {
                // A 6to4 prefix that goes on beyond the IPv4 address.
                (4, 32) => 64,
                (4, length) => 16 + length,
                (_, length) => 96 + length,
            };
            IpNet::V6(Ipv6Net::new(address, length).unwrap())
        }
    }
}

/// How an exception is drawn, given the CIDR that it belongs to.
#[derive(Clone, Debug)]
enum AnyExcept {
    Free(IpNet),
    /// The same block, or one around it.
    Around(u8),
    /// The first or the last block inside that is this much longer.
    Edge {
        longer: u8,
        last: bool,
    },
}

fn any_except() -> impl Strategy<Value = AnyExcept> {
    prop_oneof![
        2 => any_cidr().prop_map(AnyExcept::Free),
        1 => (0_u8..3).prop_map(AnyExcept::Around),
        4 => (prop_oneof![0_u8..4, 0_u8..128], any::<bool>())
            .prop_map(|(longer, last)| AnyExcept::Edge { longer, last }),
    ]
}

fn except(cidr: &IpNet, except: AnyExcept) -> IpNet {
    match except {
        AnyExcept::Free(except) => except,
        AnyExcept::Around(shorter) => {
            let length = cidr.prefix_len().saturating_sub(shorter);
            IpNet::new(cidr.addr(), length).unwrap()
        }
        AnyExcept::Edge { longer, last } => {
            let length = cidr.prefix_len().saturating_add(longer).min(cidr.max_prefix_len());
            let address = if last { cidr.broadcast() } else { cidr.network() };
            IpNet::new(address, length).unwrap()
        }
    }
}

fn any_block() -> impl Strategy<Value = Block> {
    (any_cidr(), prop::collection::vec(any_except(), 0..4)).prop_map(|(cidr, excepts)| Block {
        cidr,
        except: excepts.into_iter().map(|drawn| except(&cidr, drawn)).collect(),
    })
}

fn any_port() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![0_u16, 1, 79, 80, 81, 82, 443, 444, 65534, 65535])
}

fn any_range() -> impl Strategy<Value = PortRange> {
    let whole = prop::sample::select(vec![Protocol::Any, Protocol::Icmp, Protocol::Tcp])
        .prop_map(|protocol| PortRange { protocol, first: 0, last: u16::MAX });
    let part = (prop::sample::select(Protocol::ALL.to_vec()), any_port(), any_port());
    prop_oneof![
        1 => whole,
        // Now and then the wrong way round, which permits nothing.
        4 => part.prop_map(|(protocol, first, last)| {
            let (first, last) = if last == 1 { (first, last) } else {
                (first.min(last), first.max(last))
            };
            PortRange { protocol, first, last }
        }),
    ]
}

fn any_file() -> impl Strategy<Value = FileId> {
    (1_u64..4, 1_u32..3, 0_u32..3).prop_map(|(inode, device, generation)| FileId {
        inode,
        device,
        generation,
    })
}

/// In a directory or abstract; now and then with a name that has no number.
fn any_unix_socket() -> impl Strategy<Value = UnixSocket> {
    let directory = prop::sample::select(vec![(0_u64, 0_u32), (1, 1), (1, 2), (2, 1)]);
    (directory, prop::sample::select(vec![0_u32, 1, 1, 2, 2, 3])).prop_map(
        |((directory, device), name)| UnixSocket { directory, device, name: UnixNameId(name) },
    )
}

fn any_permit() -> impl Strategy<Value = Permit> {
    let egress =
        (prop::collection::vec(any_block(), 0..4), prop::collection::vec(any_range(), 0..4))
            .prop_map(|(blocks, ports)| EgressPermit { blocks, ports });
    (
        1_u32..4,
        1_u32..4,
        prop::sample::select(vec![0, 1, 50, 100, 100, 101, 150, NEVER, NEVER]),
        prop::collection::vec(egress, 0..3),
        prop::collection::vec(any_file(), 0..3),
        prop::collection::vec(any_unix_socket(), 0..3),
        prop::collection::vec(any_range(), 0..3),
    )
        .prop_map(
            |(scope, grant, expires_at, egress, executables, unix_sockets, listening)| Permit {
                scope: ScopeId(scope),
                grant: GrantId(grant),
                expires_at,
                egress,
                executables,
                unix_sockets,
                listening,
            },
        )
}

/// Several permits, some of which give the same as another under another grant.
fn any_permits() -> impl Strategy<Value = Vec<Permit>> {
    let again = (any::<Index>(), 1_u32..4, prop::sample::select(vec![50, 100, 150, NEVER]));
    (prop::collection::vec(any_permit(), 0..5), prop::option::of(again)).prop_map(
        |(mut permits, again)| {
            if let Some((index, grant, expires_at)) = again
                && !permits.is_empty()
            {
                let given = index.get(&permits).clone();
                permits.push(Permit { grant: GrantId(grant), expires_at, ..given });
            }
            permits
        },
    )
}

/// Addresses of the cluster's own: often none, as outside of one.
fn any_reserved() -> impl Strategy<Value = Vec<IpNet>> {
    prop_oneof![
        1 => Just(Vec::new()),
        2 => prop::collection::vec(any_cidr(), 1..5),
    ]
}

fn any_time() -> impl Strategy<Value = u64> {
    prop::sample::select(vec![0, 1, 49, 50, 99, 100, 101, 149, 150, NEVER - 1])
}

/// How a destination is drawn, given the permits.
#[derive(Clone, Debug)]
enum AnyTarget {
    V4(Ipv4Addr, usize),
    V6(Ipv6Addr),
    /// Before, at the beginning, at the end of, and behind a block or an exception.
    Edge(Index, usize),
}

fn any_target() -> impl Strategy<Value = AnyTarget> {
    prop_oneof![
        1 => (v4_anchor(), 0_usize..6).prop_map(|(address, form)| AnyTarget::V4(address, form)),
        1 => v6_anchor().prop_map(AnyTarget::V6),
        8 => (any::<Index>(), 0_usize..4).prop_map(|(cidr, edge)| AnyTarget::Edge(cidr, edge)),
    ]
}

fn target(cidrs: &[IpNet], drawn: &AnyTarget) -> Address {
    match drawn {
        AnyTarget::V4(address, form) => spell(*address, *form, 5).into(),
        AnyTarget::V6(address) => (*address).into(),
        AnyTarget::Edge(..) if cidrs.is_empty() => Address::LOOPBACK_V4,
        AnyTarget::Edge(index, edge) => match index.get(cidrs) {
            IpNet::V4(cidr) => {
                let (first, last) = (u32::from(cidr.network()), u32::from(cidr.broadcast()));
                let edges = [first.wrapping_sub(1), first, last, last.wrapping_add(1)];
                Ipv4Addr::from(edges[*edge]).into()
            }
            IpNet::V6(cidr) => {
                let (first, last) = (u128::from(cidr.network()), u128::from(cidr.broadcast()));
                let edges = [first.wrapping_sub(1), first, last, last.wrapping_add(1)];
                Ipv6Addr::from(edges[*edge]).into()
            }
        },
    }
}

#[derive(Clone, Debug)]
enum AnyRequest {
    Destination { target: AnyTarget, protocol: u8, port: u16, kind: u8 },
    Endpoint { protocol: u8, port: u16, kind: u8 },
    Exec(FileId, Naming),
    Unix { socket: UnixSocket, peer: Peer, send: bool },
    Socket { family: u16, protocol: u16 },
}

fn any_naming() -> impl Strategy<Value = Naming> {
    prop_oneof![
        8 => Just(Naming::Named),
        1 => Just(Naming::Unnamed),
        1 => Just(Naming::Starting),
    ]
}

fn any_request() -> impl Strategy<Value = AnyRequest> {
    // Those that scopes name, one that none names, and the one of the rule that permits nothing.
    let protocol = || prop::sample::select(vec![6_u8, 6, 6, 17, 1, 132, 0, 47, 255]);
    prop_oneof![
        8 => (any_target(), protocol(), any_port(), 0_u8..3).prop_map(
            |(target, protocol, port, kind)| AnyRequest::Destination {
                target, protocol, port, kind,
            }
        ),
        3 => (protocol(), any_port(), 0_u8..4).prop_map(
            |(protocol, port, kind)| AnyRequest::Endpoint { protocol, port, kind }
        ),
        1 => (any_file(), any_naming())
            .prop_map(|(file, naming)| AnyRequest::Exec(file, naming)),
        2 => (any_unix_socket(), any_peer(), any::<bool>())
            .prop_map(|(socket, peer, send)| AnyRequest::Unix { socket, peer, send }),
        1 => (any_family(), prop::sample::select(vec![0_u16, 0, 1, 6, 9]))
            .prop_map(|(family, protocol)| AnyRequest::Socket { family, protocol }),
    ]
}

fn any_peer() -> impl Strategy<Value = Peer> {
    prop::sample::select(vec![Peer::Other, Peer::Other, Peer::Other, Peer::Own, Peer::Unnamed])
}

/// Those that need no permission, those beside them in number, and others that exist.
fn any_family() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![0_u16, 1, 2, 3, 9, 10, 11, 15, 16, 16, 17, 38, 40, 44, u16::MAX])
}

fn request(cidrs: &[IpNet], drawn: &AnyRequest) -> Request {
    match drawn {
        AnyRequest::Destination { target: drawn, protocol, port, kind } => {
            let address = target(cidrs, drawn);
            let destination = Destination { address, protocol: *protocol, port: *port };
            match kind {
                0 => Request::Connect(destination),
                1 => Request::Send(destination),
                _ => Request::Packet(destination),
            }
        }
        AnyRequest::Endpoint { protocol, port, kind } => {
            let endpoint = Endpoint { protocol: *protocol, port: *port };
            match kind {
                0 => Request::Reply(endpoint),
                1 => Request::Bind(endpoint),
                2 => Request::Listen(endpoint),
                _ => Request::Accept(endpoint),
            }
        }
        AnyRequest::Unix { socket, peer, send: false } => Request::UnixConnect(*socket, *peer),
        AnyRequest::Unix { socket, peer, send: true } => Request::UnixSend(*socket, *peer),
        AnyRequest::Socket { family, protocol } => {
            Request::Socket { family: *family, protocol: *protocol }
        }
        AnyRequest::Exec(file, naming) => Request::Exec(*file, *naming),
    }
}

fn cidrs(permits: &[Permit]) -> Vec<IpNet> {
    permits
        .iter()
        .flat_map(|permit| &permit.egress)
        .flat_map(|egress| &egress.blocks)
        .flat_map(|block| [block.cidr].into_iter().chain(block.except.iter().copied()))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn compiled_tables_decide_as_the_specification_does(
        permits in any_permits(),
        reserved in any_reserved(),
        drawn in prop::collection::vec(any_request(), 12),
        now in any_time(),
    ) {
        let specification = Specification::within(&permits, &reserved);
        let compiled = compile_within(&permits, &Reserved::new(&reserved)).unwrap();
        let (tables, tag) = load(&compiled);
        let cidrs = [cidrs(&permits), reserved].concat();
        for drawn in &drawn {
            let request = request(&cidrs, drawn);
            prop_assert_eq!(
                decide(&tables, &tag, &request, now),
                specification.decide(&request, now),
                "{:?}", request
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn the_order_of_permits_and_blocks_changes_nothing(
        permits in any_permits(),
        turn in any::<Index>(),
    ) {
        let compiled = compile(&permits).unwrap();
        let mut turned = permits;
        if !turned.is_empty() {
            let middle = turn.index(turned.len());
            turned.rotate_left(middle);
        }
        for permit in &mut turned {
            permit.egress.reverse();
            permit.executables.reverse();
            permit.listening.reverse();
            for egress in &mut permit.egress {
                egress.blocks.reverse();
                egress.ports.reverse();
            }
        }
        prop_assert_eq!(compile(&turned).unwrap(), compiled);
    }
}

#[test]
fn the_generators_reach_every_verdict_often() {
    const CASES: usize = 1_000;
    let mut runner = TestRunner::deterministic();
    let drawn = (any_permits(), prop::collection::vec(any_request(), 12), any_time());
    let mut reached: BTreeMap<u8, usize> = BTreeMap::new();
    let mut others: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for _ in 0..CASES {
        let (permits, requests, now) = drawn.new_tree(&mut runner).unwrap().current();
        let specification = Specification::new(&permits);
        let cidrs = cidrs(&permits);
        for drawn in &requests {
            let request = request(&cidrs, drawn);
            let verdict = specification.decide(&request, now).verdict;
            *reached.entry(verdict.code()).or_default() += 1;
            if let Some(kind) = of_others(&request) {
                *others.entry((kind, verdict.as_str())).or_default() += 1;
            }
        }
    }
    for verdict in [
        Verdict::Allow,
        Verdict::Deny(Reason::NotGranted),
        Verdict::Deny(Reason::PortNotGranted),
        Verdict::Deny(Reason::Excepted),
        Verdict::Deny(Reason::Expired),
        Verdict::Deny(Reason::Metadata),
        Verdict::Deny(Reason::UnnamedFile),
        Verdict::Deny(Reason::ReplacedFile),
        Verdict::Deny(Reason::SocketFamily),
    ] {
        let times = reached.get(&verdict.code()).copied().unwrap_or_default();
        assert!(times >= CASES / 50, "{verdict:?} {times} times of {reached:?}");
    }
    for kind in ["own", "unnamed", "other", "listen", "accept", "socket", "start"] {
        for verdict in ["allow", "deny"] {
            let is_possible = !matches!((kind, verdict), ("own" | "unnamed" | "start", "deny"));
            let times = others.get(&(kind, verdict)).copied().unwrap_or_default();
            assert_eq!(times >= CASES / 50, is_possible, "{kind} {verdict} of {others:?}");
        }
    }
}

/// What the LSM layer asks, and what starts a container.
fn of_others(request: &Request) -> Option<&'static str> {
    match request {
        Request::UnixConnect(_, peer) | Request::UnixSend(_, peer) => Some(match peer {
            Peer::Own => "own",
            Peer::Unnamed => "unnamed",
            Peer::Other => "other",
        }),
        Request::Listen(_) => Some("listen"),
        Request::Accept(_) => Some("accept"),
        Request::Socket { .. } => Some("socket"),
        Request::Exec(_, Naming::Starting) => Some("start"),
        Request::Connect(_)
        | Request::Send(_)
        | Request::Packet(_)
        | Request::Reply(_)
        | Request::Bind(_)
        | Request::RawSocket { .. }
        | Request::Exec(..)
        | Request::Leave(_)
        | Request::Malformed => None,
    }
}
