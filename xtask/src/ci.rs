//! `cargo xtask ci`: the checks of form, all of them, whatever the first one says.
//!
//! Its one job is to run what `.ci/run` runs after the tests: formatting, lints for both
//! targets, documentation, licences and advisories, tidy, and the chart. Each is a command a
//! developer can run alone.

use std::{ffi::OsStr, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::{
    chart,
    run::{cargo, heading, output, root, run, target_dir},
    setup::{self, Purpose},
    tidy, toolchain,
};

/// A name for the reader, and what is run.
type Check = (&'static str, fn() -> Result<()>);

/// Runs every check and names those that failed.
///
/// # Errors
///
/// The set-up fails, or a check does.
pub(crate) fn ci() -> Result<()> {
    setup::setup(Purpose::Ci)?;
    let checks: [Check; 7] = [
        ("formatting", formatting),
        ("lints for the host", lints_for_the_host),
        ("lints for the kernel half", lints_for_the_kernel_half),
        ("documentation", documentation),
        ("licences and advisories", licences_and_advisories),
        ("tidy", tidy::tidy),
        ("chart", || chart::chart(&chart::Arguments { check: true })),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        heading(name);
        if let Err(error) = check() {
            eprintln!("{name}: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("checks failed: {}", failed.join(", "));
    }
    println!("\nchecks: {} passed", checks.len());
    Ok(())
}

fn formatting() -> Result<()> {
    run(&mut cargo(&["fmt", "--all", "--check"]))
}

fn lints_for_the_host() -> Result<()> {
    run(&mut cargo(&["clippy", "--locked", "--all-targets", "--", "--deny", "warnings"]))
}

/// `cargo clippy` would run the linter of the ordinary toolchain, which knows no `core` for
/// BPF. What it does is small: the linter stands in for the compiler. So this runs the one
/// that came with the compiler of the kernel half.
fn lints_for_the_kernel_half() -> Result<()> {
    let toolchain = toolchain::find().map_err(anyhow::Error::msg)?;
    let mut check = toolchain.cargo("check", root(), &target_dir().join("kernel-lints"));
    let rustc = check
        .get_envs()
        .find(|(name, _)| *name == OsStr::new("RUSTC"))
        .and_then(|(_, value)| value.map(PathBuf::from))
        .context("the BPF toolchain names no compiler")?;
    let linter = rustc.with_file_name("clippy-driver");
    if !linter.is_file() {
        bail!(
            "{} is missing: `rustup component add clippy` for that toolchain, or on Debian \
             `apt-get install rust-web-clippy`",
            linter.display()
        );
    }
    check
        .args(["--locked", "--package", "agentguard-ebpf", "--package", "bench-ebpf"])
        .env("RUSTC_WORKSPACE_WRAPPER", linter)
        .env("CLIPPY_ARGS", "--deny__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
    run(&mut check)
}

fn documentation() -> Result<()> {
    run(cargo(&["doc", "--locked", "--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "--deny warnings"))
}

/// Licences, sources and duplicates are checked always. Advisories need their database, which
/// comes from the network: where it cannot be had, that is said and is no failure.
fn licences_and_advisories() -> Result<()> {
    let deny = |checks: &[&str]| {
        let mut command = cargo(&["deny", "--locked", "check", "--hide-inclusion-graph"]);
        command.args(checks);
        command
    };
    run(&mut deny(&["bans", "licenses", "sources"]))?;
    let fetched = output(&mut cargo(&["deny", "--locked", "fetch", "db"]));
    match fetched {
        Ok(_) => run(&mut deny(&["advisories"])),
        Err(error) => {
            let error = error.to_string();
            let reason = error.lines().map(str::trim).rfind(|line| !line.is_empty());
            let reason = reason.unwrap_or("no reason given");
            println!("NOT CHECKED: advisories; their database cannot be had here: {reason}");
            Ok(())
        }
    }
}
