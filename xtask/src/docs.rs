//! `cargo xtask docs`: the documents that the daemon writes about itself.
//!
//! Its one job is to keep what lies in the checkout equal to what `agentguard generate` says:
//! schemas, reference pages, the API description. The daemon owns their content and their
//! paths; this module compares bytes. Completions and manual pages are made at release time
//! and are not kept in the checkout.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    dist::daemon_binary,
    run::{heading, root, run},
};

/// What `agentguard generate` writes for the release only.
pub(crate) const RELEASE_ONLY: &[&str] = &["completions", "man"];

/// Directories of the checkout that hold generated documents and nothing else, so that one that is
/// no longer written does not stay behind.
const GENERATED_ONLY: [&str; 3] =
    ["deploy/helm/agentguard/crds", "deploy/schemas", "docs/reference"];

/// Arguments of `cargo xtask docs`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Write nothing, and fail when a document is not what it would be
    #[arg(long)]
    check: bool,
}

/// Writes the generated documents, or checks them.
///
/// # Errors
///
/// The daemon cannot be built or run, or a document is stale with `--check`.
pub(crate) fn docs(arguments: &Arguments) -> Result<()> {
    heading("generated documents");
    let stale = stale()?;
    if stale.is_empty() {
        println!("all are fresh");
        return Ok(());
    }
    if arguments.check {
        bail!("not what `agentguard generate` writes:\n{}", list(&stale));
    }
    for document in &stale {
        document.refresh()?;
    }
    println!("written:\n{}", list(&stale));
    Ok(())
}

/// One document that is not as it should be.
pub(crate) struct Stale {
    /// Relative to the checkout.
    pub(crate) path: PathBuf,
    /// What it should hold; nothing means that it should not be there.
    content: Option<Vec<u8>>,
}

impl Stale {
    fn refresh(&self) -> Result<()> {
        let path = root().join(&self.path);
        let named = || format!("{}: cannot be written", path.display());
        match &self.content {
            Some(content) => {
                if let Some(directory) = path.parent() {
                    fs::create_dir_all(directory).with_context(named)?;
                }
                fs::write(&path, content).with_context(named)
            }
            None => fs::remove_file(&path).with_context(named),
        }
    }
}

/// Every document in the checkout that differs from what the daemon writes.
///
/// # Errors
///
/// The daemon cannot be built or run, or a file cannot be read.
pub(crate) fn stale() -> Result<Vec<Stale>> {
    let fresh = tempfile::tempdir()?;
    generate(&daemon()?, fresh.path())?;
    let mut stale = Vec::new();
    for path in files(fresh.path())? {
        let relative = path.strip_prefix(fresh.path())?.to_owned();
        if RELEASE_ONLY.iter().any(|directory| relative.starts_with(directory)) {
            continue;
        }
        let content = fs::read(&path)?;
        if fs::read(root().join(&relative)).ok().as_deref() != Some(&content[..]) {
            stale.push(Stale { path: relative, content: Some(content) });
        }
    }
    for directory in GENERATED_ONLY.map(|directory| root().join(directory)) {
        for path in if directory.is_dir() { files(&directory)? } else { Vec::new() } {
            let relative = path.strip_prefix(root())?.to_owned();
            if !fresh.path().join(&relative).exists() {
                stale.push(Stale { path: relative, content: None });
            }
        }
    }
    Ok(stale)
}

/// Has the daemon write all it knows about itself below `directory`.
///
/// # Errors
///
/// It ends with a status other than 0.
pub(crate) fn generate(daemon: &Path, directory: &Path) -> Result<()> {
    run(Command::new(daemon).arg("generate").arg(directory))
}

/// The list of paths, one per line.
pub(crate) fn list(stale: &[Stale]) -> String {
    stale.iter().map(|stale| format!("  {}", stale.path.display())).collect::<Vec<_>>().join("\n")
}

/// The daemon's binary: the one that is given, or one that is built now.
fn daemon() -> Result<PathBuf> {
    if let Some(binary) = env::var_os("AGENTGUARD_BIN") {
        return Ok(binary.into());
    }
    daemon_binary()
}

/// Every file below `directory`, in order.
pub(crate) fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(directory)
        .with_context(|| format!("{}: cannot be read", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
