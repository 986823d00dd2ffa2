//! G4: run the forbidden program under names that are no plain text.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

use crate::{
    outcome::{Attempt, Failure},
    payload::{Forbidden, execute},
};

/// Begins as a path, then ends the record's line and forges the next: an allowed verdict, a
/// cleared terminal, text that is no UTF-8, an unpaired quote.
const HOSTILE: &[u8] =
    b"tool\n{\"kind\":\"verdict\",\"verdict\":\"allow\",\"forged\":true}\r\n\x1b[2J\x1b[1;31m\xff\xfe\"\\";
/// The longest the kernel takes for one argument is 128 KiB.
const HUGE_ARGUMENT: usize = 120 * 1024;
/// The longest path is 4,096 bytes with its end.
const HUGE_PATH: usize = 3900;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    forbidden: Forbidden,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    Argv,
    Path,
    /// The name of the thread.
    Comm,
    HugeArgv,
    HugePath,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let forbidden = &arguments.forbidden;
    let hostile = OsStr::from_bytes(HOSTILE);
    match arguments.how {
        How::Argv => forbidden.run_with(&[hostile], |line| execute(&forbidden.program, line)),
        How::HugeArgv => {
            let huge = OsString::from("A".repeat(HUGE_ARGUMENT));
            let more = [huge.as_os_str(); 8];
            forbidden.run_with(&more, |line| execute(&forbidden.program, line))
        }
        How::Path => {
            let path = forbidden.scratch(OsStr::from_bytes(
                &HOSTILE.iter().copied().filter(|byte| *byte != b'/').collect::<Vec<_>>(),
            ));
            forbidden.copy_to(&path)?;
            forbidden.run(|line| execute(path, line))
        }
        How::HugePath => {
            let path = huge_path(forbidden)?;
            forbidden.run(|line| execute(path, line))
        }
        How::Comm => forbidden.run(|line| {
            let name = c"x\n\x1b[2J\xff\"forged";
            // SAFETY: the kernel reads at most 16 bytes of a text that ends with NUL.
            if unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) } != 0 {
                return Failure::setup("PR_SET_NAME", std::io::Error::last_os_error());
            }
            execute(&forbidden.program, line)
        }),
    }
}

/// A copy of the program, as deep in the scratch directory as a path can say.
fn huge_path(forbidden: &Forbidden) -> Result<PathBuf, Failure> {
    let mut path = forbidden.scratch.clone();
    let name = "d".repeat(200);
    while path.as_os_str().len() + name.len() < HUGE_PATH {
        path.push(&name);
    }
    fs::create_dir_all(&path).map_err(|error| Failure::setup("a deep directory", error))?;
    path.push("tool");
    forbidden.copy_to(&path)?;
    Ok(path)
}
