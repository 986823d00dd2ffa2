//! Unix sockets: whose they are, and by what name their server bound them.
//!
//! A socket is known by the directory its server's bind made the entry in, and the entry's name:
//! not by the path the caller passed, which may lead there through any mount or link, and not by the
//! socket's own file, which is another after each start of the server.

use agentguard_common::allowlist::{UNIX_NAME_BYTES, UnixName};
use agentguard_common::event::{Hook, RequestKind};
use agentguard_common::request::family;
use agentguard_common::{Action, FileId, Peer, UnixNameId, UnixSocket, WorkloadId};
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::programs::LsmContext;

use crate::judge::{Inquiry, UnixSockets, caller_or_maker, judge_from};
use crate::kernel::{self, Sock, UnixAddress};
use crate::lsm::{context_word, foreign};
use crate::maps;
use crate::record::Origin;

/// Arguments: socket, the listening socket, the socket it makes for the connection (`struct sock`).
#[inline(always)]
pub(crate) fn stream_connect(ctx: &LsmContext) -> Action {
    let workload = caller_or_maker(Sock(context_word(ctx, 0)));
    if !workload.is_some() {
        return Action::Pass;
    }
    let other = Some(Sock(context_word(ctx, 1)));
    reach(Hook::UnixStreamConnect, RequestKind::UnixConnect, other, workload)
}

/// Arguments: socket, the receiving socket (`struct socket`). Asked at each datagram, and when a
/// datagram socket is connected.
#[inline(always)]
pub(crate) fn may_send(ctx: &LsmContext) -> Action {
    let Some(sock) = Sock::of_socket(context_word(ctx, 0)) else { return Action::Pass };
    let workload = caller_or_maker(sock);
    if !workload.is_some() {
        return Action::Pass;
    }
    let other = Sock::of_socket(context_word(ctx, 1));
    reach(Hook::UnixMaySend, RequestKind::UnixSend, other, workload)
}

/// Argument: the file that comes with a message, or out of another process. A connected unix socket
/// must lead to where the workload could have connected itself.
#[inline(always)]
pub(crate) fn receive(ctx: &LsmContext) -> Action {
    let Some(socket) = kernel::socket_of_file(context_word(ctx, 0)) else { return Action::Pass };
    let Some((sock, workload)) = foreign(socket) else { return Action::Pass };
    if sock.family() != family::UNIX {
        return Action::Pass;
    }
    match sock.unix_peer() {
        Some(peer) => reach(Hook::FileReceive, RequestKind::UnixConnect, Some(peer), workload),
        None => Action::Pass,
    }
}

#[inline(always)]
fn reach(hook: Hook, kind: RequestKind, other: Option<Sock>, workload: WorkloadId) -> Action {
    let Some(other) = other else {
        return judge_from::<UnixSockets>(&Inquiry::malformed(hook), workload, &Origin::Caller, 0);
    };
    let own = maps::member(other.cgroup()) == Some(workload);
    let Some(address) = UnixAddress::of(other) else {
        let peer = if own { Peer::Own } else { Peer::Unnamed };
        let inquiry = Inquiry::unix(hook, kind, &NAMELESS, peer);
        return judge_from::<UnixSockets>(&inquiry, workload, &Origin::Caller, 0);
    };
    let peer = if own { Peer::Own } else { Peer::Other };
    let socket = known_by(&address).unwrap_or(NAMELESS);
    let inquiry = Inquiry::unix(hook, kind, &socket, peer);
    let origin = Origin::Unix { name: address.name, length: address.length };
    judge_from::<UnixSockets>(&inquiry, workload, &origin, 0)
}

/// What no scope can name.
const NAMELESS: UnixSocket = UnixSocket { directory: 0, device: 0, name: UnixNameId::NONE };

/// What a bound socket is known by. `None`: it can not be read.
#[inline(always)]
fn known_by(address: &UnixAddress) -> Option<UnixSocket> {
    let nobody = |file: FileId| UnixSocket {
        directory: file.inode,
        device: file.device,
        name: UnixNameId::NONE,
    };
    if address.entry == 0 {
        // The first byte of an abstract name is NUL.
        let (text, length) = (address.name + 1, address.length.wrapping_sub(1));
        let name = UnixNameId(unix_name_number(ABSTRACT.into(), text, length));
        let directory =
            if name.is_some() { 0 } else { unix_name_sum(ABSTRACT.into(), text, length) };
        return Some(UnixSocket { directory, device: 0, name });
    }
    let (text, length) = kernel::name_of_entry(address.entry)?;
    let name = UnixNameId(unix_name_number(PATH.into(), text, length));
    if !name.is_some() || !was_bound_to(address, text, length) {
        // Nobody grants it: its own file tells it from others.
        return kernel::file_of_entry(address.entry).map(nobody);
    }
    let directory = kernel::file_of_entry(kernel::parent_of_entry(address.entry)?)?;
    Some(UnixSocket { name, ..nobody(directory) })
}

/// Whether the server bound the socket to this name: an entry can be given another since, by whoever
/// may write its directory.
#[inline(always)]
fn was_bound_to(address: &UnixAddress, text: u64, length: u32) -> bool {
    // The kernel keeps the path with its NUL (`unix_mkname_bsd`).
    let Some(start) = address.length.checked_sub(length.wrapping_add(1)) else { return false };
    let at = address.name + u64::from(start);
    let begins = start == 0 || kernel::read_at::<u8>(at - 1) == Some(b'/');
    begins && unix_name_sum(PATH.into(), at, length) == unix_name_sum(PATH.into(), text, length)
}

/// The number of a name; zero if no scope mentions it. A global function, whose stack is its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn unix_name_number(kind: u32, text: u64, length: u32) -> u32 {
    Name::read(kind as u16, text, length).map_or(UnixNameId::NONE, |name| name.number()).0
}

/// Tells names apart that nobody who gains by a collision chooses both of; zero for what can not be
/// read. A global function as well.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn unix_name_sum(kind: u32, text: u64, length: u32) -> u64 {
    Name::read(kind as u16, text, length).map_or(0, |name| name.sum())
}

/// The kinds of [`UnixName`].
const PATH: u16 = 0;
const ABSTRACT: u16 = 1;
/// Bytes of a [`UnixName`] before its text.
const TEXT: usize = size_of::<UnixName>() - UNIX_NAME_BYTES;
/// What the verifier takes for the longest length of a name.
const LENGTH_MASK: u64 = 127;
/// Room for a head and as much text as the mask lets through.
const WORDS: usize = (TEXT + LENGTH_MASK as usize).div_ceil(8);

/// A name as the key of its number, as whole words: zeroed bytes would be a loop.
struct Name([u64; WORDS]);

impl Name {
    /// `None`: it is no name that a scope could mention.
    #[inline(always)]
    fn read(kind: u16, text: u64, length: u32) -> Option<Self> {
        if length == 0 || length > UNIX_NAME_BYTES as u32 {
            return None;
        }
        let mut name = core::mem::MaybeUninit::<Self>::uninit();
        let words = name.as_mut_ptr().cast::<u64>();
        let length = kernel::opaque(length.into()) & LENGTH_MASK;
        // SAFETY: all within a local. Volatile, so that it does not become a call of `memset`; the
        // text has room for as many bytes as the mask lets through.
        unsafe {
            words.write_volatile(u64::from(kind) | length << 16);
            for index in 1..WORDS {
                words.add(index).write_volatile(0);
            }
            let room = words.cast::<u8>().add(TEXT);
            let status =
                bpf_probe_read_kernel(room.cast(), length as u32, text as *const core::ffi::c_void);
            if status == 0 { Some(name.assume_init()) } else { None }
        }
    }

    #[inline(always)]
    fn number(&self) -> UnixNameId {
        // SAFETY: at least as large, and every byte of it was written.
        maps::unix_name(unsafe { &*self.0.as_ptr().cast::<UnixName>() })
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        // FNV-1a over words (RFC 9923).
        let mut sum = 0xcbf2_9ce4_8422_2325_u64;
        for word in &self.0 {
            sum = (sum ^ *word).wrapping_mul(0x0100_0000_01b3);
            sum ^= sum >> 32;
        }
        sum
    }
}
