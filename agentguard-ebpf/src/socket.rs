//! Creation of IP sockets: raw ones are refused here, the others have nothing to ask yet.

use agentguard_common::Action;
use agentguard_common::event::Hook;
use aya_ebpf::programs::SockContext;

use crate::judge::{Inquiry, Others, caller_in, socket_call};
use crate::{kernel, maps};

/// `SOCK_RAW` of the kernel.
const SOCK_RAW: u32 = 3;

#[inline(always)]
pub(crate) fn create(ctx: &SockContext) -> Action {
    // SAFETY: the kernel passes a context that lives as long as the program runs.
    let (kind, protocol) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.sock).type_),
            core::ptr::read_volatile(&raw const (*ctx.sock).protocol),
        )
    };
    if kind != SOCK_RAW {
        remember_owner(ctx);
        return Action::Pass;
    }
    socket_call::<Others>(&Inquiry::raw_socket(Hook::SockCreate, protocol as u8))
}

/// In a cgroup of the host a socket of a process that was moved there is known by its maker: packets
/// leave in anybody's time.
#[inline(always)]
fn remember_owner(ctx: &SockContext) {
    if maps::attachment().workload.is_some() {
        return;
    }
    let caller = caller_in(kernel::current_cgroup());
    if !caller.is_some() {
        return;
    }
    // SAFETY: the context of this hook is the socket.
    if let Some(socket) = unsafe { maps::socket_or_new(ctx.sock) } {
        socket.workload = caller;
    }
}
