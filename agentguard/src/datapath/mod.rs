//! The kernel half as user space sees it: loading, tables, tags, hooks, events.
//!
//! The only module that knows aya. Its callers speak of workloads, allow-lists and cgroups.

mod attach;
mod btf;
mod capacity;
pub mod events;
pub mod fake;
mod handover;
mod kernel;
mod link;
mod load;
mod object;
mod pins;
mod protection;
mod tables;

pub use capacity::Fill;
pub use kernel::{Kernel, KernelError};
pub use load::{Datapath, LoadError, Options, Sizes, uninstall};
pub use object::object_bytes;
pub use pins::held_cgroups;
pub use protection::{Door, DoorState, Protection, doors};
pub use tables::{DatapathError, Processes, cgroup_id};
