//! Container runtimes that offer NRI, for the tests.
//!
//! Its one job is to have containerd of the releases that differ, unpacked beside the build products:
//! the one that this machine installs is whatever its Debian has, which may be older than NRI. Nothing
//! of it is installed, and no service begins.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    run::{output, target_dir},
    vm::apt::Apt,
};

/// The releases, by the names that the harness knows them by (`tests/harness/containerd`), and where
/// each comes from: the last of version 1, which has NRI and leaves it off unless told otherwise, and
/// the one of version 2 to come.
const RELEASES: [(&str, (&str, &str)); 2] =
    [("1", ("debian", "trixie")), ("2", ("debian", "forky"))];

/// Finds or downloads them.
///
/// # Errors
///
/// Debian's archive does not answer, or what it has does not run here.
pub(crate) fn prepare() -> Result<()> {
    let directory = target_dir().join("containerd");
    fs::create_dir_all(&directory)
        .with_context(|| format!("{}: cannot be made", directory.display()))?;
    for (name, suite) in RELEASES {
        let root = directory.join(name);
        let program = root.join("usr/bin/containerd");
        if !program.exists() {
            println!("download  containerd of {}", suite.1);
            let apt = Apt::new(&directory.join("apt").join(name), &[suite])?;
            // Under its name only when it is whole.
            let scratch = tempfile::tempdir_in(&directory)?;
            apt.unpack("containerd", scratch.path())?;
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
        println!("found     containerd {name}, with NRI: {}", version.trim());
    }
    Ok(())
}
