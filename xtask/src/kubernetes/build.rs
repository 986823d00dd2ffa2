//! The control plane, built from Debian's source package.
//!
//! Its one job is to have its programs below the cache. No suite ships them; the source package of
//! `kubectl` in Debian 12 has the whole tree with everything it needs, so that the build asks no
//! network. It takes ten minutes on two processors, once.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result};

use super::programs::{Programs, SUITES};
use crate::{
    run::{heading, run},
    vm::apt::Apt,
};

/// The release of the source package, and the commit it was made from.
pub(super) const VERSION: &str = "v1.20.2";
const COMMIT: &str = "faecb196815e248d3ecfb03c680a4507229c2a56";

/// The Go package that is replaced in the tree.
const REFLECTION: &str = "github.com/modern-go/reflect2";

/// What is built.
const PROGRAMS: [&str; 5] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"];

/// The built programs.
#[derive(Debug)]
pub(super) struct ControlPlane {
    directory: PathBuf,
}

impl ControlPlane {
    /// Those that are there.
    pub(super) fn at(cache: &Path) -> Self {
        Self { directory: cache.join(VERSION) }
    }

    /// Finds or builds them.
    ///
    /// # Errors
    ///
    /// The source cannot be had, or does not compile.
    pub(super) fn prepare(cache: &Path, programs: &Programs) -> Result<Self> {
        let directory = cache.join(VERSION);
        let built = Self { directory: directory.clone() };
        if PROGRAMS.iter().all(|name| built.program(name).is_file()) {
            println!("found     control plane {VERSION}: {}", directory.display());
            return Ok(built);
        }
        heading(&format!("control plane {VERSION}, from Debian's source package"));
        let begin = Instant::now();
        let source = cache.join("source");
        if !source.exists() {
            println!("download  the source package kubernetes");
            let apt = Apt::with_sources(&cache.join("apt"), &SUITES[..1])?;
            let scratch = tempfile::tempdir_in(cache)?;
            apt.unpack_source("kubernetes", &scratch.path().join("source"))?;
            fs::rename(scratch.path().join("source"), &source)?;
        }
        replace_reflection(&source, programs)?;
        compile(cache, &source, programs)?;
        fs::create_dir_all(&directory)?;
        for name in PROGRAMS {
            let from = source.join("_output/bin").join(name);
            fs::copy(&from, built.program(name))
                .with_context(|| format!("{}: cannot be copied", from.display()))?;
        }
        // Gigabytes that nothing needs from here on.
        for name in ["source", "home"] {
            let _ = fs::remove_dir_all(cache.join(name));
        }
        println!("built     control plane {VERSION} in {} s", begin.elapsed().as_secs());
        Ok(built)
    }

    /// A program by its name.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// Takes the source of a dependency from its own package in Debian. The version in the tree is older
/// than Go 1.18, against which it reads maps by pointers that are none: the API server would crash at
/// the first custom resource.
fn replace_reflection(source: &Path, programs: &Programs) -> Result<()> {
    let there = source.join("vendor").join(REFLECTION);
    let is_code = |path: &Path| {
        path.extension().is_some_and(|extension| extension == "go" || extension == "s")
    };
    let files = |directory: &Path| -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(directory)
            .with_context(|| format!("{}: cannot be read", directory.display()))?;
        let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.retain(|path| is_code(path));
        Ok(files)
    };
    for file in files(&there)? {
        fs::remove_file(file)?;
    }
    for file in files(&programs.go_library(REFLECTION))? {
        let name = file.file_name().context("a file has a name")?;
        fs::copy(&file, there.join(name))
            .with_context(|| format!("{}: cannot be copied", file.display()))?;
    }
    Ok(())
}

fn compile(cache: &Path, source: &Path, programs: &Programs) -> Result<()> {
    // What the build takes from git, where there is one.
    let version = cache.join("version");
    fs::write(
        &version,
        format!(
            "KUBE_GIT_COMMIT='{COMMIT}'\n\
             KUBE_GIT_TREE_STATE='archive'\n\
             KUBE_GIT_VERSION='{VERSION}'\n\
             KUBE_GIT_MAJOR='1'\n\
             KUBE_GIT_MINOR='20'\n"
        ),
    )?;
    let home = cache.join("home");
    fs::create_dir_all(&home)?;
    // What an interrupted build left, the next one stumbles over.
    let _ = fs::remove_dir_all(source.join("_output"));
    let what: Vec<_> = PROGRAMS.iter().map(|name| format!("cmd/{name}")).collect();
    let go = programs.go();
    run(Command::new("make")
        .current_dir(source)
        .arg(format!("WHAT={}", what.join(" ")))
        .env("PATH", format!("{}/bin:{}", go.display(), programs.path()))
        .env("GOROOT", &go)
        .env("HOME", home)
        .env("KUBE_GIT_VERSION_FILE", version)
        .env("CGO_ENABLED", "0")
        .env("GO111MODULE", "on")
        // Everything is in the tree: a build that asked a network would not be this one.
        .env("GOFLAGS", "-mod=vendor")
        .env("GOPROXY", "off"))
    .context("the control plane does not compile")
}
