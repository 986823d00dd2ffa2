//! Creation of IP sockets: raw ones are refused here, the others have nothing to ask yet.

use agentguard_common::Action;
use agentguard_common::event::Hook;
use aya_ebpf::programs::SockContext;

use crate::judge::{Inquiry, Others, socket_call};

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
        return Action::Pass;
    }
    socket_call::<Others>(&Inquiry::raw_socket(Hook::SockCreate, protocol as u8))
}
