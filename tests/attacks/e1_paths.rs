//! E1: run a file that is not granted, by every spelling of its path.

use std::{
    ffi::{CString, OsString},
    fs::{self, File, OpenOptions},
    io::Write,
    os::{
        fd::{IntoRawFd, OwnedFd},
        unix::fs::symlink,
    },
    path::Path,
};

use nix::{
    fcntl::{AtFlags, OFlag, open},
    mount::{MntFlags, umount2},
    sys::stat::Mode,
    unistd::{chdir, chroot, execveat, pivot_root},
};

use crate::{
    outcome::{Attempt, Failure},
    own_mounts::{bind, unshare_mounts},
    payload::{Forbidden, MARK_BYTES, environment, execute, text},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    forbidden: Forbidden,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum How {
    Absolute,
    Relative,
    /// Through `..`
    DotDot,
    /// `/proc/self/root/...`
    ProcRoot,
    /// `/proc/self/cwd/...`
    ProcCwd,
    /// A copy of `/proc/self/exe`, which is granted under its own name.
    ProcExeCopy,
    /// `/dev/fd/N`
    DevFd,
    /// `execveat` relative to a directory.
    Execveat,
    /// `execveat` with `AT_EMPTY_PATH`.
    ExecveatEmptyPath,
    Symlink,
    Chroot,
    PivotRoot,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    if arguments.how == How::ProcExeCopy {
        return copy_of_self(&arguments.forbidden);
    }
    let forbidden = &arguments.forbidden;
    forbidden.run(|line| match exec(forbidden, arguments.how, line) {
        Ok(never) => match never {},
        Err(failure) => failure,
    })
}

/// Runs a marked copy of this program.
fn copy_of_self(forbidden: &Forbidden) -> Attempt {
    let copy = forbidden.scratch("copy-of-self");
    let prepare = || {
        fs::copy("/proc/self/exe", &copy)?;
        OpenOptions::new().append(true).open(&copy)?.write_all(&[b'#'; MARK_BYTES as usize])
    };
    prepare().map_err(|error| Failure::setup(copy.display(), error))?;
    let copied = Forbidden {
        program: copy,
        token: forbidden.token.clone(),
        scratch: forbidden.scratch.clone(),
    };
    copied.run(|line| execute(&copied.program, line))
}

fn exec(
    forbidden: &Forbidden,
    how: How,
    line: &[CString],
) -> Result<std::convert::Infallible, Failure> {
    let program = &forbidden.program;
    let (directory, name) = program.parent().zip(program.file_name()).ok_or_else(|| {
        Failure::unfit(format!("{} is no file in a directory", program.display()))
    })?;
    Err(match how {
        How::Absolute | How::ProcExeCopy => execute(program, line),
        How::Relative => {
            enter(directory)?;
            execute(Path::new(".").join(name), line)
        }
        How::DotDot => {
            execute(directory.join("../..").join(up_and_down(directory)?).join(name), line)
        }
        How::ProcRoot => execute(below("/proc/self/root", program), line),
        How::ProcCwd => {
            enter(directory)?;
            execute(Path::new("/proc/self/cwd").join(name), line)
        }
        How::DevFd => {
            // Left open on purpose: the path names it.
            let fd = File::open(program)
                .map_err(|error| Failure::setup(program.display(), error))?
                .into_raw_fd();
            // Not every system has the link; it is the same file without it.
            let base = if Path::new("/dev/fd").exists() { "/dev/fd" } else { "/proc/self/fd" };
            execute(format!("{base}/{fd}"), line)
        }
        How::Execveat => {
            let directory = open_path(directory)?;
            execute_at(&directory, &text(name)?, line, AtFlags::empty())
        }
        How::ExecveatEmptyPath => {
            let file = open_path(program)?;
            execute_at(&file, c"", line, AtFlags::AT_EMPTY_PATH)
        }
        How::Symlink => {
            let link = forbidden.scratch("link");
            symlink(program, &link).map_err(|error| Failure::setup(link.display(), error))?;
            execute(link, line)
        }
        How::Chroot => {
            let root = own_root(forbidden)?;
            chroot(&root).map_err(|errno| Failure::at("chroot", errno))?;
            enter(Path::new("/"))?;
            execute(program, line)
        }
        How::PivotRoot => {
            let root = own_root(forbidden)?;
            enter(&root)?;
            pivot_root(".", ".").map_err(|errno| Failure::at("pivot_root", errno))?;
            umount2(".", MntFlags::MNT_DETACH).map_err(|errno| Failure::at("umount", errno))?;
            execute(program, line)
        }
    })
}

/// The last two names of `directory`, to come back by after `../..`.
fn up_and_down(directory: &Path) -> Result<&Path, Failure> {
    directory
        .ancestors()
        .nth(2)
        .and_then(|above| directory.strip_prefix(above).ok())
        .ok_or_else(|| Failure::unfit(format!("{} is not deep enough", directory.display())))
}

/// The whole tree once more, as a mount below the scratch directory.
fn own_root(forbidden: &Forbidden) -> Result<std::path::PathBuf, Failure> {
    unshare_mounts()?;
    let root = forbidden.scratch("root");
    fs::create_dir(&root).map_err(|error| Failure::setup(root.display(), error))?;
    bind(Path::new("/"), &root)?;
    Ok(root)
}

fn below(root: &str, path: &Path) -> OsString {
    let mut below = OsString::from(root);
    below.push(path);
    below
}

fn enter(directory: &Path) -> Result<(), Failure> {
    chdir(directory).map_err(|errno| Failure::setup(directory.display(), errno))
}

fn open_path(path: &Path) -> Result<OwnedFd, Failure> {
    open(path, OFlag::O_PATH, Mode::empty()).map_err(|errno| Failure::setup(path.display(), errno))
}

fn execute_at(fd: &OwnedFd, path: &std::ffi::CStr, line: &[CString], flags: AtFlags) -> Failure {
    match execveat(fd, path, line, &environment(), flags) {
        Ok(never) => match never {},
        Err(errno) => Failure::at("execveat", errno),
    }
}
