//! Building the kernel halves: the product's, and the benchmark's empty one.
//!
//! Its one job is to run the toolchain that was found on a package, and to say where the
//! object lies. The daemon's build script does the same for itself, with the same module.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    run::{root, run, target_dir},
    toolchain,
};

/// Builds the kernel half and gives the path of the object.
///
/// # Errors
///
/// There is no BPF toolchain, or the crate does not compile.
pub(crate) fn object() -> Result<PathBuf> {
    let toolchain = toolchain::find().map_err(anyhow::Error::msg)?;
    let target = target_dir().join("kernel");
    run(toolchain.command(root(), &target).arg("--locked"))?;
    Ok(target.join("bpfel-unknown-none/release/agentguard-ebpf"))
}

/// Builds the empty programs and gives the path of the object.
///
/// # Errors
///
/// As [`object`].
pub(crate) fn empty_object() -> Result<PathBuf> {
    let toolchain = toolchain::find().map_err(anyhow::Error::msg)?;
    let target = target_dir().join("kernel");
    let mut build = toolchain.cargo("build", root(), &target);
    build.args(["--locked", "--release", "--package", "bench-ebpf"]);
    run(&mut build)?;
    Ok(target.join("bpfel-unknown-none/release/bench-ebpf"))
}
