//! Programs of a node, out of Debian 12's packages.
//!
//! Its one job is to have them unpacked below the cache, so that no service is installed on this
//! machine, and so that the versions fit each other whatever this machine has: a kubelet of 1.20
//! speaks a version of the runtime's interface that containerd has dropped since.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    run::{heading, which},
    setup::apt_install,
    vm::apt::Apt,
};

/// Where they are from.
pub(super) const SUITES: [(&str, &str); 3] = [
    ("debian", "bookworm"),
    ("debian", "bookworm-updates"),
    ("debian-security", "bookworm-security"),
];

/// What is unpacked; all of it is linked to what every Debian has.
const PACKAGES: &[&str] = &[
    "containerd",
    "containernetworking-plugins",
    "etcd-server",
    "golang-1.19-go",
    "golang-1.19-src",
    "golang-github-modern-go-reflect2-dev",
    "kubernetes-client",
    "prometheus",
    "runc",
];

/// What the programs call, by the package that is installed when it is missing.
const INSTALLED: &[(&str, &str)] = &[
    ("busybox", "busybox-static"),
    ("conntrack", "conntrack"),
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("rsync", "rsync"),
    ("setpriv", "util-linux"),
];

/// The unpacked packages.
#[derive(Debug)]
pub(super) struct Programs {
    root: PathBuf,
}

impl Programs {
    /// Those that are there.
    pub(super) fn at(cache: &Path) -> Self {
        Self { root: cache.join("programs") }
    }

    /// Finds or downloads them.
    ///
    /// # Errors
    ///
    /// Debian's archive does not answer, or a package cannot be installed from here.
    pub(super) fn prepare(cache: &Path) -> Result<Self> {
        let missing: Vec<&str> = INSTALLED
            .iter()
            .filter(|(program, _)| which(program).is_none())
            .map(|(_, package)| *package)
            .collect();
        if !missing.is_empty() {
            apt_install(&missing)?;
        }
        let root = cache.join("programs");
        let programs = Self { root: root.clone() };
        if programs.root.exists() {
            println!("found     programs of a node: {}", root.display());
            return Ok(programs);
        }
        heading("programs of a node, from Debian's archive");
        let apt = Apt::new(&cache.join("apt"), &SUITES)?;
        // Under its name only when it is whole.
        let scratch = tempfile::tempdir_in(cache)?;
        for package in PACKAGES {
            println!("download  {package}");
            apt.unpack(package, scratch.path())?;
        }
        fs::rename(scratch.keep(), &root)
            .with_context(|| format!("{}: cannot be made", root.display()))?;
        Ok(programs)
    }

    /// A program by its name.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.root.join("usr/bin").join(name)
    }

    /// What runs containers.
    pub(super) fn runc(&self) -> PathBuf {
        self.root.join("usr/sbin/runc")
    }

    /// Where the plugins are that give containers their network.
    pub(super) fn network_plugins(&self) -> PathBuf {
        self.root.join("usr/lib/cni")
    }

    /// The Go toolchain.
    pub(super) fn go(&self) -> PathBuf {
        self.root.join("usr/lib/go-1.19")
    }

    /// The source of a Go package.
    pub(super) fn go_library(&self, name: &str) -> PathBuf {
        self.root.join("usr/share/gocode/src").join(name)
    }

    /// `PATH` for a program that calls others.
    pub(super) fn path(&self) -> String {
        format!(
            "{0}/usr/bin:{0}/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            self.root.display()
        )
    }
}
