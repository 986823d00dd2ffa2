//! Container runtimes that the tests start, beside the one that this machine installs.
//!
//! Its one job is to have them unpacked beside the build products: containerd of the releases that
//! differ, since this machine's is whatever its Debian has, which may be older than NRI and newer than
//! those that speak nothing but the API's earlier version, and a Docker Engine, which would change the
//! machine's network were it installed. Nothing of them is installed, and no service begins.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    run::{output, target_dir},
    vm::apt::Apt,
};

/// A program of a package.
struct Runtime {
    /// The directory that the harness knows it by (`tests/harness`).
    directory: &'static str,
    package: &'static str,
    suite: &'static str,
    program: &'static str,
}

const RUNTIMES: [Runtime; 4] = [
    // 1.4, which speaks v1alpha2 of the runtimes' API and no other version of it.
    Runtime {
        directory: "containerd/1.4",
        package: "containerd",
        suite: "bullseye",
        program: "usr/bin/containerd",
    },
    // The last of version 1, which has NRI and leaves it off unless told otherwise.
    Runtime {
        directory: "containerd/1",
        package: "containerd",
        suite: "trixie",
        program: "usr/bin/containerd",
    },
    // The one of version 2 to come.
    Runtime {
        directory: "containerd/2",
        package: "containerd",
        suite: "forky",
        program: "usr/bin/containerd",
    },
    // The oldest that a supported Debian has.
    Runtime {
        directory: "docker",
        package: "docker.io",
        suite: "bookworm",
        program: "usr/sbin/dockerd",
    },
];

/// Finds or downloads them.
///
/// # Errors
///
/// Debian's archive does not answer, or what it has does not run here.
pub(crate) fn prepare() -> Result<()> {
    for Runtime { directory, package, suite, program } in RUNTIMES {
        let root = target_dir().join(directory);
        let parent = root.parent().context("the build products are in a directory")?;
        fs::create_dir_all(parent)
            .with_context(|| format!("{}: cannot be made", parent.display()))?;
        let program = root.join(program);
        if !program.exists() {
            println!("download  {package} of {suite}");
            let lists = target_dir().join("apt").join(suite);
            fs::create_dir_all(&lists)?;
            let apt = Apt::new(&lists, &[("debian", suite)])?;
            // Under its name only when it is whole.
            let scratch = tempfile::tempdir_in(parent)?;
            apt.unpack(package, scratch.path())?;
            fs::rename(scratch.keep(), &root)
                .with_context(|| format!("{}: cannot be made", root.display()))?;
        }
        let version = output(Command::new(&program).arg("--version")).with_context(|| {
            format!(
                "{} does not run here; it may need a newer C library than this machine has: remove \
                 {} to have it downloaded again, or test on a newer Debian",
                program.display(),
                root.display()
            )
        })?;
        println!("found     {package} of {suite}, for the tests: {}", version.trim());
    }
    Ok(())
}
