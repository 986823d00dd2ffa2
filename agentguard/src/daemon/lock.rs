//! One manager for one set of tables: directories that only one process at a time works in.
//!
//! The lock is the kernel's, so that it ends with the process however that ends.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// A directory is not this process' alone.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another agentguard manages {path}; stop it, or give this one directories of its own")]
    Taken { path: PathBuf },
    #[error("the directory {path} can not be locked: {source}; check that it can be read")]
    Lock { path: PathBuf, source: io::Error },
}

/// The directories that are this process' alone, for as long as this value is there.
#[derive(Debug, Default)]
pub struct Locks(Vec<(PathBuf, Flock<File>)>);

impl Locks {
    /// Makes a directory this process' alone.
    ///
    /// # Errors
    ///
    /// When it is another's, or can not be opened.
    pub fn take(&mut self, path: &Path) -> Result<(), LockError> {
        let error = |source| LockError::Lock { path: path.to_owned(), source };
        let directory = File::open(path).map_err(error)?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                self.0.push((path.to_owned(), lock));
                Ok(())
            }
            Err((_, Errno::EWOULDBLOCK)) => Err(LockError::Taken { path: path.to_owned() }),
            Err((_, errno)) => Err(error(errno.into())),
        }
    }

    /// Whether the directory is this process' alone.
    #[must_use]
    pub fn holds(&self, path: &Path) -> bool {
        self.0.iter().any(|(held, _)| held == path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_holders_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = Locks::default();
        first.take(directory.path()).unwrap();
        assert!(first.holds(directory.path()));
        let taken = Locks::default().take(directory.path());
        assert!(matches!(taken, Err(LockError::Taken { .. })), "{taken:?}");
        drop(first);
        Locks::default().take(directory.path()).unwrap();
    }
}
