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
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use self::{build::ControlPlane, cluster::Cluster, programs::Programs};
use crate::{
    guard::Ending,
    image::{self, Profile},
    interrupt,
    run::{heading, target_dir},
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
}

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
    heading("set-up");
    let cache = cache()?;
    let programs = Programs::prepare(&cache)?;
    let control_plane = ControlPlane::prepare(&cache, &programs)?;
    let image = image::build(Profile::Dev, &target_dir().join("image"))?;
    if arguments.prepare {
        return Ok(());
    }

    heading("cluster");
    let begin = Instant::now();
    let scratch = cache.join("node");
    let mut cluster = Cluster::start(&scratch, &programs, &control_plane)?;
    cluster.import(&image.archive)?;
    println!("ready     the cluster, with the image {} ({})", image.name, seconds(begin.elapsed()));

    match &arguments.run {
        Some(command) => to_the_end(&mut cluster.shell(command))?,
        None => checks::run(&mut cluster)?,
    }

    heading("end");
    let begin = Instant::now();
    cluster.end()?;
    let left = node::left_over(&scratch)?;
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
