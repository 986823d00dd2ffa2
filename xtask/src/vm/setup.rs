//! What virtual machines need of this machine.
//!
//! Its one job is to have a QEMU that boots present kernels, and the server of files. Debian 12's
//! own QEMU is too old: there the one of its backports is installed, by an apt with sources of its
//! own, so that what this machine installs otherwise stays what it was.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use super::{
    apt::{Apt, Installed},
    cache,
    machine::{QEMU, check_qemu, find_virtiofsd},
};
use crate::{
    run::{output, which},
    setup::{NoService, apt_install},
};

/// The last release whose QEMU brings a server of files that runs with its C library.
const BOOKWORM: (&str, &str) = ("debian", "bookworm");

/// The least QEMU is version 8; this is the package.
const PACKAGE: &str = "qemu-system-x86";

/// Finds or installs what running virtual machines takes.
///
/// # Errors
///
/// Something is missing and cannot be installed from here.
pub(crate) fn prepare() -> Result<()> {
    if which(QEMU).is_none() {
        install_qemu()?;
    }
    let version = match check_qemu() {
        Ok(version) => version,
        Err(error) => {
            println!("passed    {error:#}");
            install_qemu()?;
            check_qemu()?
        }
    };
    println!("found     {QEMU}: {version}");

    let cache = cache()?;
    if find_virtiofsd(&cache).is_none() {
        install_virtiofsd()?;
    }
    let found = find_virtiofsd(&cache).context(
        "virtiofsd is missing; it is a package of its own on current systems: install it",
    )?;
    println!("found     virtiofsd: {}", found.display());
    Ok(())
}

fn install_qemu() -> Result<()> {
    if codename().as_deref() != Some("bookworm") {
        return apt_install(&[PACKAGE]);
    }
    println!("install   {PACKAGE} of bookworm-backports, with package sources of its own");
    let apt = Apt::new(
        &cache()?.join("apt/host"),
        &[
            BOOKWORM,
            ("debian", "bookworm-updates"),
            ("debian-security", "bookworm-security"),
            ("debian", "bookworm-backports"),
        ],
        Installed::AsOnThisMachine,
    )?;
    let _no_service = NoService::begin()?;
    output(apt.command("apt-get").args([
        "--quiet",
        "--yes",
        "-o",
        "DPkg::Lock::Timeout=300",
        "install",
        "--no-install-recommends",
        "--target-release",
        "bookworm-backports",
        PACKAGE,
    ]))
    .map(drop)
    .context("QEMU cannot be installed; install version 8 or newer by hand")
}

/// The package, where there is one; else the program out of Debian 12's QEMU, which ran with the
/// same libraries, and which is kept beside the kernels.
fn install_virtiofsd() -> Result<()> {
    if codename().as_deref() != Some("bookworm") {
        return apt_install(&["virtiofsd"]);
    }
    println!("download  virtiofsd, out of bookworm's qemu-system-common");
    let cache = cache()?;
    let apt = Apt::new(&cache.join("apt/bookworm"), &[BOOKWORM], Installed::Nothing)?;
    let into = cache.join("virtiofsd");
    apt.unpack("qemu-system-common", &into)?;
    output(Command::new(into.join("usr/lib/qemu/virtiofsd")).arg("--version"))
        .map(drop)
        .context("virtiofsd does not run here")
}

fn codename() -> Option<String> {
    let release = fs::read_to_string("/etc/os-release").ok()?;
    let line = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(line.trim_matches('"').to_owned())
}
