//! Turns executable patterns into the files they mean in one workload's mounts, and pins them.
//!
//! Looks only at metadata and never opens a file for reading. Paths are resolved as the workload's
//! own kernel view would: absolute symbolic links start at the workload's root and no path leaves
//! it. Knows no scope, grant or table. Single-threaded; the file system may change at any time, so
//! every answer holds for the moment it was read.
//!
//! What is granted is the file that was there first. A workload may write where a granted file
//! lies; [`Pinned`] sees to it that what it puts there is reported and not granted.
//!
//! [`FileId::generation`] is always zero, "unknown": the two calls that tell it
//! (`FS_IOC_GETVERSION`, `name_to_handle_at`) have no kept wrapper without unsafe code. Within
//! [`Pinned`] the time of birth takes its place, which tells a file from a later one with the same
//! inode number; between two resolutions only the kernel's own checks do.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, BufReader},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use agentguard_common::FileId;
use procfs::{FromBufRead as _, process::MountInfos};
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags},
    io::Errno,
};

use super::document::{ExecutablePattern, ExecutablePatternKind};
use crate::pattern::{PathPattern, name_matches};

/// The most executables that one pattern may mean.
pub const MAX_FILES: usize = 65_536;
/// How many directories below a tree's own are searched, one inside the other.
pub const MAX_DEPTH: usize = 64;
/// The most names that are looked at for one pattern, whatever they are.
const MAX_NAMES: usize = 16 * MAX_FILES;
/// File systems whose files the kernel makes up; none of them is a program.
const SYNTHETIC: [&str; 8] =
    ["proc", "sysfs", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs", "bpf"];

/// Looks patterns up in one workload's mounts.
#[derive(Clone, Debug)]
pub struct Resolver {
    root: PathBuf,
    /// The directory in `/proc` of a process that sees these mounts, where the root does not tell.
    process: Option<PathBuf>,
    volumes: Volumes,
}

/// What to make of files that lie on another mount than the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Volumes {
    /// The host's: who may write there is the host's affair.
    Granted,
    /// A container's: what lies on one that can be written to was put there by the workload or by
    /// whoever shares the volume with it, and is granted to nobody.
    ReadOnly,
}

/// The files that patterns mean, each once, and what is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolution {
    /// In the order of their paths within each pattern.
    pub files: Vec<ResolvedFile>,
    pub problems: Vec<ResolveProblem>,
}

/// A file that may be executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedFile {
    /// Where it was found, below the workload's root; the path of the link where a symbolic link
    /// leads to it.
    pub path: PathBuf,
    pub id: FileId,
}

/// Something about a pattern or a file that its author should know; the rest is resolved all the
/// same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveProblem {
    #[error("{pattern} means no file here; install it, or correct the path")]
    Missing { pattern: ExecutablePattern },
    #[error("{} is not a regular file; name the program itself", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} has no execute bit; set one, or remove the path from the scope", path.display())]
    NotExecutable { path: PathBuf },
    #[error(
        "{} lies on a volume that can be written to and is not granted; put it into the image, or \
         mount the volume read-only",
        path.display()
    )]
    OnVolume { path: PathBuf },
    #[error(
        "{pattern} means more than {MAX_FILES} files; the rest is not granted, name smaller trees"
    )]
    TooMany { pattern: ExecutablePattern },
    #[error(
        "{pattern} reaches {}, more than {MAX_DEPTH} directories down; what is below is not \
         granted, name that directory by itself",
        directory.display()
    )]
    TooDeep { pattern: ExecutablePattern, directory: PathBuf },
    #[error("{} can not be looked up: {error}; what it holds is not granted", path.display())]
    Unreadable { path: PathBuf, error: Errno },
    #[error(
        "{} is another file than the one granted (inode {} of device {}, now {} of {}); neither is \
         granted until the executables are refreshed",
        path.display(), was.inode, was.device, now.inode, now.device
    )]
    Changed { path: PathBuf, was: FileId, now: FileId },
    #[error(
        "{} is gone; its file (inode {} of device {}) is not granted until it is back, or the \
         executables are refreshed",
        path.display(), was.inode, was.device
    )]
    Vanished { path: PathBuf, was: FileId },
    #[error(
        "{} came after the grant took effect; it is not granted until the executables are refreshed",
        path.display()
    )]
    Appeared { path: PathBuf, id: FileId },
}

/// Why nothing at all could be looked up.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    #[error(
        "the workload's root {} can not be opened: {error}; check that its process is still there",
        path.display()
    )]
    Root { path: PathBuf, error: Errno },
    #[error("the workload's mounts can not be read from {}: {error}; check that /proc is mounted", path.display())]
    Mounts { path: PathBuf, error: io::Error },
}

/// Which mounts a path is meant in: a mount namespace and a root directory within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId {
    mount_namespace: u64,
    mount: u64,
    inode: u64,
}

/// Whether a file may be granted that was missing when its pattern was first resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Only a refresh grants it. For workloads that run as root: no owner tells their files from
    /// the host's.
    OnRefresh,
    /// Also when only root can have put it there: it belongs to root, as does its directory, and
    /// nobody else may write to either. For workloads that never run as root.
    RootOwned,
}

/// The files that were granted first, kept for the life of the process.
#[derive(Clone, Debug, Default)]
pub struct Pinned {
    roots: HashMap<RootId, Pins>,
}

#[derive(Clone, Debug, Default)]
struct Pins {
    files: BTreeMap<PathBuf, Pin>,
    patterns: BTreeMap<ExecutablePattern, PatternPins>,
}

#[derive(Clone, Debug)]
struct PatternPins {
    paths: BTreeSet<PathBuf>,
    /// Nothing was there when the pattern was first resolved.
    began_missing: bool,
}

/// What tells a file from one that takes its place, also where the inode number is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pin {
    pub(super) id: FileId,
    /// Seconds and nanoseconds; nothing where the file system does not keep it.
    born: Option<(i64, u32)>,
}

/// A workload's root while it is looked at.
pub(super) struct OpenRoot {
    id: RootId,
    directory: OwnedFd,
    mounts: HashMap<u64, Mount>,
    volumes: Volumes,
}

/// What a mount's files have in common.
struct Mount {
    /// `super_block.s_dev`. Not what `stat` says everywhere: btrfs and overlayfs give files device
    /// numbers of their own, which the kernel half never sees.
    device: u32,
    synthetic: bool,
    writable: bool,
}

/// All that one pattern means, before it is compared with anything.
#[derive(Default)]
struct Lookup {
    /// Ordered, because what is over the limit must be the same on every run.
    files: BTreeMap<PathBuf, Pin>,
    problems: Vec<ResolveProblem>,
    names: usize,
}

/// The names in a directory, and what each is as far as the directory says.
type Names = Vec<(OsString, FileType)>;

impl Resolver {
    /// A resolver for the mounts whose root is `root`: `/`, or `/proc/<pid>/root` of one of the
    /// workload's processes.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root, process: None, volumes: Volumes::Granted }
    }

    /// A resolver for the mounts of a container: those that the process whose directory in `/proc`
    /// is `process` sees, with the root at `root` as that process names it. That is `/` once the
    /// container runs, and the directory that will be its root while the runtime sets it up.
    ///
    /// Grants nothing on volumes that can be written to.
    #[must_use]
    pub fn of_container(process: &Path, root: &Path) -> Self {
        let below = root.strip_prefix("/").unwrap_or(root);
        Self {
            root: process.join("root").join(below),
            process: Some(process.to_owned()),
            volumes: Volumes::ReadOnly,
        }
    }

    /// Opens a file of these mounts for reading, without waiting for a pipe or a device.
    ///
    /// # Errors
    ///
    /// When the root is gone, or there is no such file.
    pub fn open_file(&self, path: &Path) -> Result<File, ResolveError> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = self.open()?.open_at(path, flags);
        opened.map(File::from).map_err(|error| ResolveError::Root { path: path.to_owned(), error })
    }

    /// What `pattern` means at this moment, each file once, with no regard to what it meant
    /// before.
    ///
    /// # Errors
    ///
    /// When the root is gone or can not be read.
    pub fn resolve(&self, pattern: &ExecutablePattern) -> Result<Resolution, ResolveError> {
        self.resolve_all([pattern])
    }

    /// What all of `patterns` mean at this moment. Opening the root and reading its mounts is most
    /// of the work, and is done once.
    ///
    /// # Errors
    ///
    /// When the root is gone or can not be read.
    pub fn resolve_all<'a>(
        &self,
        patterns: impl IntoIterator<Item = &'a ExecutablePattern>,
    ) -> Result<Resolution, ResolveError> {
        let root = self.open()?;
        let mut resolution = Resolution::default();
        for pattern in patterns {
            let Lookup { files, problems, names: _ } = root.look_up(pattern);
            resolution.problems.extend(problems);
            let files = files.into_iter().map(|(path, pin)| ResolvedFile { path, id: pin.id });
            resolution.files.extend(files);
        }
        resolution.keep_each_file_once();
        Ok(resolution)
    }

    /// Which mounts these are, as [`Pinned::retain`] asks for it.
    ///
    /// # Errors
    ///
    /// When the root is gone or can not be read.
    pub fn root_id(&self) -> Result<RootId, ResolveError> {
        self.open().map(|root| root.id)
    }

    pub(super) fn open(&self) -> Result<OpenRoot, ResolveError> {
        let process = self.process();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let of_root = |error| ResolveError::Root { path: self.root.clone(), error };
        let directory =
            rustix::fs::openat(CWD, &self.root, flags, Mode::empty()).map_err(of_root)?;
        let status = status_of(&directory).map_err(of_root)?;

        let path = process.join("mountinfo");
        let infos = File::open(&path)
            .map_err(procfs::ProcError::from)
            .and_then(|file| MountInfos::from_buf_read(BufReader::new(file)))
            .map_err(|error| ResolveError::Mounts { path, error: io::Error::other(error) })?;
        let mounts = infos.0.iter().filter_map(|info| {
            let number = u64::try_from(info.mnt_id).ok()?;
            let (major, minor) = info.majmin.split_once(':')?;
            let device = kernel_device(major.parse().ok()?, minor.parse().ok()?);
            let synthetic = SYNTHETIC.contains(&info.fs_type.as_str());
            let writable = !info.mount_options.contains_key("ro");
            Some((number, Mount { device, synthetic, writable }))
        });
        let mounts = mounts.collect();

        let path = process.join("ns/mnt");
        let namespace =
            std::fs::metadata(&path).map_err(|error| ResolveError::Mounts { path, error })?;
        let mount_namespace = namespace.ino();
        let id = RootId { mount_namespace, mount: status.stx_mnt_id, inode: status.stx_ino };
        Ok(OpenRoot { id, directory, mounts, volumes: self.volumes })
    }

    /// The directory in `/proc` of a process that sees these mounts.
    fn process(&self) -> PathBuf {
        if let Some(process) = &self.process {
            return process.clone();
        }
        let parent =
            self.root.parent().filter(|_| self.root.file_name() == Some(OsStr::new("root")));
        match parent {
            Some(process) if process.join("ns/mnt").exists() => process.to_owned(),
            Some(_) | None => PathBuf::from("/proc/self"),
        }
    }
}

impl Pinned {
    /// What `patterns` mean in the mounts of `resolver`, as far as it is what they meant when each
    /// was first resolved there.
    ///
    /// A path whose file was replaced or removed is left out altogether: the number of a file that
    /// is gone can be given to a new one, so the old file is not granted either.
    ///
    /// # Errors
    ///
    /// When the root is gone or can not be read; no pin changes then.
    pub fn resolve<'a>(
        &mut self,
        resolver: &Resolver,
        patterns: impl IntoIterator<Item = &'a ExecutablePattern>,
        admission: Admission,
    ) -> Result<Resolution, ResolveError> {
        let root = resolver.open()?;
        let pins = self.roots.entry(root.id).or_default();
        let mut resolution = Resolution::default();
        let mut judged = BTreeSet::new();
        for pattern in patterns {
            let found = root.look_up(pattern);
            let paths =
                pins.admit(&root, pattern, &found.files, admission, &mut judged, &mut resolution);
            resolution.problems.extend(found.problems);
            for path in paths {
                if let Some(pin) = pins.files.get(&path).filter(|_| judged.insert(path.clone())) {
                    let now = found.files.get(&path).copied();
                    let verdict = root.compare(&path, *pin, now);
                    match verdict {
                        Ok(id) => resolution.files.push(ResolvedFile { path, id }),
                        Err(problem) => resolution.problems.push(problem),
                    }
                }
            }
        }
        resolution.keep_each_file_once();
        Ok(resolution)
    }

    /// Forgets every pin: what the next resolution finds is granted.
    pub fn refresh(&mut self) {
        self.roots.clear();
    }

    /// Forgets the pins of mounts that no workload has any more; `keep` says which are in use.
    pub fn retain(&mut self, mut keep: impl FnMut(&RootId) -> bool) {
        self.roots.retain(|root, _| keep(root));
    }

    /// The mounts that have pins.
    pub fn roots(&self) -> impl Iterator<Item = &RootId> {
        self.roots.keys()
    }
}

impl Pins {
    /// Pins what may be pinned of `found` and gives the paths that `pattern` has pins for.
    fn admit(
        &mut self,
        root: &OpenRoot,
        pattern: &ExecutablePattern,
        found: &BTreeMap<PathBuf, Pin>,
        admission: Admission,
        judged: &mut BTreeSet<PathBuf>,
        resolution: &mut Resolution,
    ) -> BTreeSet<PathBuf> {
        let is_first = !self.patterns.contains_key(pattern);
        let known = self.patterns.entry(pattern.clone()).or_insert_with(|| PatternPins {
            paths: BTreeSet::new(),
            began_missing: found.is_empty(),
        });
        for (path, pin) in found {
            if known.paths.contains(path) {
                continue;
            }
            let admitted = is_first
                || self.files.contains_key(path)
                || match admission {
                    Admission::OnRefresh => false,
                    Admission::RootOwned => known.began_missing && root.is_made_by_root(path),
                };
            if admitted {
                known.paths.insert(path.clone());
                self.files.entry(path.clone()).or_insert(*pin);
            } else if judged.insert(path.clone()) {
                let problem = ResolveProblem::Appeared { path: path.clone(), id: pin.id };
                resolution.problems.push(problem);
            }
        }
        known.paths.clone()
    }
}

impl Resolution {
    fn keep_each_file_once(&mut self) {
        let mut seen = BTreeSet::new();
        self.files.retain(|file| seen.insert(file.id));
    }
}

impl OpenRoot {
    fn look_up(&self, pattern: &ExecutablePattern) -> Lookup {
        let mut lookup = Lookup::default();
        match pattern.kind() {
            ExecutablePatternKind::Exact(path) => {
                let path = PathBuf::from(path.to_string());
                match self.file(&path) {
                    Ok(pin) => drop(lookup.files.insert(path, pin)),
                    Err(problem) => lookup.problems.extend(problem),
                }
            }
            ExecutablePatternKind::Glob(path) => {
                for path in self.expand(path, pattern, &mut lookup) {
                    // Of the names that match, those that are no programs are not meant.
                    if let Ok(pin) = self.file(&path) {
                        lookup.add(path, pin);
                    }
                }
            }
            ExecutablePatternKind::Tree { directory } => {
                for directory in self.expand(directory, pattern, &mut lookup) {
                    self.walk(&directory, pattern, &mut lookup);
                }
            }
        }
        if lookup.files.len() > MAX_FILES {
            lookup.files.pop_last();
            lookup.problems.push(ResolveProblem::TooMany { pattern: pattern.clone() });
        }
        if lookup.files.is_empty() && lookup.problems.is_empty() {
            lookup.problems.push(ResolveProblem::Missing { pattern: pattern.clone() });
        }
        lookup
    }

    /// The executable at `path`, symbolic links followed. The problem is nothing where there is
    /// nothing.
    fn file(&self, path: &Path) -> Result<Pin, Option<ResolveProblem>> {
        let unreadable = |error| match error {
            // A loop of links leads nowhere, as a link to nothing does.
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => None,
            error => Some(ResolveProblem::Unreadable { path: path.to_owned(), error }),
        };
        let file = self.open_at(path, OFlags::PATH).map_err(unreadable)?;
        let status = status_of(&file).map_err(unreadable)?;
        match () {
            () if !is_regular(&status) => {
                Err(Some(ResolveProblem::NotAFile { path: path.to_owned() }))
            }
            () if !is_executable(&status) => {
                Err(Some(ResolveProblem::NotExecutable { path: path.to_owned() }))
            }
            () if !self.is_grantable(&status) => {
                Err(Some(ResolveProblem::OnVolume { path: path.to_owned() }))
            }
            () => Ok(self.pin(&status)),
        }
    }

    /// Whether `path` still is the file that was pinned. `now` is what a look-up found, if it did.
    fn compare(&self, path: &Path, pin: Pin, now: Option<Pin>) -> Result<FileId, ResolveProblem> {
        let was = pin.id;
        // A look-up that hit a limit leaves files out that are still there.
        let now = match now.map_or_else(|| self.file(path), Ok) {
            Ok(now) => now,
            Err(None) => return Err(ResolveProblem::Vanished { path: path.to_owned(), was }),
            Err(Some(problem)) => return Err(problem),
        };
        if now == pin {
            Ok(was)
        } else {
            Err(ResolveProblem::Changed { path: path.to_owned(), was, now: now.id })
        }
    }

    /// The paths that match, name by name; literal names are not looked up.
    fn expand(
        &self,
        path: &PathPattern,
        pattern: &ExecutablePattern,
        lookup: &mut Lookup,
    ) -> Vec<PathBuf> {
        let mut paths = vec![PathBuf::from("/")];
        for wanted in path.names() {
            if !wanted.contains('*') {
                paths.iter_mut().for_each(|path| path.push(wanted));
                continue;
            }
            let mut next = Vec::new();
            for directory in paths {
                let opened = self.open_at(&directory, OFlags::RDONLY | OFlags::DIRECTORY);
                let names = opened.and_then(|opened| lookup.names_in(&opened, pattern));
                match names {
                    Ok(names) => next.extend(
                        names
                            .into_iter()
                            .filter(|(name, _)| {
                                name.to_str().is_some_and(|name| name_matches(wanted, name))
                            })
                            .map(|(name, _)| directory.join(name)),
                    ),
                    Err(error) => lookup.note(directory, error),
                }
            }
            paths = next;
        }
        paths
    }

    /// Adds every executable that lies below `directory`. Links below it are not followed: what
    /// they lead to lies elsewhere, or is found by itself.
    fn walk(&self, directory: &Path, pattern: &ExecutablePattern, lookup: &mut Lookup) {
        let base = match self.open_at(directory, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(base) => base,
            Err(error) => return lookup.note(directory.to_owned(), error),
        };
        let mut left = vec![(PathBuf::from("."), 0)];
        while let Some((below, depth)) = left.pop() {
            if lookup.is_full() {
                return;
            }
            let place = if depth == 0 { directory.to_owned() } else { directory.join(&below) };
            match self.enter(&base, &below, pattern, lookup) {
                Ok(None) => {}
                Ok(Some((opened, names))) => {
                    for (name, kind) in names {
                        let path =
                            if depth == 0 { PathBuf::from(&name) } else { below.join(&name) };
                        match self.kind_and_status(&opened, &name, kind) {
                            Ok((FileType::Directory, _)) if depth == MAX_DEPTH => {
                                lookup.problems.push(ResolveProblem::TooDeep {
                                    pattern: pattern.clone(),
                                    directory: directory.join(path),
                                });
                            }
                            Ok((FileType::Directory, _)) => left.push((path, depth + 1)),
                            Ok((FileType::RegularFile, Some(status))) if is_executable(&status) => {
                                let path = directory.join(path);
                                if self.is_grantable(&status) {
                                    lookup.add(path, self.pin(&status));
                                } else {
                                    lookup.problems.push(ResolveProblem::OnVolume { path });
                                }
                            }
                            Ok(_) => {}
                            Err(error) => lookup.note(directory.join(path), error),
                        }
                    }
                }
                Err(error) => lookup.note(place, error),
            }
        }
    }

    /// A directory of a walk and its names; nothing where it holds no programs by nature.
    fn enter(
        &self,
        base: &OwnedFd,
        below: &Path,
        pattern: &ExecutablePattern,
        lookup: &mut Lookup,
    ) -> Result<Option<(OwnedFd, Names)>, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inside =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let opened = rustix::fs::openat2(base, below, flags, Mode::empty(), inside)?;
        let mount = status_of(&opened)?.stx_mnt_id;
        if self.mounts.get(&mount).is_some_and(|mount| mount.synthetic) {
            return Ok(None);
        }
        let names = lookup.names_in(&opened, pattern)?;
        Ok(Some((opened, names)))
    }

    /// What `name` is, with the status of a regular file.
    fn kind_and_status(
        &self,
        directory: &OwnedFd,
        name: &OsStr,
        kind: FileType,
    ) -> Result<(FileType, Option<Statx>), Errno> {
        if kind != FileType::RegularFile && kind != FileType::Unknown {
            return Ok((kind, None));
        }
        let status = rustix::fs::statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, wanted())?;
        Ok((FileType::from_raw_mode(status.stx_mode.into()), Some(status)))
    }

    /// Whether the mount that a file lies on is one whose files may be granted.
    fn is_grantable(&self, status: &Statx) -> bool {
        match self.volumes {
            Volumes::Granted => true,
            Volumes::ReadOnly => {
                let mount = self.mounts.get(&status.stx_mnt_id);
                status.stx_mnt_id == self.id.mount || mount.is_some_and(|mount| !mount.writable)
            }
        }
    }

    /// Whether only root can have put the file at `path` there, by itself and by its directory.
    fn is_made_by_root(&self, path: &Path) -> bool {
        let Some(directory) = path.parent() else { return false };
        // A link is left to a refresh: its own directory says nothing about where it leads.
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let is_roots = |path: &Path| {
            let status = self.open_at(path, flags).and_then(|file| status_of(&file));
            status.is_ok_and(|status| {
                let is_link = FileType::from_raw_mode(status.stx_mode.into()) == FileType::Symlink;
                status.stx_uid == 0 && status.stx_mode & 0o022 == 0 && !is_link
            })
        };
        is_roots(path) && is_roots(directory)
    }

    /// Opens `path` as a process with this root would.
    pub(super) fn open_at(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        rustix::fs::openat2(&self.directory, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    }

    pub(super) fn pin(&self, status: &Statx) -> Pin {
        let device = match self.mounts.get(&status.stx_mnt_id) {
            Some(mount) => mount.device,
            // A mount that came after the list was read, or lies outside of the process's root.
            None => kernel_device(status.stx_dev_major, status.stx_dev_minor),
        };
        let has_birth = status.stx_mask & StatxFlags::BTIME.bits() != 0;
        let born = has_birth.then_some((status.stx_btime.tv_sec, status.stx_btime.tv_nsec));
        Pin { id: FileId { inode: status.stx_ino, device, generation: 0 }, born }
    }
}

impl Lookup {
    /// Takes one file more than allowed at most, so that it can be told that it is too much.
    fn add(&mut self, path: PathBuf, pin: Pin) {
        self.files.insert(path, pin);
        if self.files.len() > MAX_FILES + 1 {
            self.files.pop_last();
        }
    }

    fn is_full(&self) -> bool {
        self.files.len() > MAX_FILES || self.names > MAX_NAMES
    }

    /// The names in a directory without `.` and `..`, sorted; none once there were too many.
    fn names_in(
        &mut self,
        directory: impl AsFd,
        pattern: &ExecutablePattern,
    ) -> Result<Names, Errno> {
        let mut names = Vec::new();
        if self.names > MAX_NAMES {
            return Ok(names);
        }
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            self.names += 1;
            if self.names > MAX_NAMES {
                self.problems.push(ResolveProblem::TooMany { pattern: pattern.clone() });
                break;
            }
            names.push((OsStr::from_bytes(name).to_owned(), entry.file_type()));
        }
        names.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(names)
    }

    /// What is not there is not meant; anything else is worth knowing.
    fn note(&mut self, path: PathBuf, error: Errno) {
        if !matches!(error, Errno::NOENT | Errno::NOTDIR | Errno::LOOP) {
            self.problems.push(ResolveProblem::Unreadable { path, error });
        }
    }
}

/// `MKDEV` of the kernel, which is not the encoding of `st_dev`.
const fn kernel_device(major: u32, minor: u32) -> u32 {
    major << 20 | minor & 0xf_ffff
}

fn wanted() -> StatxFlags {
    StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID
}

pub(super) fn status_of(file: &OwnedFd) -> Result<Statx, Errno> {
    rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted())
}

fn is_regular(status: &Statx) -> bool {
    FileType::from_raw_mode(status.stx_mode.into()) == FileType::RegularFile
}

fn is_executable(status: &Statx) -> bool {
    status.stx_mode & 0o111 != 0
}

#[cfg(test)]
mod tests;
