//! E5: scripts and what interprets them, of which one is not granted.
//!
//! This program is the interpreter: `interpret` writes the mark of the script, `interpret-as` its
//! own, to the token that stands behind `--token` on the command line.

use std::{
    ffi::{CString, OsString},
    fs::{self, File, OpenOptions},
    io::Write,
    os::{
        fd::{AsFd, IntoRawFd},
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::AtFlags,
    sched::{CloneFlags, unshare},
    sys::memfd::{MFdFlags, memfd_create},
    unistd::{dup, execveat},
};

use crate::{
    outcome::{Attempt, Failure},
    own_mounts::{mount_new, unshare_mounts},
    payload::{Forbidden, environment, execute, mark_of},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    forbidden: Forbidden,
    /// A script or program that is granted, and leads to the forbidden one.
    #[arg(long)]
    granted: Option<PathBuf>,
    /// The file to run, where it is neither.
    #[arg(long)]
    start: Option<PathBuf>,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// Run the forbidden file, by its `#!`.
    Script,
    /// The same by a descriptor.
    Descriptor,
    /// The same in a file without a name.
    Memfd,
    /// Run the granted script, whose `#!` leads to the forbidden file.
    Interpreter,
    /// Have the kernel run the forbidden file for every file of a kind.
    Registered,
    /// The same with an interpreter that was opened when it was registered.
    RegisteredOpen,
    /// Have the kernel run a granted program for the forbidden file.
    RegisteredScript,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let forbidden = &arguments.forbidden;
    forbidden.run(|line| match exec(arguments, line) {
        Ok(never) => match never {},
        Err(failure) => failure,
    })
}

fn exec(arguments: &Arguments, line: &[CString]) -> Result<std::convert::Infallible, Failure> {
    let forbidden = &arguments.forbidden;
    let granted =
        || arguments.granted.as_ref().ok_or_else(|| Failure::unfit("nothing that is granted"));
    Err(match arguments.how {
        How::Script => execute(&forbidden.program, line),
        How::Descriptor => {
            let file = File::open(&forbidden.program)
                .map_err(|error| Failure::setup(forbidden.program.display(), error))?;
            // Left open, also across the exec: the interpreter opens it by this path.
            let fd = dup(file).map_err(|errno| Failure::setup("dup", errno))?.into_raw_fd();
            execute(format!("/proc/self/fd/{fd}"), line)
        }
        How::Memfd => {
            // Not closed by the exec: the interpreter opens it by its path.
            let mut file = memfd_create("script", MFdFlags::empty())
                .map(File::from)
                .map_err(|errno| Failure::setup("memfd_create", errno))?;
            let copy = fs::read(&forbidden.program)
                .map_err(|error| Failure::setup(forbidden.program.display(), error))?;
            file.write_all(&copy)
                .and_then(|()| file.set_permissions(fs::Permissions::from_mode(0o700)))
                .map_err(|error| Failure::setup("the script", error))?;
            match execveat(file.as_fd(), c"", line, &environment(), AtFlags::AT_EMPTY_PATH) {
                Ok(never) => match never {},
                Err(errno) => Failure::at("execveat", errno),
            }
        }
        How::Interpreter => execute(arguments.start.as_ref().map_or_else(granted, Ok)?, line),
        How::Registered => registered(forbidden, &forbidden.program, "", line)?,
        How::RegisteredOpen => registered(forbidden, &forbidden.program, "F", line)?,
        How::RegisteredScript => {
            // A file of the kind, which holds the forbidden mark.
            let script = forbidden.scratch("kind.agt");
            fs::copy(&forbidden.program, &script)
                .map_err(|error| Failure::setup(script.display(), error))?;
            let interpreter = granted()?.clone();
            own_formats(forbidden)?;
            register(forbidden, &interpreter, "")?;
            execute(&script, line)
        }
    })
}

/// Runs a file of a kind for which the kernel runs `interpreter`.
fn registered(
    forbidden: &Forbidden,
    interpreter: &Path,
    flags: &str,
    line: &[CString],
) -> Result<Failure, Failure> {
    let file = forbidden.scratch("harmless.agt");
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o700)
        .open(&file)
        .and_then(|mut file| file.write_all(b"AGTHARMLESS\n"))
        .map_err(|error| Failure::setup(file.display(), error))?;
    own_formats(forbidden)?;
    register(forbidden, interpreter, flags)?;
    Ok(execute(&file, line))
}

/// Formats of one's own, which the kernel must have per user namespace.
fn own_formats(forbidden: &Forbidden) -> Result<(), Failure> {
    let directory = forbidden.scratch("formats");
    fs::create_dir(&directory).map_err(|error| Failure::setup(directory.display(), error))?;
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|errno| Failure::at("unshare", errno))?;
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ] {
        fs::write(file, text).map_err(|error| Failure::setup(file, error))?;
    }
    unshare_mounts()?;
    mount_new(Path::new("binfmt_misc"), &directory, "binfmt_misc", None)
}

/// Has the kernel run `interpreter` for files that begin with `AGT`.
fn register(forbidden: &Forbidden, interpreter: &Path, flags: &str) -> Result<(), Failure> {
    let register = forbidden.scratch("formats/register");
    let text = format!(":agt:M::AGT::{}:{flags}", interpreter.display());
    fs::write(&register, text).map_err(|error| Failure::at(register.display(), error))
}

/// What the kernel put on an interpreter's command line.
#[derive(clap::Args)]
pub(crate) struct Interpret {
    /// The script, and all that follows.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    line: Vec<OsString>,
}

/// Leaves the mark of the script.
pub(crate) fn interpret(arguments: &Interpret) -> Attempt {
    leave_mark(&arguments.line, Path::new(&arguments.line[0]))
}

/// Leaves the mark of the interpreter.
pub(crate) fn interpret_as(arguments: &Interpret) -> Attempt {
    leave_mark(&arguments.line, Path::new("/proc/self/exe"))
}

fn leave_mark(line: &[OsString], of: &Path) -> Attempt {
    let token = line
        .iter()
        .skip_while(|word| *word != "--token")
        .nth(1)
        .ok_or_else(|| Failure::unfit("no token on the command line"))?;
    let mark = mark_of(of).map_err(|error| Failure::setup(of.display(), error))?;
    fs::write(token, mark).map_err(|error| Failure::setup(Path::new(token).display(), error))?;
    Ok("interpreted".to_owned())
}

/// As the kernel runs an interpreter that was registered: with the file's path as the first word,
/// which no subcommand is.
pub(crate) fn run_for_a_format() -> Option<Attempt> {
    let mut line: Vec<OsString> = std::env::args_os().skip(1).collect();
    let file = Path::new(line.first()?).to_owned();
    if file.extension()? != "agt" {
        return None;
    }
    line.remove(0);
    let harmless = file.file_name()? == "harmless.agt";
    let own = PathBuf::from("/proc/self/exe");
    Some(leave_mark(&line, if harmless { &own } else { &file }))
}
