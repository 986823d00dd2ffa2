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
mod lsm;
mod maps;
mod packet;
mod record;
mod sendmsg;
mod socket;
mod unix;

use agentguard_common::Action;
use aya_ebpf::EbpfContext as _;
use aya_ebpf::macros::{btf_tracepoint, cgroup_skb, cgroup_sock, cgroup_sock_addr, lsm};
use aya_ebpf::programs::{
    BtfTracePointContext, LsmContext, SkBuffContext, SockAddrContext, SockContext,
};

use crate::maps::gates;

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

#[btf_tracepoint(function = "sched_wakeup_new")]
fn process_wakeup(ctx: BtfTracePointContext) -> i32 {
    cgroup::first_wakeup(&ctx)
}

#[btf_tracepoint(function = "sched_process_free")]
fn process_free(ctx: BtfTracePointContext) -> i32 {
    cgroup::free(&ctx)
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

/// What an LSM hook returns: 0 lets the call go on, `-EPERM` ends it.
#[inline(always)]
fn answer(action: Action) -> i32 {
    let refused = match action {
        Action::Pass => 0,
        Action::Refuse => 1,
    };
    kernel::error_if(refused)
}

#[lsm(hook = "bprm_check_security")]
fn bprm_check(ctx: LsmContext) -> i32 {
    answer(exec::check(&ctx))
}

#[lsm(hook = "bprm_committed_creds")]
fn bprm_committed(ctx: LsmContext) -> i32 {
    exec::committed(&ctx);
    0
}

#[lsm(hook = "socket_create")]
fn socket_create(ctx: LsmContext) -> i32 {
    answer(lsm::create(&ctx))
}

#[lsm(hook = "socket_connect")]
fn socket_connect(ctx: LsmContext) -> i32 {
    answer(lsm::connect(&ctx))
}

#[lsm(hook = "socket_sendmsg")]
fn socket_sendmsg(ctx: LsmContext) -> i32 {
    answer(lsm::sendmsg(&ctx))
}

#[lsm(hook = "socket_listen")]
fn socket_listen(ctx: LsmContext) -> i32 {
    answer(lsm::listen(&ctx))
}

#[lsm(hook = "socket_accept")]
fn socket_accept(ctx: LsmContext) -> i32 {
    answer(lsm::accept(&ctx))
}

#[lsm(hook = "file_receive")]
fn file_receive(ctx: LsmContext) -> i32 {
    answer(lsm::receive(&ctx))
}

#[lsm(hook = "file_receive")]
fn unix_receive(ctx: LsmContext) -> i32 {
    answer(unix::receive(&ctx))
}

#[lsm(hook = "unix_stream_connect")]
fn unix_connect(ctx: LsmContext) -> i32 {
    answer(unix::stream_connect(&ctx))
}

#[lsm(hook = "unix_may_send")]
fn unix_send(ctx: LsmContext) -> i32 {
    answer(unix::may_send(&ctx))
}

/// Shows user space that the BPF LSM calls programs, which no list of the kernel's can promise.
#[lsm(hook = "socket_create")]
fn lsm_probe(_ctx: LsmContext) -> i32 {
    maps::lsm_called();
    0
}

/// What is attached to a global hook for good; see [`maps::gates`]. Without a program behind it
/// everything passes: nothing is held yet.
macro_rules! gates {
    ($($attribute:meta => $name:ident($context:ty): $gate:ident;)+) => {$(
        #[$attribute]
        fn $name(ctx: $context) -> i32 {
            maps::pass_through(&gates::$gate, ctx.as_ptr());
            0
        }
    )+};
}

gates! {
    btf_tracepoint(function = "sched_process_exec") => gate_exec(BtfTracePointContext): GATE_EXEC;
    btf_tracepoint(function = "sched_process_fork") => gate_fork(BtfTracePointContext): GATE_FORK;
    btf_tracepoint(function = "sched_wakeup_new") => gate_wakeup(BtfTracePointContext): GATE_WAKEUP;
    btf_tracepoint(function = "sched_process_free") => gate_free(BtfTracePointContext): GATE_FREE;
    btf_tracepoint(function = "cgroup_attach_task") => gate_attach(BtfTracePointContext): GATE_ATTACH;
    btf_tracepoint(function = "cgroup_mkdir") => gate_mkdir(BtfTracePointContext): GATE_MKDIR;
    btf_tracepoint(function = "cgroup_rmdir") => gate_rmdir(BtfTracePointContext): GATE_RMDIR;
    lsm(hook = "bprm_check_security") => gate_bprm_check(LsmContext): GATE_BPRM_CHECK;
    lsm(hook = "bprm_committed_creds") => gate_bprm_done(LsmContext): GATE_BPRM_COMMITTED;
    lsm(hook = "socket_create") => gate_create(LsmContext): GATE_SOCKET_CREATE;
    lsm(hook = "socket_connect") => gate_connect(LsmContext): GATE_SOCKET_CONNECT;
    lsm(hook = "socket_sendmsg") => gate_sendmsg(LsmContext): GATE_SOCKET_SENDMSG;
    lsm(hook = "socket_listen") => gate_listen(LsmContext): GATE_SOCKET_LISTEN;
    lsm(hook = "socket_accept") => gate_accept(LsmContext): GATE_SOCKET_ACCEPT;
    lsm(hook = "file_receive") => gate_receive(LsmContext): GATE_FILE_RECEIVE;
    lsm(hook = "file_receive") => gate_unix_recv(LsmContext): GATE_UNIX_RECEIVE;
    lsm(hook = "unix_stream_connect") => gate_unix_conn(LsmContext): GATE_UNIX_CONNECT;
    lsm(hook = "unix_may_send") => gate_unix_send(LsmContext): GATE_UNIX_SEND;
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
