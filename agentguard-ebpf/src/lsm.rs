//! What the BPF LSM adds to the doors of sockets: families, listening and accepting, and sockets
//! that another cgroup made, which the portable hooks judge by that cgroup or not at all.
//!
//! What a portable hook judges is passed by here unseen, so that a request has one verdict, one
//! count and one record whichever layers are in force.

use agentguard_common::event::{Hook, RequestKind};
use agentguard_common::request::{family, ip};
use agentguard_common::{Action, Address, Destination, Endpoint, WorkloadId};
use aya_ebpf::programs::LsmContext;

use crate::judge::{Destinations, Families, Inquiry, Locals, Others, Servers, caller_in, judge};
use crate::kernel::{self, Sock};
use crate::maps;

const AF_UNSPEC: u16 = 0;
/// `SOCK_DGRAM` and `SOCK_RAW` of the kernel's ABI.
const DATAGRAM: u16 = 2;
const RAW: u16 = 3;
/// Bytes of `struct sockaddr_in` up to the end of the address.
const SOCKADDR_IN: u32 = 8;
/// Bytes of `struct sockaddr_in6` up to the end of the address (`SIN6_LEN_RFC2133`).
const SOCKADDR_IN6: u32 = 24;

/// The workload that calls.
#[inline(always)]
pub(crate) fn caller() -> WorkloadId {
    caller_in(kernel::current_cgroup())
}

/// Arguments: family, type, protocol, whether it is for the kernel itself.
#[inline(always)]
pub(crate) fn create(ctx: &LsmContext) -> Action {
    let (family, protocol, for_kernel): (i32, i32, i32) = (ctx.arg(0), ctx.arg(2), ctx.arg(3));
    let family = family as u16;
    match family {
        family::UNIX | family::INET | family::INET6 => return Action::Pass,
        _ if for_kernel != 0 => return Action::Pass,
        _ => {}
    }
    let workload = caller();
    if !workload.is_some() {
        return Action::Pass;
    }
    judge::<Families>(&Inquiry::family(Hook::SocketCreate, family, protocol as u16), workload)
}

/// Arguments: socket, backlog.
#[inline(always)]
pub(crate) fn listen(ctx: &LsmContext) -> Action {
    serve(Hook::SocketListen, RequestKind::Listen, ctx)
}

/// Arguments: listening socket, socket for the connection.
#[inline(always)]
pub(crate) fn accept(ctx: &LsmContext) -> Action {
    serve(Hook::SocketAccept, RequestKind::Accept, ctx)
}

#[inline(always)]
fn serve(hook: Hook, kind: RequestKind, ctx: &LsmContext) -> Action {
    let workload = caller();
    if !workload.is_some() {
        return Action::Pass;
    }
    let Some(sock) = Sock::of_socket(socket(ctx)) else { return Action::Pass };
    match sock.family() {
        family::INET | family::INET6 => {}
        // What a unix socket takes is the other end's to ask for.
        _ => return Action::Pass,
    }
    let endpoint = ip::canonical(sock.protocol().into())
        .map(|protocol| Endpoint { protocol, port: sock.local_port() });
    judge::<Servers>(&Inquiry::endpoint(hook, kind, endpoint), workload)
}

/// Arguments: socket, address, its length.
#[inline(always)]
pub(crate) fn connect(ctx: &LsmContext) -> Action {
    let Some((sock, workload)) = foreign(socket(ctx)) else { return Action::Pass };
    let (address, length): (u64, i32) = (context_word(ctx, 1), ctx.arg(2));
    match sock.family() {
        family::UNIX => Action::Pass,
        family::INET | family::INET6 => {
            let named = match kernel::read_at::<u16>(address) {
                // Ends an association, and asks for nothing.
                Some(AF_UNSPEC) => return Action::Pass,
                Some(_) => destination(sock, address, length as u32),
                None => Named::Here(None),
            };
            let destination = match named {
                Named::Here(destination) => destination,
                Named::Nothing => None,
            };
            to(Hook::SocketConnect, RequestKind::Connect, destination, workload)
        }
        other => {
            let inquiry = Inquiry::family(Hook::SocketConnect, other, sock.protocol());
            judge::<Families>(&inquiry, workload)
        }
    }
}

/// Arguments: socket, message, size.
#[inline(always)]
pub(crate) fn sendmsg(ctx: &LsmContext) -> Action {
    let Some((sock, workload)) = foreign(socket(ctx)) else { return Action::Pass };
    match sock.family() {
        // What it is connected to was judged when it was received; without that, at each datagram.
        family::UNIX => return Action::Pass,
        family::INET | family::INET6 => {}
        other => {
            let inquiry = Inquiry::family(Hook::SocketSendmsg, other, sock.protocol());
            return judge::<Families>(&inquiry, workload);
        }
    }
    let named = match kernel::message_address(context_word(ctx, 1)) {
        // Only a datagram goes where the call says; all else that is connected goes to its peer.
        Some((address, length)) if sock.kind() == DATAGRAM || sock.peer_port() == 0 => {
            destination(sock, address, length)
        }
        Some(_) | None => Named::Nothing,
    };
    send(Hook::SocketSendmsg, sock, named, workload)
}

/// Argument: the file that comes with a message, or out of another process. A socket among them must
/// lead to where the workload could have connected itself; what it does with it later is asked again.
#[inline(always)]
pub(crate) fn receive(ctx: &LsmContext) -> Action {
    let Some(socket) = kernel::socket_of_file(context_word(ctx, 0)) else { return Action::Pass };
    let Some((sock, workload)) = foreign(socket) else { return Action::Pass };
    match sock.family() {
        // The other program on this hook has those.
        family::UNIX => Action::Pass,
        family::INET | family::INET6 if sock.is_listening() => {
            let endpoint = ip::canonical(sock.protocol().into())
                .map(|protocol| Endpoint { protocol, port: sock.local_port() });
            let inquiry = Inquiry::endpoint(Hook::FileReceive, RequestKind::Accept, endpoint);
            judge::<Servers>(&inquiry, workload)
        }
        // Where it goes is asked when it connects or sends.
        family::INET | family::INET6 if sock.peer_port() == 0 && sock.kind() != RAW => Action::Pass,
        family::INET | family::INET6 => send(Hook::FileReceive, sock, Named::Nothing, workload),
        other => {
            let inquiry = Inquiry::family(Hook::FileReceive, other, sock.protocol());
            judge::<Families>(&inquiry, workload)
        }
    }
}

/// Judges a send on an IP socket from elsewhere.
#[inline(always)]
fn send(hook: Hook, sock: Sock, named: Named, workload: WorkloadId) -> Action {
    if sock.kind() == RAW {
        let protocol = ip::canonical(sock.protocol().into()).unwrap_or(0);
        return judge::<Others>(&Inquiry::raw_socket(hook, protocol), workload);
    }
    let destination = match named {
        Named::Here(destination) => destination,
        Named::Nothing => {
            let (protocol, port) = (ip::canonical(sock.protocol().into()), sock.local_port());
            // A socket that others connected to, handed over with the port it serves.
            if let Some(protocol) = protocol
                && sock.kind() != DATAGRAM
                && maps::may_serve(workload, protocol, port)
            {
                let endpoint = Some(Endpoint { protocol, port });
                return judge::<Locals>(
                    &Inquiry::endpoint(hook, RequestKind::Reply, endpoint),
                    workload,
                );
            }
            peer(sock)
        }
    };
    to(hook, RequestKind::Send, destination, workload)
}

#[inline(always)]
fn to(
    hook: Hook,
    kind: RequestKind,
    destination: Option<Destination>,
    workload: WorkloadId,
) -> Action {
    judge::<Destinations>(&Inquiry::destination(hook, kind, destination), workload)
}

/// The socket and the calling workload, where the kernel's choice of portable hooks for this socket
/// is not that workload's: it was made elsewhere, and received.
#[inline(always)]
pub(crate) fn foreign(socket: u64) -> Option<(Sock, WorkloadId)> {
    let current = kernel::current_cgroup();
    let (workload, has_hooks) = match maps::member(current) {
        Some(workload) => (workload, true),
        // A cgroup of the host whose process was moved there has hooks for it a moment later.
        None => (maps::moved(kernel::current_tgid())?.workload, maps::has_hooks(current)),
    };
    let sock = Sock::of_socket(socket)?;
    let made_in = sock.cgroup();
    let own = (has_hooks && made_in == current) || maps::member(made_in) == Some(workload);
    (!own).then_some((sock, workload))
}

/// What an address that comes with a call names.
enum Named {
    /// Nothing: the socket's own peer counts.
    Nothing,
    /// A destination; `None` if it could not be read.
    Here(Option<Destination>),
}

/// Reads the kernel's copy of an address.
#[inline(always)]
fn destination(sock: Sock, address: u64, length: u32) -> Named {
    let Some(family) = kernel::read_at::<u16>(address) else { return Named::Here(None) };
    let Some(protocol) = ip::canonical(sock.protocol().into()) else { return Named::Here(None) };
    // Offsets of `struct sockaddr_in` and `struct sockaddr_in6`, which are the kernel's ABI.
    let port = || kernel::read_at::<u16>(address + 2).map(u16::from_be);
    let address = match family {
        AF_UNSPEC if sock.family() == family::INET6 => return Named::Nothing,
        // An IPv4 socket takes an address without a family for its own, where it is not to be
        // dissolved.
        AF_UNSPEC | family::INET if length >= SOCKADDR_IN => {
            kernel::read_at::<u32>(address + 4).map(Address::from_v4_word)
        }
        AF_UNSPEC => return Named::Nothing,
        family::INET6 if length >= SOCKADDR_IN6 => {
            kernel::read_at::<[u32; 4]>(address + 8).map(Address::from_v6_words)
        }
        _ => None,
    };
    let named = || Some(Destination { address: address?, protocol, port: port()? });
    Named::Here(named())
}

/// Where a connected socket goes.
#[inline(always)]
fn peer(sock: Sock) -> Option<Destination> {
    let protocol = ip::canonical(sock.protocol().into())?;
    let address = match sock.family() {
        family::INET => Address::from_v4_word(sock.peer_v4()?),
        _ => Address::from_v6_words(sock.peer_v6()?),
    };
    let port = match protocol {
        ip::TCP | ip::UDP | ip::SCTP => u16::from_be(sock.peer_port()),
        _ => 0,
    };
    Some(Destination { address, protocol, port })
}

/// The first argument of a hook, a `struct socket`.
#[inline(always)]
fn socket(ctx: &LsmContext) -> u64 {
    context_word(ctx, 0)
}

/// An argument of a hook as a plain number, whatever it points to.
#[inline(always)]
pub(crate) fn context_word(ctx: &LsmContext, index: usize) -> u64 {
    let pointer: *const core::ffi::c_void = ctx.arg(index);
    kernel::address_of(pointer)
}
