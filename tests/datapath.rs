//! The kernel half on the running kernel: every hook, driven through [`Datapath`], with real sockets
//! and processes on loopback.
//!
//! The test of a hook reads: allowed, attach, denied, detach, allowed. What happens inside a
//! workload is done by a worker, this test program once more ([`worker`](worker::worker)), so that
//! the tests themselves are never guarded. Every test has pins and cgroups of its own.

#[path = "datapath/counting.rs"]
mod counting;
#[path = "datapath/doors.rs"]
mod doors;
#[path = "datapath/fixture.rs"]
mod fixture;
#[path = "datapath/full.rs"]
mod full;
#[path = "datapath/generations.rs"]
mod generations;
#[path = "datapath/leaving.rs"]
mod leaving;
#[path = "datapath/lsm.rs"]
mod lsm;
#[path = "datapath/object.rs"]
mod object;
#[path = "datapath/runtimes.rs"]
mod runtimes;
#[path = "datapath/unix_sockets.rs"]
mod unix_sockets;
#[path = "datapath/worker.rs"]
mod worker;
