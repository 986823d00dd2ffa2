//! `bind(2)` to a port of the caller's choice.

use agentguard_common::event::{Hook, RequestKind};
use agentguard_common::request::ip;
use agentguard_common::{Action, Endpoint};
use aya_ebpf::programs::SockAddrContext;

use crate::context::{self, read};
use crate::judge::{Inquiry, Locals, socket_call};
use crate::maps::{self, Role};

/// `TCP_CLOSE` of the kernel: neither connected nor listening.
const CLOSE: u32 = 7;

#[inline(always)]
pub(crate) fn v4(ctx: &SockAddrContext) -> Action {
    bind(ctx, Hook::Bind4)
}

#[inline(always)]
pub(crate) fn v6(ctx: &SockAddrContext) -> Action {
    bind(ctx, Hook::Bind6)
}

#[inline(always)]
fn bind(ctx: &SockAddrContext, hook: Hook) -> Action {
    let endpoint = context::endpoint(ctx);
    let action = socket_call::<Locals>(&Inquiry::endpoint(hook, RequestKind::Bind, endpoint));
    match (action, endpoint) {
        (Action::Pass, Some(endpoint)) => become_server(ctx, &endpoint),
        (Action::Pass | Action::Refuse, _) => {}
    }
    action
}

/// Packets of a bound stream socket, and of those accepted from it, answer to whoever connected.
/// Datagram sockets choose their peers themselves and stay judged by where they send.
#[inline(always)]
fn become_server(ctx: &SockAddrContext, endpoint: &Endpoint) {
    if endpoint.protocol == ip::UDP || endpoint.port == 0 {
        return;
    }
    let socket = read!(ctx, __bindgen_anon_1.sk);
    // The kernel looks at the state only after this hook: a client that binds again is refused
    // there, and must not have become a server here.
    // SAFETY: the hook's context always has a full socket.
    if unsafe { (*socket).state } != CLOSE {
        return;
    }
    // SAFETY: as above.
    if let Some(socket) = unsafe { maps::socket_or_new(socket) } {
        socket.role = Role::Server as u8;
    }
}
