//! Running other programs, with errors that say which one and how it ended.
//!
//! Its one job is to spare every command the same ten lines. It prints a heading before what
//! takes long, so that a reader of a log knows where time went.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// The root of the checkout.
pub(crate) fn root() -> &'static Path {
    // The manifest directory is `<root>/xtask`, so that a parent always exists.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The directory all build products go to.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The cargo that runs this command, in the root of the checkout.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(arguments);
    // What `cargo xtask` is told of its own package; build scripts that look at it would run again, and
    // all that rests on them be built again, whenever cargo is called by hand in between.
    for (variable, _) in env::vars_os() {
        let name = variable.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|of_package| name.starts_with(of_package)) {
            command.env_remove(&variable);
        }
    }
    command
}

/// Tells the reader what begins now.
pub(crate) fn heading(text: &str) {
    println!("\n== {text}");
}

/// Runs to the end, with the terminal's own input and output.
///
/// # Errors
///
/// The program cannot be started, or ends with a status other than 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let name = name(command);
    let status = command.status().with_context(|| format!("{name}: cannot be started"))?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(())
}

/// Runs to the end and gives the text that the program wrote to its standard output.
///
/// # Errors
///
/// As [`run`]; the text holds what the program wrote to its standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let written = output_bytes(command)?;
    String::from_utf8(written)
        .with_context(|| format!("{}: its output is not UTF-8", name(command)))
}

/// As [`output`], for what is no text.
pub(crate) fn output_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let name = name(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{name}: cannot be started"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name}: {}: {}", output.status, said.trim());
    }
    Ok(output.stdout)
}

/// The directory entry that `program` would run, also where root's `PATH` lacks `sbin`.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo/bin"));
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .chain(home)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// The program and its first two arguments, which is enough to know it by.
fn name(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args().take(2))
        .map(|part| part.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Gives `to` what `of` changes of the environment: for a program that runs another one.
pub(crate) fn copy_environment(of: &Command, to: &mut Command) {
    for (name, value) in of.get_envs() {
        match value {
            Some(value) => to.env(name, value),
            None => to.env_remove(name),
        };
    }
}
