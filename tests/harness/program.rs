//! Programs for the attacks on exec: one to be granted, one to be forbidden.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use crate::attack_binary;

/// What the payload takes for a file's mark: the last bytes of it.
const MARK_BYTES: usize = 64;

/// Copies of the attack program. The forbidden one carries a mark, which it writes to the token
/// file when it runs.
#[derive(Clone, Debug)]
pub struct Programs {
    directory: PathBuf,
    mark: String,
}

impl Programs {
    /// Puts them into a directory.
    pub(crate) fn new(directory: &Path) -> Self {
        let mark = format!("{:#^MARK_BYTES$}", format!(" forbidden {} ", std::process::id()));
        let programs = Self { directory: directory.to_owned(), mark };
        for path in [programs.granted(), programs.forbidden()] {
            let parent = path.parent().expect("a program lies in a directory");
            fs::create_dir(parent).expect("a directory can be made");
            fs::copy(attack_binary(), &path).expect("the attack program can be copied");
        }
        fs::create_dir(programs.scratch()).expect("a directory can be made");
        OpenOptions::new()
            .append(true)
            .open(programs.forbidden())
            .and_then(|mut file| file.write_all(programs.mark.as_bytes()))
            .expect("the copy can be written");
        programs
    }

    /// A program that scopes may grant.
    #[must_use]
    pub fn granted(&self) -> PathBuf {
        self.directory.join("granted/tool")
    }

    /// A program that no scope grants.
    #[must_use]
    pub fn forbidden(&self) -> PathBuf {
        self.directory.join("forbidden/tool")
    }

    /// A directory for the attack to write to.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.directory.join("scratch")
    }

    /// Where the forbidden program leaves its mark.
    #[must_use]
    pub fn token(&self) -> PathBuf {
        self.directory.join("token")
    }

    /// Whether something that is not granted ran: only the payload writes a token.
    #[must_use]
    pub fn payload_ran(&self) -> bool {
        self.token().exists()
    }
}
