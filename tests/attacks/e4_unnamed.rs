//! E4: run content that has no name, or that the workload put there itself.

use std::{
    ffi::CString,
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
};

use nix::{
    fcntl::{AtFlags, OFlag, open},
    sys::{
        memfd::{MFdFlags, memfd_create},
        stat::Mode,
    },
    unistd::execveat,
};

use crate::{
    outcome::{Attempt, Failure},
    own_mounts::{mount_new, unshare_mounts},
    payload::{Forbidden, environment, execute},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    forbidden: Forbidden,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// `memfd_create`, then `execveat` of the descriptor (what `fexecve` does).
    Memfd,
    /// A copy that is deleted while it is open, by `/proc/self/fd/N`.
    Deleted,
    /// A file that never had a name.
    Tmpfile,
    /// A file on a `tmpfs` that the workload mounted and filled.
    Tmpfs,
    /// A file that the workload wrote, run by its name.
    Written,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let forbidden = &arguments.forbidden;
    forbidden.run(|line| match exec(forbidden, arguments.how, line) {
        Ok(never) => match never {},
        Err(failure) => failure,
    })
}

fn exec(
    forbidden: &Forbidden,
    how: How,
    line: &[CString],
) -> Result<std::convert::Infallible, Failure> {
    Err(match how {
        How::Memfd => {
            let mut file = memfd_create("tool", MFdFlags::MFD_CLOEXEC)
                .map(File::from)
                .map_err(|errno| Failure::setup("memfd_create", errno))?;
            fill(&mut file, &forbidden.program)?;
            by_descriptor(&file, line)
        }
        How::Deleted => {
            let copy = forbidden.scratch("deleted");
            forbidden.copy_to(&copy)?;
            // Open across the exec on purpose: the path names the descriptor.
            let fd = File::open(&copy)
                .map_err(|error| Failure::setup(copy.display(), error))?
                .into_raw_fd();
            fs::remove_file(&copy).map_err(|error| Failure::setup(copy.display(), error))?;
            execute(format!("/proc/self/fd/{fd}"), line)
        }
        How::Tmpfile => {
            let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
            let mut file = open(&forbidden.scratch, flags, Mode::S_IRWXU)
                .map(File::from)
                .map_err(|errno| Failure::setup("O_TMPFILE", errno))?;
            fill(&mut file, &forbidden.program)?;
            by_descriptor(&reopened(file)?, line)
        }
        How::Tmpfs => {
            unshare_mounts()?;
            let directory = forbidden.scratch("tmpfs");
            fs::create_dir(&directory)
                .map_err(|error| Failure::setup(directory.display(), error))?;
            mount_new(Path::new("tmpfs"), &directory, "tmpfs", None)?;
            let copy = directory.join("tool");
            forbidden.copy_to(&copy)?;
            execute(copy, line)
        }
        How::Written => {
            let copy = forbidden.scratch("written");
            forbidden.copy_to(&copy)?;
            execute(copy, line)
        }
    })
}

fn fill(file: &mut File, program: &Path) -> Result<(), Failure> {
    let mut fill = || {
        io::copy(&mut File::open(program)?, file)?;
        file.set_permissions(Permissions::from_mode(0o700))
    };
    fill().map_err(|error| Failure::setup("copy the program", error))
}

/// The same file for reading only: the kernel runs nothing that is open for writing.
fn reopened(file: File) -> Result<OwnedFd, Failure> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let reader = File::open(&path).map_err(|error| Failure::setup(path, error))?;
    Ok(reader.into())
}

fn by_descriptor(fd: &impl AsFd, line: &[CString]) -> Failure {
    match execveat(fd, c"", line, &environment(), AtFlags::AT_EMPTY_PATH) {
        Ok(never) => match never {},
        Err(errno) => Failure::at("execveat", errno),
    }
}
