//! Hook contexts read into requests.

use agentguard_common::request::ip;
use agentguard_common::{Address, Destination, Endpoint};
use aya_ebpf::programs::SockAddrContext;

/// Reads a field of the context, once and at its own width, as the verifier wants it.
macro_rules! read {
    ($ctx:expr, $($field:tt)+) => {{
        let context: *mut aya_ebpf::bindings::bpf_sock_addr = $ctx.sock_addr;
        // SAFETY: the kernel passes a context that lives as long as the program runs.
        unsafe { core::ptr::read_volatile(&raw const (*context).$($field)+) }
    }};
}
pub(crate) use read;

/// The port of the call, host byte order.
#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    u16::from_be(read!(ctx, user_port) as u16)
}

/// Where an IPv4 call goes; `None` when its protocol is none of IP's.
#[inline(always)]
pub(crate) fn destination_v4(ctx: &SockAddrContext) -> Option<Destination> {
    let protocol = ip::canonical(read!(ctx, protocol))?;
    Some(Destination {
        address: Address::from_v4_word(read!(ctx, user_ip4)),
        protocol,
        port: port(ctx),
    })
}

/// Where an IPv6 call goes.
#[inline(always)]
pub(crate) fn destination_v6(ctx: &SockAddrContext) -> Option<Destination> {
    let protocol = ip::canonical(read!(ctx, protocol))?;
    let words = [
        read!(ctx, user_ip6[0]),
        read!(ctx, user_ip6[1]),
        read!(ctx, user_ip6[2]),
        read!(ctx, user_ip6[3]),
    ];
    Some(Destination { address: Address::from_v6_words(words), protocol, port: port(ctx) })
}

/// The local port a bind asks for.
#[inline(always)]
pub(crate) fn endpoint(ctx: &SockAddrContext) -> Option<Endpoint> {
    let protocol = ip::canonical(read!(ctx, protocol))?;
    Some(Endpoint { protocol, port: port(ctx) })
}
