//! The kernel half: one line per hook.
//!
//! Each entry point reads its context into a [`Request`](agentguard_common::Request), has it
//! judged, and turns the action into its hook's return value. Nothing here decides anything.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, unused_imports))]

mod bind;
mod cgroup;
mod connect;
mod context;
mod diagnostics;
mod exec;
mod judge;
mod kernel;
mod maps;
mod packet;
mod record;
mod sendmsg;
mod socket;

use agentguard_common::Action;
use aya_ebpf::macros::{btf_tracepoint, cgroup_skb, cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{BtfTracePointContext, SkBuffContext, SockAddrContext, SockContext};

/// What a cgroup hook returns: 1 lets the call go on, 0 ends it with `EPERM`.
#[inline(always)]
fn verdict(action: Action) -> i32 {
    match action {
        Action::Pass => 1,
        Action::Refuse => 0,
    }
}

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    verdict(connect::v4(&ctx))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    verdict(connect::v6(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    verdict(sendmsg::v4(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    verdict(sendmsg::v6(&ctx))
}

#[cgroup_sock_addr(bind4)]
fn bind4(ctx: SockAddrContext) -> i32 {
    verdict(bind::v4(&ctx))
}

#[cgroup_sock_addr(bind6)]
fn bind6(ctx: SockAddrContext) -> i32 {
    verdict(bind::v6(&ctx))
}

#[cgroup_sock(sock_create)]
fn sock_create(ctx: SockContext) -> i32 {
    verdict(socket::create(&ctx))
}

#[cgroup_skb(egress)]
fn egress(ctx: SkBuffContext) -> i32 {
    verdict(packet::egress(&ctx))
}

#[btf_tracepoint(function = "sched_process_exec")]
fn process_exec(ctx: BtfTracePointContext) -> i32 {
    match exec::exec(&ctx) {
        Action::Pass => 0,
        Action::Refuse => kernel::kill_current(),
    }
}

#[btf_tracepoint(function = "sched_process_fork")]
fn process_fork(ctx: BtfTracePointContext) -> i32 {
    cgroup::fork(&ctx)
}

#[btf_tracepoint(function = "sched_process_exit")]
fn process_exit(ctx: BtfTracePointContext) -> i32 {
    cgroup::exit(&ctx)
}

#[btf_tracepoint(function = "cgroup_attach_task")]
fn cgroup_attach_task(ctx: BtfTracePointContext) -> i32 {
    cgroup::attach_task(&ctx)
}

#[btf_tracepoint(function = "cgroup_mkdir")]
fn cgroup_mkdir(ctx: BtfTracePointContext) -> i32 {
    cgroup::mkdir(&ctx)
}

#[btf_tracepoint(function = "cgroup_rmdir")]
fn cgroup_rmdir(ctx: BtfTracePointContext) -> i32 {
    cgroup::rmdir(&ctx)
}

/// The licence the kernel asks for before it lends its helpers.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // A path that ends here is refused by the verifier, which follows every path.
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
