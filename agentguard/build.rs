//! Builds the kernel half and hands its object to the daemon, which embeds it.

use std::path::PathBuf;
use std::{env, fs};

use anyhow::{Context as _, ensure};
use sha2::{Digest as _, Sha256};

#[path = "build/toolchain.rs"]
mod toolchain;

/// An object that was built elsewhere, instead of building one.
const PREBUILT: &str = "AGENTGUARD_EBPF_OBJECT";

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-env-changed={PREBUILT}");
    let object = match env::var_os(PREBUILT) {
        Some(path) => PathBuf::from(path),
        None => build()?,
    };
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rustc-env=AGENTGUARD_OBJECT={}", object.display());
    let bytes = fs::read(&object).with_context(|| object.display().to_string())?;
    println!("cargo::rustc-env=AGENTGUARD_OBJECT_DIGEST={:x}", Sha256::digest(bytes));
    Ok(())
}

fn build() -> anyhow::Result<PathBuf> {
    let workspace = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("..");
    for source in ["agentguard-ebpf", "agentguard-common", "agentguard/build", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let target_dir = PathBuf::from(env::var("OUT_DIR")?).join("bpf");
    let toolchain = toolchain::find().map_err(|missing| {
        anyhow::anyhow!("no toolchain builds the kernel half: {missing}; run `cargo xtask setup`")
    })?;
    let mut command = toolchain.command(&workspace, &target_dir);
    if env::var_os("CARGO_FEATURE_NEXT_ABI").is_some() {
        command.args(["--features", "next-abi"]);
    }
    let status = command.status().context("cargo for the kernel half does not start")?;
    ensure!(status.success(), "the kernel half does not compile");
    Ok(target_dir.join("bpfel-unknown-none/release/agentguard-ebpf"))
}
