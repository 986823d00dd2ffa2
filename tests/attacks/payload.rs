//! The program that must not run, and how an attack knows that it did.
//!
//! A forbidden file is a copy of this program with a mark behind its last section. The payload
//! writes the mark of the file it was run from to the token file, so a token proves which content
//! ran, whatever it was called.

use std::{
    ffi::{CString, OsStr},
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::sys::wait::WaitStatus;

use crate::{
    child,
    outcome::{Attempt, Failure},
};

/// Bytes of a mark.
pub(crate) const MARK_BYTES: u64 = 64;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The file to write the mark to.
    #[arg(long)]
    token: PathBuf,
    /// What else an attack put on the command line.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<std::ffi::OsString>,
}

/// Writes the mark of the running file.
pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let mark =
        mark_of(Path::new("/proc/self/exe")).map_err(|error| Failure::setup("the mark", error))?;
    fs::write(&arguments.token, &mark)
        .map_err(|error| Failure::setup(arguments.token.display(), error))?;
    Ok(format!("ran, with {} more arguments", arguments.rest.len()))
}

/// What an attack on exec is to run, and how it sees that it ran.
#[derive(clap::Args)]
pub(crate) struct Forbidden {
    /// The file that is not granted.
    #[arg(long)]
    pub(crate) program: PathBuf,
    /// Where it leaves its mark.
    #[arg(long)]
    pub(crate) token: PathBuf,
    /// A directory that the attack may write to.
    #[arg(long)]
    pub(crate) scratch: PathBuf,
}

impl Forbidden {
    /// Runs `exec` in a child: it gets the command line, runs the program in its own way, and
    /// returns only with the reason why it could not.
    pub(crate) fn run(&self, exec: impl FnOnce(&[CString]) -> Failure) -> Attempt {
        self.run_with(&[], exec)
    }

    /// [`Self::run`] with more arguments for the program.
    pub(crate) fn run_with(
        &self,
        more: &[&OsStr],
        exec: impl FnOnce(&[CString]) -> Failure,
    ) -> Attempt {
        let expected = mark_of(&self.program)
            .map_err(|error| Failure::setup(self.program.display(), error))?;
        if self.token.exists() {
            return Err(Failure::unfit(format!("{} is there already", self.token.display())));
        }
        let line = [OsStr::new("agentguard-attack"), "payload".as_ref(), "--token".as_ref()]
            .into_iter()
            .chain([self.token.as_os_str()])
            .chain(more.iter().copied())
            .map(text)
            .collect::<Result<Vec<_>, _>>()?;
        let end = child::run(|| Err(exec(&line)))?;
        match end {
            child::End { attempt: Some(attempt), .. } => attempt,
            child::End { attempt: None, status: WaitStatus::Exited(_, 0) } => {
                let found = fs::read(&self.token)
                    .map_err(|error| Failure::setup(self.token.display(), error))?;
                if found == expected {
                    Ok("the forbidden program ran".to_owned())
                } else {
                    Err(Failure::unfit("another program ran than the forbidden one"))
                }
            }
            child::End { attempt: None, status } => Err(child::unspoken(status)),
        }
    }

    /// A path in the scratch directory.
    pub(crate) fn scratch(&self, name: impl AsRef<Path>) -> PathBuf {
        self.scratch.join(name)
    }

    /// Copies the program to `to`; the copy can be run.
    pub(crate) fn copy_to(&self, to: &Path) -> Result<(), Failure> {
        fs::copy(&self.program, to)
            .map(drop)
            .map_err(|error| Failure::setup(format!("copy to {}", to.display()), error))
    }
}

/// Runs `path` in place of this process; returns only with the reason why it could not.
pub(crate) fn execute(path: impl AsRef<OsStr>, line: &[CString]) -> Failure {
    let path = match text(path.as_ref()) {
        Ok(path) => path,
        Err(failure) => return failure,
    };
    match nix::unistd::execve(&path, line, &environment()) {
        Ok(never) => match never {},
        Err(errno) => Failure::at(format!("execve {path:?}"), errno),
    }
}

/// The environment the payload runs with.
pub(crate) fn environment() -> [CString; 1] {
    [c"PATH=/usr/bin:/bin".to_owned()]
}

/// `text` for a system call.
pub(crate) fn text(text: impl AsRef<OsStr>) -> Result<CString, Failure> {
    CString::new(text.as_ref().as_bytes())
        .map_err(|error| Failure::setup("an argument", io::Error::from(error)))
}

/// The last bytes of a file.
pub(crate) fn mark_of(program: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(program)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MARK_BYTES)))?;
    let mut mark = Vec::new();
    file.take(MARK_BYTES).read_to_end(&mut mark)?;
    Ok(mark)
}
