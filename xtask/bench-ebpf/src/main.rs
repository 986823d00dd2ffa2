//! Programs that let everything through and look at nothing.
//!
//! Their one job is to show what a hook costs by being there, so that the benchmark can tell
//! the kernel's price from agentguard's own. They hold no state.

#![no_std]
#![no_main]

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock_addr},
    programs::{SkBuffContext, SockAddrContext},
};

/// What a cgroup program returns to let the operation go on.
const GO_ON: i32 = 1;

#[cgroup_sock_addr(connect4)]
fn empty_connect4(_context: SockAddrContext) -> i32 {
    GO_ON
}

#[cgroup_sock_addr(sendmsg4)]
fn empty_sendmsg4(_context: SockAddrContext) -> i32 {
    GO_ON
}

#[cgroup_skb(egress)]
fn empty_egress(_context: SkBuffContext) -> i32 {
    GO_ON
}

/// The compiler wants one; the verifier proves that it is never reached.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
