//! Finds the compiler that can build the kernel half, and runs it the same way everywhere.
//!
//! Its one job is the answer to "which cargo, which rustc, which flags, which environment"
//! for the target `bpfel-unknown-none`. The build script of the daemon and `cargo xtask`
//! both include this file, so that an object from one is the object from the other. It
//! installs nothing (that is `cargo xtask setup`), knows nothing of what is built, and uses
//! the standard library only, because a build script pays for every dependency.
//!
//! Two kinds of compiler have a `core` for BPF: a rustup toolchain with the component
//! `rust-src` compiles it on the way, and Debian's `rustc-web` finds it ready-built in
//! `libstd-rust-web-dev-bpf`. Both hand LLVM bitcode to `bpf-linker`, which borrows the LLVM
//! of a Rust toolchain and reads bitcode of that version only.
//!
//! Everything here is called from one thread and keeps no state.

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The package that holds the kernel half.
const PACKAGE: &str = "agentguard-ebpf";

/// The target it is compiled for.
const TARGET: &str = "bpfel-unknown-none";

/// The major version of LLVM that `bpf-linker` 0.10 speaks.
const LLVM_MAJOR: u32 = 22;

/// What rustc is told, and nothing that the outer build was told.
///
/// `--btf` makes the linker emit the type information that the loader and the verifier read;
/// without debug information there is nothing to make it from.
const RUSTFLAGS: &[&str] = &["-Clinker=bpf-linker", "-Cdebuginfo=2", "-Clink-arg=--btf"];

/// Variables of the outer build that would change the inner one, or break it.
const NOT_INHERITED: &[&str] = &[
    "CARGO",
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_TARGET_DIR",
    "CLIPPY_ARGS",
    "RUSTC",
    "RUSTC_BOOTSTRAP",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// A compiler for BPF that is complete: cargo, rustc, `core` and the linker.
#[derive(Debug)]
pub(crate) struct Toolchain {
    core: Core,
    cargo: PathBuf,
    rustc: PathBuf,
    /// Where `bpf-linker` finds its LLVM, if not by `PATH`.
    llvm: Option<PathBuf>,
    /// The directory of `bpf-linker`.
    linker: PathBuf,
}

/// Where `core` for BPF comes from.
#[derive(Clone, Copy, Debug)]
enum Core {
    /// Compiled with the rest, from the component `rust-src`.
    FromSource,
    /// A package of the distribution put it below rustc's sysroot.
    ReadyBuilt,
}

/// Looks for a complete BPF toolchain: rustup's first, then Debian's.
///
/// # Errors
///
/// A text for the user that names what is missing, each candidate that was passed over with
/// the reason, and the remedy.
pub(crate) fn find() -> Result<Toolchain, String> {
    let linker = find_linker()?;
    let mut passed_over = Vec::new();
    for root in rustup_toolchains() {
        match from_rustup(&root, &linker) {
            Ok(toolchain) => return Ok(toolchain),
            Err(reason) => passed_over.push(reason),
        }
    }
    match from_debian(Path::new("/usr/bin/rustc"), &linker) {
        Ok(toolchain) => return Ok(toolchain),
        Err(reason) => passed_over.push(reason),
    }
    Err(format!(
        "no compiler for {TARGET} found:\n  {}\n\
         run `cargo xtask setup`, or install one by hand: `rustup component add rust-src`, or on \
         Debian `apt-get install --no-install-recommends rustc-web libstd-rust-web-dev-bpf`",
        passed_over.join("\n  ")
    ))
}

impl Toolchain {
    /// The command that builds the kernel half into
    /// `<target_dir>/bpfel-unknown-none/release/agentguard-ebpf`.
    ///
    /// `workspace` is the directory that it lies in. `target_dir` must not be one that a running
    /// cargo holds, or both wait for ever: a build script gives one below `OUT_DIR`.
    pub(crate) fn command(&self, workspace: &Path, target_dir: &Path) -> Command {
        let mut command = self.cargo("build", workspace, target_dir);
        command.args(["--release", "--package", PACKAGE]);
        command
    }

    /// `cargo <subcommand>` in a workspace, for the BPF target, with this toolchain and a clean
    /// environment.
    pub(crate) fn cargo(&self, subcommand: &str, workspace: &Path, target_dir: &Path) -> Command {
        let mut command = Command::new(&self.cargo);
        for variable in NOT_INHERITED {
            command.env_remove(variable);
        }
        // Whoever builds the daemon incrementally, or in a profile of its own, gets the same object:
        // another one may be another to the verifier.
        for (variable, _) in env::vars_os() {
            if variable.to_str().is_some_and(|name| name.starts_with("CARGO_PROFILE_")) {
                command.env_remove(variable);
            }
        }
        command
            .current_dir(workspace)
            .env("CARGO_INCREMENTAL", "0")
            .arg(subcommand)
            .args(["--target", TARGET])
            .arg("--target-dir")
            .arg(target_dir)
            .env("RUSTC", &self.rustc)
            // `core` for a tier 3 target, and the two inline assembly features of the BPF
            // crates, are unstable: both ways need what a nightly allows by itself.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags(workspace).join("\u{1f}"))
            .env("PATH", prepend(&self.linker, "PATH"));
        if let Some(llvm) = &self.llvm {
            command.env("LD_LIBRARY_PATH", prepend(llvm, "LD_LIBRARY_PATH"));
        }
        match self.core {
            Core::FromSource => {
                command.args(["-Z", "build-std=core"]);
            }
            Core::ReadyBuilt => {}
        }
        command
    }
}

impl Toolchain {
    /// What rustc is told. The object names the files it was made of: by where they are for everybody,
    /// so that the same sources give the same object, wherever it is built.
    fn flags(&self, workspace: &Path) -> Vec<String> {
        let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let rust = self.rustc.parent().and_then(Path::parent).map(real);
        // As it is written: cargo names what it has unpacked there by that.
        let cargo = home("CARGO_HOME", ".cargo");
        // The last that fits counts.
        let known = [(rust, "/rust"), (cargo, "/cargo"), (Some(real(workspace)), "/agentguard")];
        let remapped = known.into_iter().filter_map(|(path, name)| {
            Some(format!("--remap-path-prefix={}={name}", path?.display()))
        });
        RUSTFLAGS.iter().map(|flag| (*flag).to_owned()).chain(remapped).collect()
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = match self.core {
            Core::FromSource => "core compiled from rust-src",
            Core::ReadyBuilt => "ready-built core",
        };
        write!(f, "{} ({core}), bpf-linker in {}", self.rustc.display(), self.linker.display())
    }
}

/// The directory of `bpf-linker`: on `PATH`, or where `cargo install` puts it.
fn find_linker() -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(home("CARGO_HOME", ".cargo").map(|home| home.join("bin")))
        .find(|directory| directory.join("bpf-linker").is_file())
        .ok_or_else(|| {
            "bpf-linker is neither on PATH nor in ~/.cargo/bin; run `cargo xtask setup`, or \
             `cargo install bpf-linker --version 0.10.3 --locked`"
                .to_owned()
        })
}

/// Every toolchain rustup holds, nightlies first, then by name.
fn rustup_toolchains() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = home("RUSTUP_HOME", ".rustup")
        .and_then(|home| fs::read_dir(home.join("toolchains")).ok())
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    found.sort_by_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (!name.starts_with("nightly"), name)
    });
    found
}

/// A rustup toolchain, if it has the sources of `core` and the LLVM that the linker reads.
fn from_rustup(root: &Path, linker: &Path) -> Result<Toolchain, String> {
    let source = root.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !source.is_file() {
        return Err(format!("{}: has no component rust-src", root.display()));
    }
    let rustc = root.join("bin/rustc");
    require_llvm(&rustc)?;
    Ok(Toolchain {
        core: Core::FromSource,
        cargo: root.join("bin/cargo"),
        rustc,
        llvm: Some(root.join("lib")),
        linker: linker.to_owned(),
    })
}

/// The distribution's rustc, if a ready-built `core` for BPF lies below its sysroot.
fn from_debian(rustc: &Path, linker: &Path) -> Result<Toolchain, String> {
    if !rustc.is_file() {
        return Err(format!("{}: is not installed", rustc.display()));
    }
    let library = answer(rustc, &["--print", "target-libdir", "--target", TARGET])?;
    let ready_built = fs::read_dir(library.trim())
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"));
    if !ready_built {
        return Err(format!(
            "{}: has no core for {TARGET}, which Debian packages as libstd-rust-web-dev-bpf",
            rustc.display()
        ));
    }
    require_llvm(rustc)?;
    // Debian's own library directory may hold several versions of LLVM, of which the linker
    // would take the first it meets. The ordinary toolchain's directory holds exactly one.
    let llvm = answer(Path::new("rustc"), &["--print", "sysroot"])
        .ok()
        .map(|sysroot| Path::new(sysroot.trim()).join("lib"))
        .filter(|library| holds_llvm(library));
    Ok(Toolchain {
        core: Core::ReadyBuilt,
        cargo: env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from),
        rustc: rustc.to_owned(),
        llvm,
        linker: linker.to_owned(),
    })
}

/// Whether the LLVM that the linker reads lies in `library`.
fn holds_llvm(library: &Path) -> bool {
    let names = [format!("libLLVM-{LLVM_MAJOR}"), format!("libLLVM.so.{LLVM_MAJOR}")];
    fs::read_dir(library).into_iter().flatten().filter_map(Result::ok).any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        names.iter().any(|prefix| name.starts_with(prefix))
    })
}

/// Refuses a compiler whose bitcode the linker cannot read.
fn require_llvm(rustc: &Path) -> Result<(), String> {
    let version = answer(rustc, &["--version", "--verbose"])?;
    let major = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .and_then(|text| text.split('.').next()?.trim().parse::<u32>().ok());
    match major {
        Some(LLVM_MAJOR) => Ok(()),
        Some(other) => Err(format!(
            "{}: writes the bitcode of LLVM {other}, and bpf-linker 0.10 reads LLVM {LLVM_MAJOR}",
            rustc.display()
        )),
        None => Err(format!("{}: does not say which LLVM it has", rustc.display())),
    }
}

/// What a program prints, run outside any toolchain override of the outer build.
fn answer(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .env_remove("RUSTC_WRAPPER")
        .output()
        .map_err(|error| format!("{}: cannot be run: {error}", program.display()))?;
    if !output.status.success() {
        return Err(format!(
            "{}: {}: {}",
            program.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    String::from_utf8(output.stdout)
        .map_err(|_| format!("{}: its answer is not UTF-8", program.display()))
}

/// A tool's home: what `variable` says, otherwise `directory` in the user's.
fn home(variable: &str, directory: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(directory)))
}

/// `directory` before what a search path variable holds already.
fn prepend(directory: &Path, variable: &str) -> OsString {
    let mut joined = directory.as_os_str().to_owned();
    if let Some(rest) = env::var_os(variable).filter(|rest| !rest.is_empty()) {
        joined.push(":");
        joined.push(rest);
    }
    joined
}
