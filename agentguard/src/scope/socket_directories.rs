//! Finds the directories that granted unix sockets lie in, and pins them.
//!
//! A server makes its socket anew at each start, so what is granted is a name in a directory and
//! not a file. Resolves as [`super::executables`] does; the file system may change at any time, so
//! every answer holds for the moment it was read. Single-threaded; knows no scope, grant or table.
//!
//! What is granted is the directory that was there first. One that takes its place is reported and
//! not granted until a refresh. One that was missing is granted when it comes, as servers make
//! theirs when they start; but then no symbolic link may lead to it from the last directory that
//! was there: whoever may write there could have it lead to any other socket of the same name.

use std::{
    collections::BTreeMap,
    ops::Bound,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use agentguard_common::FileId;
use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::executables::{OpenRoot, Pin, ResolveError, Resolver, status_of};

/// A directory, as the kernel tells it from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectoryId {
    pub inode: u64,
    /// `super_block.s_dev`, as in [`FileId::device`].
    pub device: u32,
}

/// Why a socket is not granted, or may not be the one that was meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryProblem {
    #[error("{} is no directory here; what lies in it is granted once it is there", path.display())]
    Missing { path: PathBuf },
    #[error(
        "{} came after the grant took effect, and a symbolic link leads to it; what lies in it is \
         not granted until the executables are refreshed",
        path.display()
    )]
    Linked { path: PathBuf },
    #[error(
        "{} is another directory than the one granted (inode {} of device {}, now {} of {}); \
         neither is granted until the executables are refreshed",
        path.display(), was.inode, was.device, now.inode, now.device
    )]
    Changed { path: PathBuf, was: FileId, now: FileId },
    #[error(
        "{} is gone (inode {} of device {}); what lies in it is not granted until it is back, or \
         the executables are refreshed",
        path.display(), was.inode, was.device
    )]
    Vanished { path: PathBuf, was: FileId },
    #[error("{} can not be looked up: {error}; what lies in it is not granted", path.display())]
    Unreadable { path: PathBuf, error: Errno },
    #[error(
        "{} is a symbolic link, which no server binds; name the socket that it leads to",
        path.display()
    )]
    NotASocket { path: PathBuf },
}

/// The directories that were granted first, kept for the life of the process.
#[derive(Clone, Debug, Default)]
pub struct SocketDirectories {
    known: BTreeMap<PathBuf, Known>,
    /// Where the last look at some of them ended.
    looked: Option<PathBuf>,
}

#[derive(Clone, Debug)]
struct Known {
    place: Place,
    /// What was found when it was last resolved.
    found: Result<DirectoryId, DirectoryProblem>,
}

/// What was there when a directory was first asked for.
#[derive(Clone, Debug)]
enum Place {
    Pinned(Pin),
    /// Nothing; the nearest directory above that was.
    Awaited {
        above: PathBuf,
        pin: Pin,
    },
}

impl SocketDirectories {
    /// The directory of each socket, as far as it is what it was when it was first resolved, and
    /// what is wrong, each once.
    ///
    /// # Errors
    ///
    /// When the root is gone or can not be read; no pin changes then.
    pub fn resolve<'a>(
        &mut self,
        resolver: &Resolver,
        sockets: impl IntoIterator<Item = &'a Path>,
    ) -> Result<(BTreeMap<&'a Path, DirectoryId>, Vec<DirectoryProblem>), ResolveError> {
        let root = resolver.open()?;
        let mut directories = BTreeMap::new();
        let mut problems = Vec::new();
        for socket in sockets {
            let Some(path) = socket.parent() else { continue };
            match self.look(&root, path) {
                Ok(directory) => {
                    directories.insert(socket, directory);
                    if is_link(&root, socket) {
                        let path = socket.to_owned();
                        problems.push(DirectoryProblem::NotASocket { path });
                    }
                }
                Err(problem) if problems.contains(&problem) => {}
                Err(problem) => problems.push(problem),
            }
        }
        Ok((directories, problems))
    }

    /// What the directory of `socket` is at this moment, with no regard to what it was before.
    ///
    /// # Errors
    ///
    /// When the root is gone or can not be read.
    pub fn at_present(
        resolver: &Resolver,
        socket: &Path,
    ) -> Result<Option<DirectoryId>, ResolveError> {
        let root = resolver.open()?;
        let found = socket.parent().map(|path| directory(&root, path));
        Ok(found.and_then(Result::ok).map(|pin| pin.directory()))
    }

    /// Whether something is another now than when it was last resolved. Looks at no more than
    /// `limit` directories, and goes on with the next ones when asked again.
    ///
    /// # Errors
    ///
    /// When the root is gone or can not be read.
    pub fn have_changed(
        &mut self,
        resolver: &Resolver,
        limit: usize,
    ) -> Result<bool, ResolveError> {
        if self.known.is_empty() {
            return Ok(false);
        }
        let root = resolver.open()?;
        let behind = self.looked.take().map_or(Bound::Unbounded, Bound::Excluded);
        let paths: Vec<PathBuf> = self
            .known
            .range::<PathBuf, _>((behind, Bound::Unbounded))
            .map(|(path, _)| path.clone())
            .take(limit)
            .collect();
        // A full batch may have more behind it.
        self.looked = paths.last().cloned().filter(|_| paths.len() == limit);
        let mut changed = false;
        for path in paths {
            let before = self.known.get(&path).map(|known| known.found.clone());
            changed |= before != Some(self.look(&root, &path));
        }
        Ok(changed)
    }

    /// Forgets every pin: what the next resolution finds is granted.
    pub fn refresh(&mut self) {
        self.known.clear();
    }

    fn look(&mut self, root: &OpenRoot, path: &Path) -> Result<DirectoryId, DirectoryProblem> {
        let place = match self.known.get(path) {
            Some(known) => known.place.clone(),
            None => first_sight(root, path)?,
        };
        let (place, found) = place.look(root, path);
        self.known.insert(path.to_owned(), Known { place, found: found.clone() });
        found
    }
}

impl Place {
    /// What is there now, and what is known of the place from then on.
    fn look(self, root: &OpenRoot, path: &Path) -> (Self, Result<DirectoryId, DirectoryProblem>) {
        match self {
            Self::Pinned(pin) => (Self::Pinned(pin), compare(root, path, pin)),
            Self::Awaited { above, pin } => match await_below(root, path, &above, pin) {
                Ok(arrived) => (Self::Pinned(arrived), Ok(arrived.directory())),
                Err(problem) => (Self::Awaited { above, pin }, Err(problem)),
            },
        }
    }
}

impl Pin {
    const fn directory(self) -> DirectoryId {
        DirectoryId { inode: self.id.inode, device: self.id.device }
    }
}

fn first_sight(root: &OpenRoot, path: &Path) -> Result<Place, DirectoryProblem> {
    for above in path.ancestors() {
        match directory(root, above) {
            Ok(pin) if above == path => return Ok(Place::Pinned(pin)),
            Ok(pin) => return Ok(Place::Awaited { above: above.to_owned(), pin }),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(error) => {
                return Err(DirectoryProblem::Unreadable { path: above.to_owned(), error });
            }
        }
    }
    Err(DirectoryProblem::Missing { path: path.to_owned() })
}

/// Whether `path` still is the directory that was pinned.
fn compare(root: &OpenRoot, path: &Path, pin: Pin) -> Result<DirectoryId, DirectoryProblem> {
    let path = || path.to_owned();
    let was = pin.id;
    match directory(root, &path()) {
        Ok(now) if now == pin => Ok(pin.directory()),
        Ok(now) => Err(DirectoryProblem::Changed { path: path(), was, now: now.id }),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
            Err(DirectoryProblem::Vanished { path: path(), was })
        }
        Err(error) => Err(DirectoryProblem::Unreadable { path: path(), error }),
    }
}

/// The directory at `path`, which was missing when `above`, pinned, was the nearest one there was.
fn await_below(
    root: &OpenRoot,
    path: &Path,
    above: &Path,
    pin: Pin,
) -> Result<Pin, DirectoryProblem> {
    compare(root, above, pin)?;
    let unreadable = |error| DirectoryProblem::Unreadable { path: path.to_owned(), error };
    let base = root.open_at(above, OFlags::PATH | OFlags::DIRECTORY).map_err(unreadable)?;
    let below = path.strip_prefix(above).unwrap_or(path);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(&base, below, flags, Mode::empty(), inside) {
        Ok(opened) => pin_of(root, &opened).map_err(unreadable),
        Err(Errno::NOENT | Errno::NOTDIR) => {
            Err(DirectoryProblem::Missing { path: path.to_owned() })
        }
        Err(Errno::LOOP) => Err(DirectoryProblem::Linked { path: path.to_owned() }),
        Err(error) => Err(unreadable(error)),
    }
}

/// The directory at `path`, symbolic links followed.
fn directory(root: &OpenRoot, path: &Path) -> Result<Pin, Errno> {
    let opened = root.open_at(path, OFlags::PATH | OFlags::DIRECTORY)?;
    pin_of(root, &opened)
}

fn pin_of(root: &OpenRoot, directory: &OwnedFd) -> Result<Pin, Errno> {
    status_of(directory).map(|status| root.pin(&status))
}

fn is_link(root: &OpenRoot, path: &Path) -> bool {
    let opened = root.open_at(path, OFlags::PATH | OFlags::NOFOLLOW);
    opened
        .and_then(|file| status_of(&file))
        .is_ok_and(|status| FileType::from_raw_mode(status.stx_mode.into()) == FileType::Symlink)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{fs::MetadataExt as _, fs::symlink, net::UnixListener},
    };

    use tempfile::TempDir;

    use super::*;

    struct Tree(TempDir);

    impl Tree {
        fn new(directories: &[&str]) -> Self {
            let tree = Self(TempDir::new().unwrap());
            directories.iter().for_each(|path| tree.make(path));
            tree
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.path().join(path.trim_start_matches('/'))
        }

        fn make(&self, path: &str) {
            fs::create_dir_all(self.at(path)).unwrap();
        }

        fn inode(&self, path: &str) -> u64 {
            fs::metadata(self.at(path)).unwrap().ino()
        }

        fn resolver(&self) -> Resolver {
            Resolver::new(self.0.path().to_owned())
        }
    }

    fn resolve(
        pins: &mut SocketDirectories,
        tree: &Tree,
        socket: &str,
    ) -> Result<u64, DirectoryProblem> {
        let socket = Path::new(socket);
        let (found, mut problems) = pins.resolve(&tree.resolver(), [socket]).unwrap();
        match found.get(socket) {
            Some(directory) => Ok(directory.inode),
            None => Err(problems.pop().unwrap()),
        }
    }

    fn changed(pins: &mut SocketDirectories, tree: &Tree) -> bool {
        pins.have_changed(&tree.resolver(), 8).unwrap()
    }

    #[test]
    fn a_server_that_makes_its_socket_anew_stays_where_it_was_granted() {
        let tree = Tree::new(&["/run/agent"]);
        let mut pins = SocketDirectories::default();
        let socket = "/run/agent/tool.sock";
        let directory = tree.inode("/run/agent");
        assert_eq!(resolve(&mut pins, &tree, socket), Ok(directory));
        for _ in 0..2 {
            let _server = UnixListener::bind(tree.at(socket)).unwrap();
            assert_eq!(resolve(&mut pins, &tree, socket), Ok(directory));
            assert!(!changed(&mut pins, &tree));
            fs::remove_file(tree.at(socket)).unwrap();
        }
    }

    #[test]
    fn a_directory_that_took_the_place_of_the_granted_one_is_reported_until_a_refresh() {
        let tree = Tree::new(&["/run/agent", "/run/other"]);
        let mut pins = SocketDirectories::default();
        let socket = "/run/agent/tool.sock";
        resolve(&mut pins, &tree, socket).unwrap();
        fs::rename(tree.at("/run/agent"), tree.at("/run/old")).unwrap();
        assert!(changed(&mut pins, &tree));
        let gone = resolve(&mut pins, &tree, socket).unwrap_err();
        assert!(matches!(gone, DirectoryProblem::Vanished { .. }), "{gone}");
        symlink("other", tree.at("/run/agent")).unwrap();
        assert!(changed(&mut pins, &tree));
        let other = resolve(&mut pins, &tree, socket).unwrap_err();
        assert!(matches!(other, DirectoryProblem::Changed { .. }), "{other}");
        assert!(other.to_string().contains("refreshed"), "{other}");
        fs::remove_file(tree.at("/run/agent")).unwrap();
        tree.make("/run/agent");
        let new = resolve(&mut pins, &tree, socket).unwrap_err();
        assert!(matches!(new, DirectoryProblem::Changed { .. }), "{new}");
        pins.refresh();
        assert_eq!(resolve(&mut pins, &tree, socket), Ok(tree.inode("/run/agent")));
        // The one that was granted is the one that counts, wherever it has been meanwhile.
        fs::rename(tree.at("/run/agent"), tree.at("/run/away")).unwrap();
        assert!(resolve(&mut pins, &tree, socket).is_err());
        fs::rename(tree.at("/run/away"), tree.at("/run/agent")).unwrap();
        assert!(changed(&mut pins, &tree));
        assert_eq!(resolve(&mut pins, &tree, socket), Ok(tree.inode("/run/agent")));
    }

    #[test]
    fn a_directory_that_was_missing_is_granted_when_it_comes() {
        let tree = Tree::new(&["/run"]);
        let mut pins = SocketDirectories::default();
        let socket = "/run/agent/tools/tool.sock";
        let missing = resolve(&mut pins, &tree, socket).unwrap_err();
        assert_eq!(missing, DirectoryProblem::Missing { path: "/run/agent/tools".into() });
        assert!(!changed(&mut pins, &tree));
        tree.make("/run/agent");
        assert!(!changed(&mut pins, &tree));
        tree.make("/run/agent/tools");
        assert!(changed(&mut pins, &tree));
        assert!(!changed(&mut pins, &tree));
        assert_eq!(resolve(&mut pins, &tree, socket), Ok(tree.inode("/run/agent/tools")));
        fs::remove_dir(tree.at("/run/agent/tools")).unwrap();
        assert!(resolve(&mut pins, &tree, socket).is_err());
    }

    #[test]
    fn a_link_that_was_there_is_followed_and_one_that_came_later_is_not() {
        let tree = Tree::new(&["/run/docker", "/var"]);
        symlink("../run", tree.at("/var/run")).unwrap();
        let mut pins = SocketDirectories::default();
        let there = "/var/run/docker/a.sock";
        assert_eq!(resolve(&mut pins, &tree, there), Ok(tree.inode("/run/docker")));
        let awaited = "/var/run/agent/a.sock";
        resolve(&mut pins, &tree, awaited).unwrap_err();
        symlink("docker", tree.at("/run/agent")).unwrap();
        assert!(changed(&mut pins, &tree));
        let linked = resolve(&mut pins, &tree, awaited).unwrap_err();
        assert_eq!(linked, DirectoryProblem::Linked { path: "/var/run/agent".into() });
        assert!(!changed(&mut pins, &tree), "what is not granted is not tried again and again");
        fs::remove_file(tree.at("/run/agent")).unwrap();
        tree.make("/run/agent");
        assert_eq!(resolve(&mut pins, &tree, awaited), Ok(tree.inode("/run/agent")));
    }

    #[test]
    fn nothing_is_awaited_below_a_directory_that_took_the_place_of_another() {
        let tree = Tree::new(&["/home/agent", "/home/other/tools"]);
        let mut pins = SocketDirectories::default();
        let socket = "/home/agent/tools/a.sock";
        resolve(&mut pins, &tree, socket).unwrap_err();
        fs::rename(tree.at("/home/agent"), tree.at("/home/old")).unwrap();
        symlink("other", tree.at("/home/agent")).unwrap();
        let other = resolve(&mut pins, &tree, socket).unwrap_err();
        assert!(matches!(other, DirectoryProblem::Changed { .. }), "{other}");
    }

    #[test]
    fn a_socket_that_is_a_link_is_named_and_a_file_is_no_directory() {
        let tree = Tree::new(&["/run"]);
        symlink("b.sock", tree.at("/run/a.sock")).unwrap();
        fs::write(tree.at("/run/file"), "").unwrap();
        let mut pins = SocketDirectories::default();
        let sockets = ["/run/a.sock", "/run/file/a.sock", "/run/file/b.sock", "/a.sock"];
        let sockets = sockets.map(Path::new);
        let (found, problems) = pins.resolve(&tree.resolver(), sockets).unwrap();
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [sockets[3], sockets[0]]);
        assert_eq!(
            problems,
            [
                DirectoryProblem::NotASocket { path: "/run/a.sock".into() },
                DirectoryProblem::Missing { path: "/run/file".into() },
            ]
        );
    }

    #[test]
    fn looks_go_round_in_bounded_steps() {
        let tree = Tree::new(&["/run"]);
        let mut pins = SocketDirectories::default();
        let sockets: Vec<PathBuf> = (0..10).map(|n| format!("/run/{n}/a.sock").into()).collect();
        pins.resolve(&tree.resolver(), sockets.iter().map(PathBuf::as_path)).unwrap();
        tree.make("/run/7");
        let mut seen = 0;
        for _ in 0..8 {
            seen += usize::from(pins.have_changed(&tree.resolver(), 3).unwrap());
        }
        assert_eq!(seen, 1);
        assert!(pins.known[Path::new("/run/7")].found.is_ok());
    }
}
