//! apt with sources, lists and a cache of its own.
//!
//! Its one job is to ask suites of Debian that this machine does not use, without changing what it
//! does use: nothing below `/etc/apt` or `/var/lib/apt` is written. Signatures are checked against
//! Debian's own keys, and apt checks every package against the signed lists.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::run::{output, which};

/// Debian's mirror for everyone.
const MIRROR: &str = "http://deb.debian.org";

/// Who signs Debian's suites, earlier ones included.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A private apt.
#[derive(Debug)]
pub(crate) struct Apt {
    configuration: PathBuf,
}

impl Apt {
    /// One that knows the suites `(archive, suite)`, with fresh lists.
    ///
    /// # Errors
    ///
    /// There is no apt or no key here, or the mirror does not answer.
    pub(crate) fn new(directory: &Path, suites: &[(&str, &str)]) -> Result<Self> {
        Self::of(&["deb"], directory, suites)
    }

    /// As [`new`](Self::new), and it also knows the source packages.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub(crate) fn with_sources(directory: &Path, suites: &[(&str, &str)]) -> Result<Self> {
        Self::of(&["deb", "deb-src"], directory, suites)
    }

    fn of(kinds: &[&str], directory: &Path, suites: &[(&str, &str)]) -> Result<Self> {
        if which("apt-get").is_none() || !Path::new(KEYS).exists() {
            bail!(
                "what is needed comes from Debian's archive, and there is no apt-get here, or no \
                 {KEYS}; run it on Debian (`cargo xtask test --without-vms` does without)"
            );
        }
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(name))?;
        }
        let directory = directory.canonicalize()?;
        let sources: String = suites
            .iter()
            .flat_map(|suite| kinds.iter().map(move |kind| (kind, suite)))
            .map(|(kind, (archive, suite))| {
                format!("{kind} [signed-by={KEYS}] {MIRROR}/{archive} {suite} main\n")
            })
            .collect();
        fs::write(directory.join("sources.list"), sources)?;
        let configuration = directory.join("apt.conf");
        let here = directory.display();
        fs::write(
            &configuration,
            format!(
                "Dir::Etc::SourceList \"{here}/sources.list\";\n\
                 Dir::Etc::SourceParts \"-\";\n\
                 Dir::State::Lists \"{here}/lists\";\n\
                 Dir::Cache \"{here}/cache\";\n\
                 APT::Architecture \"amd64\";\n\
                 APT::Sandbox::User \"root\";\n\
                 Acquire::Languages \"none\";\n\
                 Acquire::Retries \"3\";\n"
            ),
        )?;
        let apt = Self { configuration };
        output(apt.command("apt-get").args(["--quiet", "update"]))
            .context("Debian's archive does not answer")?;
        Ok(apt)
    }

    /// `apt-get` or `apt-cache` with this configuration.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.configuration).env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// The names of what the newest version of `package` depends on.
    pub(super) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let said = output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        let depends = said
            .lines()
            .find_map(|line| line.strip_prefix("Depends: "))
            .with_context(|| format!("{package} depends on nothing"))?;
        // `linux-image-… (= 6.1.192-2), kmod | …`
        Ok(depends
            .split([',', '|'])
            .filter_map(|each| each.split_whitespace().next())
            .map(str::to_owned)
            .collect())
    }

    /// Downloads a package, which may have `=<version>`, and unpacks it into a directory.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let scratch = tempfile::tempdir()?;
        output(
            self.command("apt-get")
                .current_dir(scratch.path())
                // What is installed here is no version to choose from.
                .args(["--quiet", "-o", "Dir::State::status=/dev/null", "download", package]),
        )?;
        for entry in fs::read_dir(scratch.path())? {
            let file = entry?.path();
            output(Command::new("dpkg-deb").arg("--extract").arg(file).arg(into))?;
        }
        Ok(())
    }

    /// Downloads a source package and unpacks it, patched, as the directory `into`.
    ///
    /// # Errors
    ///
    /// It cannot be downloaded, or dpkg-source does not take it.
    pub(crate) fn unpack_source(&self, package: &str, into: &Path) -> Result<()> {
        let scratch = tempfile::tempdir()?;
        output(
            self.command("apt-get")
                .current_dir(scratch.path())
                // apt has checked it against the signed lists, and unpacks it where it is.
                .args(["--quiet", "source", "--download-only", package]),
        )?;
        for entry in fs::read_dir(scratch.path())? {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "dsc") {
                let mut extract = Command::new("dpkg-source");
                extract.args(["--no-check", "--extract"]).arg(&file).arg(into);
                return output(&mut extract).map(drop);
            }
        }
        bail!("{package}: no such source package")
    }
}
