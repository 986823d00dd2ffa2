//! `cargo xtask e2e-kubernetes`: the tests in a real Kubernetes.
//!
//! Its one job is to have a cluster of one node on this machine, to run the checks in it, and to
//! leave nothing behind. The control plane is built from source the first time, which takes ten
//! minutes; everything else takes one.

mod build;
mod checks;
mod cluster;
mod images;
mod keys;
mod node;
mod programs;
mod traffic;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use self::{
    build::ControlPlane,
    cluster::{Cluster, Pace},
    programs::Programs,
};
use crate::{
    chart,
    guard::Ending,
    image::{self, Profile},
    interrupt,
    run::{heading, target_dir},
    vm,
};

/// Arguments of `cargo xtask e2e-kubernetes`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only build or find what a cluster takes
    #[arg(long)]
    prepare: bool,
    /// Start the cluster, run this shell command with `kubectl` at hand in place of the checks, and
    /// end the cluster
    #[arg(long, value_name = "COMMAND", conflicts_with = "prepare")]
    run: Option<String>,
    /// Run only the checks with this in their names, and those that prepare for them
    #[arg(long, value_name = "NAME", conflicts_with_all = ["prepare", "run"])]
    check: Vec<String>,
    /// The same in a virtual machine whose kernel has the BPF LSM active
    #[arg(long)]
    vm: bool,
    /// The kernel of the machine, a row of the matrix
    #[arg(long, value_name = "ROW", default_value = "6.12", requires = "vm")]
    kernel: String,
    /// What `--vm` runs inside: everything is there, and only the scratch directory can be written to
    #[arg(long, hide = true, value_name = "SCRATCH")]
    inside: Option<PathBuf>,
}

/// Memory of the machine, in MiB: images and the control plane's store are in it.
const MEMORY: u32 = 6144;

/// How long the machine may take, on emulated processors that others use too.
const LIMIT: Duration = Duration::from_secs(5400);

/// Runs the checks in a cluster.
///
/// # Errors
///
/// The cluster cannot be had, a check fails, or something is left over.
pub(crate) fn e2e(arguments: &Arguments) -> Result<()> {
    interrupt::defer()?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "a node needs root: run `cargo xtask e2e-kubernetes` as root"
    );
    checks::exist(&arguments.check)?;
    heading("set-up");
    let cache = cache()?;
    if let Some(scratch) = &arguments.inside {
        let there = Parts {
            programs: Programs::at(&cache),
            control_plane: ControlPlane::at(&cache),
            image: image::written(&target_dir().join("image")),
        };
        return in_cluster(arguments, scratch, &there);
    }
    let programs = Programs::prepare(&cache)?;
    let control_plane = ControlPlane::prepare(&cache, &programs)?;
    let image = image::build(Profile::Dev, &target_dir().join("image"))?;
    if arguments.prepare {
        return Ok(());
    }
    if arguments.vm {
        return in_machine(arguments);
    }
    in_cluster(arguments, &cache.join("node"), &Parts { programs, control_plane, image })
}

/// What a cluster takes.
struct Parts {
    programs: Programs,
    control_plane: ControlPlane,
    image: image::Written,
}

/// This program again, in a machine that sees what was prepared.
fn in_machine(arguments: &Arguments) -> Result<()> {
    // Rendered here: a machine does not have every program.
    chart::helm()?;
    let program = std::env::current_exe()?;
    let mut script = format!(
        "export CARGO_TARGET_DIR='{}'\nexec '{}' e2e-kubernetes --inside /srv/agentguard-e2e",
        target_dir().canonicalize()?.display(),
        program.display()
    );
    let options = [("--run", arguments.run.as_slice()), ("--check", arguments.check.as_slice())];
    for (option, values) in options {
        for value in values {
            script.push_str(&format!(" {option} '{}'", value.replace('\'', r"'\''")));
        }
    }
    script.push('\n');
    vm::run_script(&arguments.kernel, &script, MEMORY, LIMIT)
}

fn in_cluster(arguments: &Arguments, scratch: &Path, parts: &Parts) -> Result<()> {
    let Parts { programs, control_plane, image } = parts;
    heading("cluster");
    let begin = Instant::now();
    let pace = if arguments.inside.is_some() { Pace::Emulated } else { Pace::Own };
    let mut cluster = Cluster::start(scratch, programs, control_plane, pace)?;
    cluster.import(&image.archive)?;
    println!("ready     the cluster, with the image {} ({})", image.name, seconds(begin.elapsed()));

    match &arguments.run {
        Some(command) => to_the_end(&mut cluster.shell(command))?,
        None => {
            let checked = checks::run(&mut cluster, &arguments.check);
            checked.inspect_err(|_| cluster.print_account_of_daemon())?;
        }
    }

    heading("end");
    let begin = Instant::now();
    cluster.end()?;
    let left = node::left_over(scratch)?;
    ensure!(left.is_empty(), "left over: {}", left.join("; "));
    println!("ended     the cluster ({}); nothing of it is left", seconds(begin.elapsed()));
    Ok(())
}

/// Runs to the end, unless a signal comes before it.
fn to_the_end(command: &mut Command) -> Result<()> {
    let mut running = Ending(command.spawn().context("sh cannot be started")?);
    loop {
        if let Some(status) = running.0.try_wait()? {
            ensure!(status.success(), "the command ended ({status})");
            return Ok(());
        }
        interrupt::sleep(Duration::from_millis(50))?;
    }
}

/// What is downloaded and built, and what a run leaves behind to be read.
fn cache() -> Result<PathBuf> {
    let cache = target_dir().join("kubernetes");
    std::fs::create_dir_all(&cache)?;
    Ok(cache.canonicalize()?)
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
