//! The harness of the tests that run on real kernels.
//!
//! A [`World`] is a network of its own with small real servers in it; a [`Guard`] is a daemon of
//! its own; an [`Attack`] is one run of a program that tries to get out; a [`WayOut`] ties them
//! together into the three runs of the threat model. Every value takes away what it set up when it
//! is dropped, also when the test panics; what a killed run left behind goes at the next start.
//!
//! Must not know: agentguard's code. It sees what a user sees: commands, files and the network.
//! Tests run in parallel, as threads or as processes; nothing here is shared between them.

/// Says a figure, also where the test passes: what is printed is shown only where it fails.
#[macro_export]
macro_rules! tell {
    ($($text:tt)*) => {
        $crate::write_to_stderr(&format!($($text)*))
    };
}

/// What [`tell`] does.
///
/// # Panics
///
/// When standard error is closed.
pub fn write_to_stderr(text: &str) {
    use std::io::Write as _;
    // At once: others write too.
    std::io::stderr().write_all(format!("{text}\n").as_bytes()).expect("standard error is open");
}

mod attack;
mod capabilities;
mod cgroup;
pub mod containerd;
pub mod daemon;
mod docker;
mod facility;
mod guard;
mod layer;
mod mounts;
mod process;
mod program;
pub mod promise;
pub mod scrape;
mod server;
mod sink;
mod small_disk;
pub mod traffic;
mod unique;
mod way_out;
mod world;

pub use attack::{Attack, Outcome, Report};
pub use cgroup::Cgroup;
pub use containerd::Containerd;
pub use docker::Docker;
pub use facility::{Facility, can_be_attacked_by, compare_with_declared};
pub use guard::{BASE_SCOPE, Guard, Mode, wait_until};
pub use layer::{Layer, is_to_give, requires};
pub use process::{Finished, Running, attack_binary, child_of, run};
pub use program::Programs;
pub use server::{Protocol, Reach, Servers};
pub use sink::{Sink, UnixSink};
pub use small_disk::SmallDisk;
pub use way_out::{
    Proof, Recorded, WayOut, is_recorded_in_audit_mode, is_refused_in_enforce_mode,
    works_without_the_guard,
};
pub use world::{Network, World, address};
