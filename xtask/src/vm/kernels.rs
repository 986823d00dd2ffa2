//! Stock kernels from Debian's archive, unpacked and kept.
//!
//! Its one job is to have `vmlinuz` and the modules of a suite's cloud kernel in a directory. apt
//! chooses, downloads and checks, with a configuration of its own: nothing is installed, and the
//! machine's package lists and sources are neither used nor changed. What is there is kept until
//! `cargo xtask vm --refresh`, so that a run is repeatable and needs no network.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    apt::{Apt, Installed},
    matrix::Suite,
};
use crate::{
    docs::files,
    run::{output, which},
};

/// Depends on the newest kernel of a suite.
const META: &str = "linux-image-cloud-amd64";

/// A kernel on disk.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    directory: PathBuf,
    /// What `uname -r` says of it.
    pub(super) release: String,
}

impl Kernel {
    /// The image to boot.
    pub(super) fn image(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// Modules lie below `lib/modules/<release>` in this directory.
    pub(super) fn modules(&self) -> PathBuf {
        self.directory.join("modules")
    }

    /// The kernel of a suite that is there, or the newest that the archive has.
    ///
    /// # Errors
    ///
    /// The archive does not answer, or its packages are not as expected.
    pub(super) fn of(suite: Suite, cache: &Path, refresh: bool) -> Result<Self> {
        let (archive, name) = suite.archive();
        let directory = cache.join("kernels").join(name);
        let release = directory.join("release");
        if refresh && directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        if !release.exists() {
            println!("download  the kernel of {name}");
            fetch(archive, name, cache, &directory)
                .with_context(|| format!("the kernel of {name}"))?;
        }
        let release = fs::read_to_string(&release)?.trim().to_owned();
        Ok(Self { directory, release })
    }
}

fn fetch(archive: &str, suite: &str, cache: &Path, directory: &Path) -> Result<()> {
    let apt = Apt::new(&cache.join("apt").join(suite), &[(archive, suite)], Installed::Nothing)?;
    let scratch = directory.join("unpacked");
    fs::create_dir_all(&scratch)?;
    for package in packages(&apt)? {
        apt.unpack(&package, &scratch)?;
    }
    let unpacked = files(&scratch)?;
    let image = unpacked
        .iter()
        .find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        })
        .context("the packages hold no kernel image")?;
    let module = unpacked
        .iter()
        .find(|path| path.components().any(|part| part.as_os_str() == "kernel"))
        .context("the packages hold no modules")?;
    let modules = module
        .ancestors()
        .find(|path| path.parent().is_some_and(|parent| parent.ends_with("lib/modules")))
        .context("modules are not where they were expected")?;
    let release =
        modules.file_name().context("a release has a name")?.to_string_lossy().into_owned();
    let into = directory.join("modules/lib/modules");
    fs::create_dir_all(&into)?;
    fs::rename(image, directory.join("vmlinuz"))?;
    fs::rename(modules, into.join(&release))?;
    fs::remove_dir_all(&scratch)?;
    // Packages do not bring the order of dependencies; whoever installs them makes it.
    let base = directory.join("modules");
    output(
        Command::new(which("depmod").context("depmod is missing; run `cargo xtask setup`")?)
            .arg("--basedir")
            .arg(&base)
            .arg(&release),
    )?;
    // Last: what is not complete is made anew.
    fs::write(directory.join("release"), &release)?;
    Ok(())
}

/// The packages with the newest kernel and its modules. Until 6.18 one holds both; later the image
/// lies in `linux-binary-…` and the modules in `linux-modules-…`, on which it depends.
fn packages(apt: &Apt) -> Result<Vec<String>> {
    let meta = apt.depends(META)?;
    let image = meta
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{META} depends on no kernel"))?;
    let mut packages: Vec<String> = apt
        .depends(&image)?
        .into_iter()
        .filter(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"))
        .collect();
    ensure!(packages.len() != 1, "{image} is split in a way that is not known: {packages:?}");
    if packages.is_empty() {
        packages.push(image);
    }
    if packages.iter().any(|name| !name.contains("cloud-amd64")) {
        bail!("not packages of a cloud kernel: {packages:?}");
    }
    Ok(packages)
}
