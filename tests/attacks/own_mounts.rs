//! A mount namespace of one's own, in which everything may be mounted.

use std::path::Path;

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::outcome::Failure;

const NONE: Option<&str> = None;

/// Gives the calling process its own mounts; nothing it mounts is seen outside.
pub(crate) fn unshare_mounts() -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| Failure::at("unshare mounts", errno))?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .map_err(|errno| Failure::at("make the mounts private", errno))
}

/// Mounts the file or tree `from` over `to`.
pub(crate) fn bind(from: &Path, to: &Path) -> Result<(), Failure> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .map_err(|errno| Failure::at(format!("bind over {}", to.display()), errno))
}

/// Mounts a new file system of type `kind`.
pub(crate) fn mount_new(
    source: &Path,
    to: &Path,
    kind: &str,
    options: Option<&str>,
) -> Result<(), Failure> {
    mount(Some(source), to, Some(kind), MsFlags::empty(), options)
        .map_err(|errno| Failure::at(format!("mount {kind} on {}", to.display()), errno))
}
