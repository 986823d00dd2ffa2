//! Datagrams whose address comes with the call.

use agentguard_common::event::{Hook, RequestKind};
use agentguard_common::{Action, Destination};
use aya_ebpf::programs::SockAddrContext;

use crate::context;
use crate::judge::{Destinations, Inquiry, socket_call};

#[inline(always)]
pub(crate) fn v4(ctx: &SockAddrContext) -> Action {
    send(Hook::Sendmsg4, context::destination_v4(ctx))
}

#[inline(always)]
pub(crate) fn v6(ctx: &SockAddrContext) -> Action {
    send(Hook::Sendmsg6, context::destination_v6(ctx))
}

#[inline(always)]
fn send(hook: Hook, destination: Option<Destination>) -> Action {
    // No address came with the call: a control message brings a connected socket here too. The
    // kernel refuses an address without a port itself. Its packet is judged like all others.
    if destination.is_some_and(|destination| destination.port == 0) {
        return Action::Pass;
    }
    socket_call::<Destinations>(&Inquiry::destination(hook, RequestKind::Send, destination))
}
