//! A file system that can be full.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A small tmpfs of a test's own; dropped, it is unmounted.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of `size` bytes (`64k`) at a path, which is made.
    ///
    /// # Panics
    ///
    /// When it can not be mounted.
    #[track_caller]
    #[must_use]
    pub fn mount(path: &Path, size: &str) -> Self {
        fs::create_dir_all(path).expect("a directory can be made");
        let options = format!("size={size}");
        mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .expect("a tmpfs can be mounted");
        Self(path.to_owned())
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Fills it up to the last page.
    ///
    /// # Panics
    ///
    /// When the filler can not be made.
    pub fn fill(&self) {
        let mut filler = File::create(self.filler()).expect("a file can be made");
        while filler.write_all(&[0; 512]).is_ok() {}
    }

    /// Makes room again.
    ///
    /// # Panics
    ///
    /// When it was not filled.
    pub fn clear(&self) {
        fs::remove_file(self.filler()).expect("it was filled");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Also where a daemon of a test that failed still has files open there.
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}
