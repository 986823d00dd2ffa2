//! `cargo xtask image`: the daemon as a container image.
//!
//! Its one job is to put a static binary and the directories that the daemon expects into an image,
//! as an OCI archive in `target/image`, with a bill of what the binary is made of beside it. There
//! is no shell and no library in it: what is not there is not there for an intruder either. The
//! same sources give the same digest.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    oci::{Entry, Image},
    run::{cargo, heading, output, root, run, target_dir},
    setup::cargo_tool,
};

/// The version of the tool that writes the bill of materials.
const CYCLONEDX: (&str, &str) = ("cargo-cyclonedx", "0.5.9");

/// The name of the archive.
const ARCHIVE: &str = "agentguard.tar";

/// Where the images of releases are.
const REPOSITORY: &str = "ghcr.io/agentguard/agentguard";

/// The target that links statically: the same C library as everywhere, which is built in.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Directories of the image with the modes they have on a host. What is in them is mounted.
const DIRECTORIES: [(&str, u32); 12] = [
    ("etc", 0o755),
    ("etc/agentguard", 0o755),
    ("etc/agentguard/manifests", 0o755),
    ("run", 0o755),
    ("run/agentguard", 0o755),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("usr/share", 0o755),
    ("usr/share/doc", 0o755),
    ("usr/share/doc/agentguard", 0o755),
    ("var", 0o755),
    ("var/lib", 0o755),
];

/// Arguments of `cargo xtask image`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Of the profile that tests are built in, which takes less time
    #[arg(long)]
    debug: bool,
    /// Build a second time, elsewhere, and fail when that gives another digest
    #[arg(long)]
    verify: bool,
}

/// A written image.
#[derive(Debug)]
pub(crate) struct Written {
    /// The archive.
    pub(crate) archive: PathBuf,
    /// `<repository>:<tag>`, which it is imported under.
    pub(crate) name: String,
    pub(crate) digest: String,
}

/// How the binary is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    Release,
    /// As it is tested.
    Dev,
}

/// Builds the image and its bill of materials.
///
/// # Errors
///
/// A build fails, or two builds differ where that was asked for.
pub(crate) fn image(arguments: &Arguments) -> Result<()> {
    cargo_tool(CYCLONEDX.0, CYCLONEDX.1)?;
    let profile = if arguments.debug { Profile::Dev } else { Profile::Release };
    let directory = target_dir().join("image");
    let written = build(profile, &directory)?;
    let bill = bill_of_materials(&directory)?;
    if arguments.verify {
        heading("the same image again, from another place");
        let again = elsewhere(profile)?;
        ensure!(
            again.digest == written.digest,
            "two builds differ: {} and {}; compare {} and {}",
            written.digest,
            again.digest,
            written.archive.display(),
            again.archive.display()
        );
        println!("the digest is the same");
    }
    println!("{} {}", written.name, written.digest);
    println!("{}", written.archive.display());
    println!("{}", bill.display());
    Ok(())
}

/// The image that was built last in a directory, where there is one.
pub(crate) fn written(directory: &Path) -> Written {
    Written {
        archive: directory.join(ARCHIVE),
        name: format!("{REPOSITORY}:{}", env!("CARGO_PKG_VERSION")),
        digest: String::new(),
    }
}

/// Builds the image of this checkout.
///
/// # Errors
///
/// The build fails.
pub(crate) fn build(profile: Profile, directory: &Path) -> Result<Written> {
    heading("static binary");
    let binary = binary(profile, root(), &target_dir())?;
    ensure_static(&binary)?;
    write(&binary, directory)
}

/// Builds the daemon without anything that it would look for at run time, from a checkout into a
/// target directory.
fn binary(profile: Profile, checkout: &Path, target: &Path) -> Result<PathBuf> {
    let (arguments, directory): (&[&str], _) = match profile {
        Profile::Release => (&["--release"], "release"),
        // With its symbols it is eight times the size, for which a node may lack the memory.
        Profile::Dev => (&["--", "-C", "strip=symbols"], "debug"),
    };
    let mut build = cargo(&["rustc", "--locked", "--package", "agentguard", "--bin", "agentguard"]);
    build
        .args(["--target", TARGET])
        .args(arguments)
        .current_dir(checkout)
        .env("CARGO_TARGET_DIR", target)
        // Incremental builds depend on what was built before.
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_ENCODED_RUSTFLAGS", flags(checkout, target)?.join("\u{1f}"));
    run(&mut build)?;
    Ok(target.join(TARGET).join(directory).join("agentguard"))
}

/// Static, and without a word of where it was built.
fn flags(checkout: &Path, target: &Path) -> Result<Vec<String>> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    // The last that fits counts.
    Ok([
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={}=/cargo", home.display()),
        format!("--remap-path-prefix={}=/agentguard", checkout.display()),
        format!("--remap-path-prefix={}=/target", target.display()),
    ]
    .into())
}

/// A binary with an interpreter would not start in the image.
fn ensure_static(binary: &Path) -> Result<()> {
    let content = fs::read(binary)?;
    let interpreter =
        content.windows(b"/lib64/ld-linux".len()).any(|part| part == b"/lib64/ld-linux");
    ensure!(!interpreter, "{}: is not linked statically", binary.display());
    Ok(())
}

fn write(binary: &Path, directory: &Path) -> Result<Written> {
    let version = env!("CARGO_PKG_VERSION");
    let name = format!("{REPOSITORY}:{version}");
    let mut entries: BTreeMap<String, Entry> = DIRECTORIES
        .iter()
        .map(|(path, mode)| ((*path).to_owned(), Entry::Directory { mode: *mode }))
        .collect();
    entries.insert("var/lib/agentguard".to_owned(), Entry::Directory { mode: 0o700 });
    entries.insert("var/log".to_owned(), Entry::Directory { mode: 0o755 });
    entries.insert("var/log/agentguard".to_owned(), Entry::Directory { mode: 0o700 });
    entries.insert(
        "usr/bin/agentguard".to_owned(),
        Entry::File { mode: 0o755, content: binary.to_owned() },
    );
    for license in ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL-2.0"] {
        entries.insert(
            format!("usr/share/doc/agentguard/{license}"),
            Entry::File { mode: 0o644, content: root().join(license) },
        );
    }
    let label =
        |name: &str, value: &str| (format!("org.opencontainers.image.{name}"), value.into());
    let image = Image {
        name: name.clone(),
        entries,
        entrypoint: vec!["/usr/bin/agentguard".to_owned()],
        command: vec!["run".to_owned()],
        labels: [
            label("title", "agentguard"),
            label("description", "Holds AI-agent workloads to their granted scopes in the kernel"),
            label("licenses", "Apache-2.0 OR MIT"),
            label("source", env!("CARGO_PKG_REPOSITORY")),
            label("version", version),
        ]
        .into(),
    };
    let archive = directory.join(ARCHIVE);
    let digest = image.write(&archive)?;
    Ok(Written { archive, name, digest })
}

/// The image of the same files in another directory, with nothing built before.
fn elsewhere(profile: Profile) -> Result<Written> {
    let scratch = tempfile::tempdir_in(target_dir())?;
    let checkout = scratch.path().join("checkout");
    copy_checkout(&checkout)?;
    let binary = binary(profile, &checkout, &scratch.path().join("target"))?;
    write(&binary, &target_dir().join("image/again"))
}

/// Copies what the checkout has, committed or not, without what was built.
fn copy_checkout(to: &Path) -> Result<()> {
    let files = output(Command::new("git").current_dir(root()).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    for file in files.lines() {
        let (from, to) = (root().join(file), to.join(file));
        // What is listed may have been deleted since.
        if from.is_file() {
            if let Some(directory) = to.parent() {
                fs::create_dir_all(directory)?;
            }
            fs::copy(&from, &to)
                .with_context(|| format!("{}: cannot be copied", from.display()))?;
        }
    }
    Ok(())
}

/// Writes what the binary is made of, in CycloneDX's form: the daemon, and the kernel half that is
/// in it.
fn bill_of_materials(directory: &Path) -> Result<PathBuf> {
    // The tool writes beside each manifest, which would have cargo build all of it again.
    let scratch = tempfile::tempdir_in(target_dir())?;
    let checkout = scratch.path().join("checkout");
    copy_checkout(&checkout)?;
    let name = "bill";
    run(cargo(&["cyclonedx", "--quiet", "--format", "json", "--target", TARGET])
        .args(["--spec-version", "1.5", "--override-filename", name])
        .current_dir(&checkout)
        // The bill of the same sources is the same.
        .env("SOURCE_DATE_EPOCH", "0"))?;
    let read = |package: &str| -> Result<Value> {
        let path = checkout.join(package).join(name).with_extension("json");
        let bill = fs::read_to_string(&path)
            .with_context(|| format!("{}: is not there", path.display()))?;
        // Parts of the checkout are named by where it is.
        Ok(serde_json::from_str(&bill.replace(&checkout.display().to_string(), "/agentguard"))?)
    };
    let mut bill = read("agentguard")?;
    let mut kernel_half = read("agentguard-ebpf")?;
    // The kernel half is a part of the daemon as any other.
    let itself = kernel_half["metadata"]["component"].take();
    merge(&mut bill["components"], [itself].into(), "bom-ref")?;
    for (list, key) in [("components", "bom-ref"), ("dependencies", "ref")] {
        let theirs = kernel_half[list].take();
        merge(&mut bill[list], theirs.as_array().cloned().unwrap_or_default(), key)?;
    }
    let to = directory.join("agentguard.cdx.json");
    fs::write(&to, serde_json::to_vec_pretty(&bill)?)?;
    Ok(to)
}

/// Adds what is not in a list yet, by a key, and puts the list in order.
fn merge(list: &mut Value, more: Vec<Value>, key: &str) -> Result<()> {
    let list = list.as_array_mut().context("the bill of materials has no such list")?;
    ensure!(!list.is_empty(), "the bill of materials is empty");
    for each in more {
        if !list.iter().any(|there| there[key] == each[key]) {
            list.push(each);
        }
    }
    list.sort_by(|one, other| one[key].as_str().cmp(&other[key].as_str()));
    Ok(())
}
