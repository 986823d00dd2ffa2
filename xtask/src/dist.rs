//! `cargo xtask dist`: what a release ships, in `target/dist`.
//!
//! Its one job is to put the release binary, its completions, manual pages and schemas, and
//! the licences into one directory, which a package or an image takes as it is. The object
//! of the kernel half is inside the binary: whoever installs it needs no toolchain.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    docs::{RELEASE_ONLY, files, generate},
    run::{cargo, heading, root, run, target_dir},
    vm,
};

/// The version of cargo-deb that the package's description is written for.
const CARGO_DEB: &str = "3.8.0";

/// What is taken from the checkout as it is, if it is there.
const FROM_THE_CHECKOUT: &[&str] =
    &["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT", "deploy"];

/// Builds the release.
///
/// # Errors
///
/// The build fails, or a file cannot be copied.
pub(crate) fn dist() -> Result<()> {
    heading("release");
    let binary = release_daemon()?;
    let dist = target_dir().join("dist");
    if dist.exists() {
        fs::remove_dir_all(&dist).with_context(|| format!("{}: in the way", dist.display()))?;
    }
    copy(&binary, &dist.join("bin/agentguard"))?;
    let generated = tempfile::tempdir()?;
    generate(&binary, generated.path())?;
    for directory in RELEASE_ONLY {
        for path in files(&generated.path().join(directory))? {
            copy(&path, &dist.join("share").join(path.strip_prefix(generated.path())?))?;
        }
    }
    for name in FROM_THE_CHECKOUT {
        let path = root().join(name);
        if path.is_dir() {
            for file in files(&path)? {
                copy(&file, &dist.join("share").join(file.strip_prefix(root())?))?;
            }
        } else if path.is_file() {
            copy(&path, &dist.join("share").join(name))?;
        }
    }
    println!("{}", dist.display());
    Ok(())
}

/// Arguments of `cargo xtask deb`.
#[derive(Debug, clap::Args)]
pub(crate) struct DebArguments {
    /// Install, upgrade, remove and purge it in a virtual machine, under a real systemd
    #[arg(long)]
    verify: bool,
}

/// Builds a Debian package of the release.
///
/// # Errors
///
/// The build fails, cargo-deb can be neither found nor installed, or the package is not as it is to be.
pub(crate) fn deb(arguments: &DebArguments) -> Result<()> {
    crate::setup::cargo_tool("cargo-deb", CARGO_DEB)?;
    dist()?;
    heading("Debian package");
    let package = package_of(&target_dir().join("debian"), &[])?;
    if arguments.verify {
        // What an upgrade needs: the same, of a version that comes after it.
        let next = package_of(&target_dir().join("debian-next"), &["--deb-revision", "2"])?;
        let daemon = target_dir().join("dist/bin/agentguard");
        vm::verify_packages(&daemon.canonicalize()?, [&package, &next])?;
    }
    println!("{}", package.display());
    Ok(())
}

/// Packs what [`dist`] has made into a directory, and gives the package.
fn package_of(directory: &Path, more: &[&str]) -> Result<PathBuf> {
    fs::create_dir_all(directory)?;
    let mut build = cargo(&["deb", "--package", "agentguard", "--no-build", "--no-strip"]);
    run(build.args(more).arg("--output").arg(directory))?;
    files(directory)?
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .max_by_key(|path| path.metadata().and_then(|made| made.modified()).ok())
        .context("cargo-deb made no package")
}

/// Builds the daemon as it is shipped, and gives the path of the binary.
///
/// # Errors
///
/// The build fails.
pub(crate) fn release_daemon() -> Result<PathBuf> {
    run(&mut cargo(&["build", "--release", "--locked", "--package", "agentguard"]))?;
    Ok(target_dir().join("release/agentguard"))
}

/// Builds the daemon as it is tested, and gives the path of the binary.
///
/// In the profile of the tests, which have built most of it: the kernel half is optimised in both.
///
/// # Errors
///
/// The build fails.
pub(crate) fn daemon_binary() -> Result<PathBuf> {
    run(&mut cargo(&DAEMON))?;
    Ok(target_dir().join("debug/agentguard"))
}

/// Cargo chooses the features of what is shared by what is built together, and would build all of it
/// again for the daemon alone: a test beside it makes them those that the tests are built with.
const DAEMON: [&str; 6] = ["build", "--locked", "--bin", "agentguard", "--test", "control_api"];

/// Builds the daemon of the next version of the ABI, which tests put in the place of the ordinary
/// one, and gives the path of the binary.
///
/// Where the ordinary one is built too, and as that one is, since all but two crates are the same: the
/// ordinary one has to be built afterwards.
///
/// # Errors
///
/// The build fails, or the binary cannot be put aside.
pub(crate) fn next_daemon_binary() -> Result<PathBuf> {
    run(cargo(&DAEMON).args(["--features", "agentguard/next-abi"]))?;
    let next = target_dir().join("next-abi/agentguard");
    copy(&target_dir().join("debug/agentguard"), &next)?;
    Ok(next)
}

/// Builds the program that runs in the containers of the tests, which hold no library, and puts it
/// where their harness looks for it.
///
/// The ordinary one is built afterwards, or before: both have the same name.
///
/// # Errors
///
/// The build fails, or the binary cannot be put aside.
pub(crate) fn static_agent_binary() -> Result<PathBuf> {
    let mut build = cargo(&["rustc", "--locked", "--package", "agentguard-agent"]);
    // Only what is linked last has to be told. A runtime unpacks it into each image, for which an
    // emulated machine would take minutes with its symbols.
    run(build
        .args(["--bin", "agentguard-agent", "--", "-C", "target-feature=+crt-static"])
        .args(["-C", "strip=symbols"]))?;
    let binary = target_dir().join("static/agentguard-agent");
    copy(&target_dir().join("debug/agentguard-agent"), &binary)?;
    Ok(binary)
}

/// Copies one file, and makes the directories it needs.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let named = || format!("{}: cannot be copied to {}", from.display(), to.display());
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory).with_context(named)?;
    }
    fs::copy(from, to).map(drop).with_context(named)
}
