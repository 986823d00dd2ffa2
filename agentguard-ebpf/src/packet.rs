//! Every IP packet that leaves a socket of a workload's cgroup.
//!
//! This is the door behind the doors: it stops flows that outlive their grant, sockets whose
//! address was set where no other hook sees it, and what raw sockets send. It decides on the
//! socket's peer where the socket has one (the packet's own header may already be rewritten for a
//! service) and on the header where it has none.

use agentguard_common::event::{Hook, RequestKind};
use agentguard_common::request::ip;
use agentguard_common::{Action, Address, Destination, Endpoint, WorkloadId};
use aya_ebpf::bindings::{__sk_buff, bpf_hdr_start_off::BPF_HDR_START_NET, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_sk_fullsock, bpf_skb_load_bytes_relative};
use aya_ebpf::programs::SkBuffContext;

use crate::judge::{Classed, Destinations, Inquiry, Locals, action_of, judge_packet};
use crate::kernel;
use crate::maps::{self, Role, SocketVerdict};
use crate::record;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
/// `TCP_LISTEN` of the kernel.
const LISTEN: u32 = 10;
/// Jiffies for which a socket's verdict is given again unseen; see `judge`.
const FRESH_JIFFIES: u64 = 25;
/// Version 4 and five words: the first byte of an IPv4 header without options.
const IPV4_WITHOUT_OPTIONS: u8 = 0x45;
/// IPv6 extension headers (RFC 8200).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION_OPTIONS: u8 = 60;
/// IPv6 extension headers that are stepped over at the most.
const EXTENSION_HEADERS: usize = 6;

#[inline(always)]
pub(crate) fn egress(ctx: &SkBuffContext) -> Action {
    let skb = ctx.skb.skb;
    let attachment = maps::attachment();
    // SAFETY: the kernel passes a context that lives as long as the program runs; the verifier
    // makes sure that `sk` is checked before use.
    let socket = unsafe {
        let sk = (*skb).__bindgen_anon_2.sk;
        if sk.is_null() { sk } else { bpf_sk_fullsock(sk) }
    };
    // SAFETY: as above.
    let known = unsafe {
        match (socket.is_null(), attachment.workload.is_some()) {
            (true, _) => None,
            (false, true) => maps::socket_or_new(socket),
            (false, false) => maps::socket(socket),
        }
    };
    let Some(known) = known else {
        // No socket that could be known, or no memory to know it.
        if !attachment.workload.is_some() {
            return Action::Pass;
        }
        let inquiry = Inquiry::destination(Hook::Egress, RequestKind::Packet, header(skb));
        return judge_packet::<Destinations>(&inquiry, attachment.workload, 0);
    };
    let owner = match attachment.workload {
        WorkloadId::NONE => known.workload,
        workload => workload,
    };
    // In a cgroup of the host a socket whose workload is forgotten is nobody's.
    if !attachment.workload.is_some() && maps::tag(owner).is_none() {
        return Action::Pass;
    }
    if is_rerouted(skb) {
        return judge_packet::<Destinations>(
            &Inquiry::destination(Hook::Egress, RequestKind::Packet, None),
            owner,
            0,
        );
    }
    // SAFETY: as above.
    match unsafe { local(socket, known) } {
        Some(inquiry) => judge_on_socket::<Locals>(known, owner, &inquiry),
        None => {
            // SAFETY: as above.
            let inquiry = unsafe { peer(skb, socket) };
            judge_on_socket::<Destinations>(known, owner, &inquiry)
        }
    }
}

/// Gives the socket's last verdict again while nothing can have changed it.
#[inline(always)]
fn judge_on_socket<C: Classed>(
    known: &mut SocketVerdict,
    owner: WorkloadId,
    inquiry: &Inquiry,
) -> Action {
    let (target, port, protocol) = inquiry.target();
    let Some(tag) = maps::tag(owner) else {
        return judge_packet::<C>(inquiry, owner, 0);
    };
    let jiffies = kernel::jiffies();
    if jiffies < known.fresh_until
        && known.allowlist == tag.allowlist
        && known.workload == owner
        && known.target == target
        && known.port == port
        && known.protocol == protocol
    {
        let code = known.verdict;
        known.folded += 1;
        record::count_again(&tag, Hook::Egress, code);
        return action_of(code, tag.mode());
    }
    let folded = known.folded;
    known.folded = 0;
    known.fresh_until = 0;
    let action = judge_packet::<C>(inquiry, owner, folded);
    // What was just judged is in the cache of verdicts; the socket borrows its freshness.
    if let Some(cached) = maps::cached(&inquiry.key::<C>(owner, &tag)) {
        known.workload = owner;
        known.allowlist = tag.allowlist;
        known.target = target;
        known.port = port;
        known.protocol = protocol;
        known.verdict = cached.verdict as u8;
        let fresh = jiffies + FRESH_JIFFIES;
        known.fresh_until = if cached.fresh_until < fresh { cached.fresh_until } else { fresh };
    }
    action
}

/// A listener, and a socket accepted from one, answer to whoever connected: their packets ask for
/// the local port. `None` for all others.
///
/// # Safety
///
/// `socket` is a full socket.
#[inline(always)]
unsafe fn local(socket: *mut bpf_sock, known: &mut SocketVerdict) -> Option<Inquiry> {
    // SAFETY: the caller's promise.
    let (state, protocol, port) =
        unsafe { ((*socket).state, (*socket).protocol, (*socket).src_port as u16) };
    let protocol = ip::canonical(protocol)?;
    if protocol == ip::TCP && state == LISTEN {
        // The sockets it accepts start with a copy of this.
        known.role = Role::Server as u8;
        known.folded = 0;
    }
    if known.role != Role::Server as u8 || (protocol != ip::TCP && protocol != ip::SCTP) {
        return None;
    }
    let endpoint = Some(Endpoint { protocol, port });
    Some(Inquiry::endpoint(Hook::Egress, RequestKind::Reply, endpoint))
}

/// All other packets ask for the socket's peer, or for what the header says where there is none.
///
/// # Safety
///
/// `socket` is a full socket.
#[inline(always)]
unsafe fn peer(skb: *mut __sk_buff, socket: *mut bpf_sock) -> Inquiry {
    // SAFETY: the caller's promise.
    let (protocol, port, family) =
        unsafe { ((*socket).protocol, u16::from_be((*socket).dst_port), (*socket).family) };
    let mut destination = None;
    // Only where another hook has seen to it that the peer is where packets go: a ping socket or an
    // SCTP association sends elsewhere with no hook in between.
    if let Some(protocol @ (ip::TCP | ip::UDP)) = ip::canonical(protocol)
        && port != 0
    {
        // SAFETY: the caller's promise.
        let address = unsafe {
            match family {
                AF_INET => Some(Address::from_v4_word((*socket).dst_ip4)),
                AF_INET6 => Some(Address::from_v6_words([
                    core::ptr::read_volatile(&raw const (*socket).dst_ip6[0]),
                    core::ptr::read_volatile(&raw const (*socket).dst_ip6[1]),
                    core::ptr::read_volatile(&raw const (*socket).dst_ip6[2]),
                    core::ptr::read_volatile(&raw const (*socket).dst_ip6[3]),
                ])),
                _ => None,
            }
        };
        destination = address.map(|address| Destination { address, protocol, port });
    }
    if destination.is_none() {
        destination = header(skb);
    }
    Inquiry::destination(Hook::Egress, RequestKind::Packet, destination)
}

/// Whether the packet goes by way of somewhere else than the socket's peer: an option of the socket
/// (`IP_OPTIONS`, `IPV6_RTHDR`) or of one call puts another address in the header's place. No
/// privilege is needed for that over IPv6.
#[inline(always)]
fn is_rerouted(skb: *mut __sk_buff) -> bool {
    let Some([first, _, _, _, _, _, next]) = load::<7>(skb, 0) else { return true };
    match first {
        IPV4_WITHOUT_OPTIONS => false,
        first if first >> 4 == 6 => match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => header_v6(skb).is_none(),
            _ => false,
        },
        _ => true,
    }
}

/// Reads `N` bytes of the packet, from its network header on.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    // Not filled first: that would be a loop, which the verifier walks through byte by byte.
    let mut bytes = core::mem::MaybeUninit::<[u8; N]>::uninit();
    // SAFETY: the helper writes `N` bytes, whether it can read them or not.
    let status = unsafe {
        bpf_skb_load_bytes_relative(
            skb.cast(),
            offset,
            bytes.as_mut_ptr().cast(),
            N as u32,
            BPF_HDR_START_NET,
        )
    };
    // SAFETY: as above.
    if status == 0 { Some(unsafe { bytes.assume_init() }) } else { None }
}

/// Where the packet's own header says it goes; `None` if it can not be read.
#[inline(always)]
fn header(skb: *mut __sk_buff) -> Option<Destination> {
    let [first] = load::<1>(skb, 0)?;
    match first >> 4 {
        4 => header_v4(skb, first),
        6 => header_v6(skb),
        _ => None,
    }
}

#[inline(always)]
fn header_v4(skb: *mut __sk_buff, first: u8) -> Option<Destination> {
    let fragment = u16::from_be_bytes(load::<2>(skb, 6)?);
    let [protocol] = load::<1>(skb, 9)?;
    let address = Address::from_v4_word(u32::from_ne_bytes(load::<4>(skb, 16)?));
    // Packets pass here before they are cut into fragments; one that comes as a fragment was made
    // by hand, and a later fragment has no ports to judge. Options can name another destination.
    if fragment & 0x1fff != 0 || first != IPV4_WITHOUT_OPTIONS {
        return None;
    }
    transport(skb, 20, address, protocol)
}

#[inline(always)]
fn header_v6(skb: *mut __sk_buff) -> Option<Destination> {
    let [mut next] = load::<1>(skb, 6)?;
    let destination = load::<16>(skb, 24)?;
    let word = |at: usize| {
        u32::from_ne_bytes([
            destination[at],
            destination[at + 1],
            destination[at + 2],
            destination[at + 3],
        ])
    };
    let address = Address::from_v6_words([word(0), word(4), word(8), word(12)]);
    let mut offset = 40;
    for _ in 0..EXTENSION_HEADERS {
        match next {
            HOP_BY_HOP | DESTINATION_OPTIONS => {
                let [following, length] = load::<2>(skb, offset)?;
                next = following;
                offset += (u32::from(length) + 1) * 8;
            }
            // Source routing names the real destination elsewhere; fragments as for IPv4.
            ROUTING => return None,
            _ => return transport(skb, offset, address, next),
        }
    }
    None
}

#[inline(always)]
fn transport(
    skb: *mut __sk_buff,
    offset: u32,
    address: Address,
    protocol: u8,
) -> Option<Destination> {
    let protocol = ip::canonical(u32::from(protocol))?;
    let port = match protocol {
        ip::TCP | ip::UDP | ip::SCTP => u16::from_be_bytes(load::<2>(skb, offset + 2)?),
        _ => 0,
    };
    Some(Destination { address, protocol, port })
}
