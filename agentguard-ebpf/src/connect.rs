//! `connect(2)`, also as a part of a TCP Fast Open send and of `io_uring`.

use agentguard_common::event::{Hook, RequestKind};
use agentguard_common::request::ip;
use agentguard_common::{Action, Destination};
use aya_ebpf::programs::SockAddrContext;

use crate::context::{self, read};
use crate::judge::{Destinations, Inquiry, socket_call};
use crate::maps::{self, Role};

#[inline(always)]
pub(crate) fn v4(ctx: &SockAddrContext) -> Action {
    connect(ctx, Hook::Connect4, context::destination_v4(ctx))
}

#[inline(always)]
pub(crate) fn v6(ctx: &SockAddrContext) -> Action {
    connect(ctx, Hook::Connect6, context::destination_v6(ctx))
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, hook: Hook, destination: Option<Destination>) -> Action {
    if destination.is_some_and(|destination| destination.protocol != ip::UDP) {
        become_client(ctx);
    }
    socket_call::<Destinations>(&Inquiry::destination(hook, RequestKind::Connect, destination))
}

/// A socket that was bound to a granted port is judged by where it goes once it connects.
#[inline(always)]
fn become_client(ctx: &SockAddrContext) {
    let socket = read!(ctx, __bindgen_anon_1.sk);
    // SAFETY: the hook's context always has a full socket.
    if let Some(socket) = unsafe { maps::socket(socket) } {
        socket.role = Role::Client as u8;
    }
}
