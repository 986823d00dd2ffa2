//! Where lines go: a stream, or files that are rotated by size within a bound on disk.
//!
//! The newest file has the configured path; an older one has the same path with a dot and the
//! number of its first record after it, in twenty digits, so that names sort in order and never
//! change again. Knows bytes and lines; what a line says is the chain's business, except that it
//! finds the last whole line of a log. One thread owns a sink.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::chain::{self, Hash, Head, Link, MAX_LINE_BYTES, Role};
use super::text::Text;
use crate::fault;

/// Digits of a record's number in a file's name.
const NAME_DIGITS: usize = 20;

/// Room that is kept in every file so that a crash can be closed off in it.
const RESERVED_BYTES: u64 = 16 * 1024;

/// How much of the end of a log is searched for a line, in bytes: all of it is in memory meanwhile.
const SEARCHED_BYTES: u64 = 8 << 20;

/// How much the log may take on disk: never more than the product of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size at which a file is rotated, in bytes; at least [`Limits::MIN_FILE_BYTES`].
    pub max_file_bytes: u64,
    /// Files kept, the newest one included; at least [`Limits::MIN_FILES`].
    pub max_files: u32,
}

impl Limits {
    /// Room for a few of the longest lines.
    pub const MIN_FILE_BYTES: u64 = 4 * MAX_LINE_BYTES as u64;
    /// With fewer, rotation would leave nothing of what was just written.
    pub const MIN_FILES: u32 = 2;
}

/// Why a log can not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "audit log {path}: {source}; make its directory writable for agentguard, or set audit.output"
    )]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "audit log {0} is in use by another process; stop that, or set audit.output to another path"
    )]
    Locked(PathBuf),
    #[error("audit log {0} is not a regular file; set audit.output to a path of its own")]
    NotAFile(PathBuf),
    #[error("audit.max_file_bytes is {0}; the least is {min}", min = Limits::MIN_FILE_BYTES)]
    FileTooSmall(u64),
    #[error("audit.max_files is {0}; the least is {min}", min = Limits::MIN_FILES)]
    TooFewFiles(u32),
    #[error("the audit log's writer can not start: {0}")]
    Thread(io::Error),
}

/// Where lines go.
pub(crate) enum Sink {
    /// A stream that can not be read back, as standard output.
    Stream(Box<dyn Write + Send>),
    File(RotatingFile),
}

impl Sink {
    /// Writes a line and its newline. After an error the log holds nothing of the line, or the
    /// sink finds the torn rest when it is next made ready.
    pub(crate) fn write(&mut self, line: &str) -> io::Result<()> {
        match self {
            Self::Stream(stream) => {
                stream.write_all(format!("{line}\n").as_bytes())?;
                stream.flush()
            }
            Self::File(file) => file.write(format!("{line}\n").as_bytes()),
        }
    }

    /// Makes what was written outlast a power failure, where that is ours to do.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        match self {
            Self::Stream(stream) => stream.flush(),
            Self::File(file) => file.sync(),
        }
    }
}

/// Bytes that a crash left after the last whole line.
#[derive(Clone, Debug)]
pub(crate) struct Torn {
    pub(crate) bytes: u64,
    pub(crate) sha256: Hash,
    pub(crate) text: Text,
}

/// A log on disk.
pub(crate) struct RotatingFile {
    path: PathBuf,
    limits: Limits,
    current: Option<Current>,
    /// Files removed that no `rotated` record has told of yet.
    untold_files: u64,
    /// See [`Rotation::first_kept`].
    first_kept: u64,
    /// Whether there may be files of before `first_kept`, which are to go: a crash may have left some.
    has_excess: bool,
}

struct Current {
    file: File,
    length: u64,
    /// Number of the first record in the file; of the next one while it is empty.
    first_seq: u64,
    /// Whether a newline has to be written before the next line, because a crash left none.
    lacks_newline: bool,
}

/// What was found when a log was opened.
pub(crate) struct Opened {
    /// The last whole line; [`Head::EMPTY`] if there is none.
    pub(crate) head: Head,
    /// What has to be closed off before the next line.
    pub(crate) torn: Option<Torn>,
}

/// What a rotation leaves.
pub(crate) struct Rotation {
    /// Files removed, or about to be, that no record has told of yet.
    pub(crate) removed_files: u64,
    /// Number of the oldest record that the log did not remove itself. What somebody else removed
    /// stays above it, and is found to be missing.
    pub(crate) first_kept: u64,
}

impl RotatingFile {
    /// Opens the log at `path`, creating what is missing, and finds its end.
    pub(crate) fn open(path: &Path, limits: Limits) -> Result<(Self, Opened), OpenError> {
        if limits.max_file_bytes < Limits::MIN_FILE_BYTES {
            return Err(OpenError::FileTooSmall(limits.max_file_bytes));
        }
        if limits.max_files < Limits::MIN_FILES {
            return Err(OpenError::TooFewFiles(limits.max_files));
        }
        let mut log = Self {
            path: path.to_owned(),
            limits,
            current: None,
            untold_files: 0,
            first_kept: 1,
            has_excess: true,
        };
        let opened = log.open_current(Head::EMPTY)?;
        log.first_kept =
            first_kept(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        Ok((log, opened))
    }

    /// Opens the file again after a failure, or after somebody moved it away; `None` when it was
    /// open and in its place.
    pub(crate) fn ready(&mut self, head: Head) -> Result<Option<Opened>, OpenError> {
        if let Some(current) = &self.current {
            let same = |open: std::fs::Metadata, named: std::fs::Metadata| {
                (open.dev(), open.ino()) == (named.dev(), named.ino())
            };
            let in_place = current.file.metadata().ok().zip(self.path.symlink_metadata().ok());
            if in_place.is_some_and(|(open, named)| same(open, named)) {
                return Ok(None);
            }
            self.current = None;
        }
        self.open_current(head).map(Some)
    }

    /// `known` is the end of the chain as far as the caller knows it.
    fn open_current(&mut self, known: Head) -> Result<Opened, OpenError> {
        let error = |source| OpenError::Io { path: self.path.clone(), source };
        if let Some(directory) = self.path.parent() {
            std::fs::create_dir_all(directory).map_err(error)?;
        }
        let mut file = open_options().open(&self.path).map_err(error)?;
        if !file.metadata().map_err(error)?.is_file() {
            return Err(OpenError::NotAFile(self.path.clone()));
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::Locked(self.path.clone())),
            Err(TryLockError::Error(source)) => return Err(error(source)),
        }
        let end = End::of(&mut file).map_err(error)?;
        let head = match end.head {
            Some(head) => head,
            None => self.last_rotated().map_err(error)?.unwrap_or(Head::EMPTY),
        };
        let head = if head.seq < known.seq { known } else { head };
        let first_seq = match first_seq(&mut file).map_err(error)? {
            Some(seq) => seq,
            None => head.seq + 1,
        };
        self.current =
            Some(Current { file, length: end.length, first_seq, lacks_newline: end.lacks_newline });
        Ok(Opened { head, torn: end.torn })
    }

    /// The end of the newest rotated file that has a whole line.
    fn last_rotated(&self) -> io::Result<Option<Head>> {
        for (_, path) in rotated(&self.path)?.into_iter().rev() {
            if let Some(head) = End::of(&mut File::open(path)?)?.head {
                return Ok(Some(head));
            }
        }
        Ok(None)
    }

    /// What `read` makes of the last line that it makes something of, in whichever file that is; `None` where
    /// too much came after it.
    pub(crate) fn last<T>(&self, read: impl Fn(&[u8]) -> Option<T>) -> io::Result<Option<T>> {
        for path in files(&self.path)?.into_iter().rev() {
            let mut file = File::open(path)?;
            let length = file.metadata()?.len();
            if let Some((found, _)) = last_line(&mut file, length, SEARCHED_BYTES, &read)?.found {
                return Ok(Some(found));
            }
            if length > SEARCHED_BYTES {
                break;
            }
        }
        Ok(None)
    }

    /// Whether the newest file holds nothing yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.current.as_ref().is_some_and(|current| current.length == 0)
    }

    /// Whether a line of `length` bytes and its newline fits the newest file.
    pub(crate) fn has_room(&self, length: usize) -> bool {
        self.current.as_ref().is_some_and(|current| {
            current.length + length as u64 + 1 + RESERVED_BYTES <= self.limits.max_file_bytes
        })
    }

    /// Puts the newest file aside, and starts an empty file whose first record will be `next_seq`.
    pub(crate) fn rotate(&mut self, next_seq: u64) -> io::Result<()> {
        let Some(current) = self.current.take() else { return Ok(()) };
        current.file.sync_data()?;
        let aside = rotated_path(&self.path, current.first_seq);
        if aside.symlink_metadata().is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is in the way of rotation; move it elsewhere", aside.display()),
            ));
        }
        std::fs::rename(&self.path, &aside)?;
        fault::point("audit.renamed");
        let file = open_options().create_new(true).open(&self.path)?;
        file.try_lock().map_err(io::Error::from)?;
        self.current = Some(Current { file, length: 0, first_seq: next_seq, lacks_newline: false });
        Ok(())
    }

    /// What is left once the oldest files are removed that exceed the bound. To be told before they are: of
    /// what was removed and not told nobody knows afterwards who removed it.
    pub(crate) fn rotation(&self) -> io::Result<Rotation> {
        let mut excess = rotated(&self.path)?;
        let keep = self.limits.max_files.saturating_sub(1) as usize;
        let kept = excess.split_off(excess.len().saturating_sub(keep));
        // Those before were told of when a crash came between.
        let untold = excess.iter().filter(|(first_seq, _)| *first_seq >= self.first_kept).count();
        let first_kept = match kept.first() {
            Some((seq, _)) if untold > 0 => self.first_kept.max(*seq),
            Some(_) | None => self.first_kept,
        };
        Ok(Rotation { removed_files: self.untold_files + untold as u64, first_kept })
    }

    /// Brings what was written to the disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.current.as_ref().map_or(Ok(()), |current| current.file.sync_data())
    }

    /// Notes what is to be removed, and whether a record tells of it.
    pub(crate) fn rotated(&mut self, rotation: &Rotation, is_told: bool) {
        self.first_kept = rotation.first_kept;
        self.untold_files = if is_told { 0 } else { rotation.removed_files };
        self.has_excess = true;
    }

    /// Removes the files that are to go, if there may be any. Where one can not be, it is tried again: the log
    /// takes no more until it is within its bound.
    pub(crate) fn remove_excess(&mut self) -> io::Result<()> {
        if !self.has_excess {
            return Ok(());
        }
        let excess = rotated(&self.path)?.into_iter();
        for (_, path) in excess.filter(|(first_seq, _)| *first_seq < self.first_kept) {
            std::fs::remove_file(&path).map_err(|error| {
                io::Error::new(error.kind(), format!("{} stays: {error}", path.display()))
            })?;
        }
        self.has_excess = false;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let current = self.current.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let newline: &[u8] = if current.lacks_newline { b"\n" } else { b"" };
        match current.file.write_all(&[newline, bytes].concat()) {
            Ok(()) => {
                current.length += (newline.len() + bytes.len()) as u64;
                current.lacks_newline = false;
                Ok(())
            }
            Err(error) => {
                // Take back what was written of it. Where that fails too, the file is opened anew
                // before the next line, and what is torn is found then.
                if current.file.set_len(current.length).is_err() {
                    self.current = None;
                }
                Err(error)
            }
        }
    }
}

/// The files of the log at `path`, oldest first, the newest one included where it exists.
pub(crate) fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = rotated(path)?.into_iter().map(|(_, path)| path).collect();
    if path.try_exists()? {
        files.push(path.to_owned());
    }
    Ok(files)
}

/// The path of the log that a rotated file belongs to; `None` for any other file.
pub(crate) fn log_of(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let (log, digits) = name.rsplit_once('.')?;
    is_number(digits).then(|| path.with_file_name(log))
}

fn is_number(digits: &str) -> bool {
    digits.len() == NAME_DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// The rotated files of the log at `path`, oldest first, with the number of their first record.
fn rotated(path: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let directory = match path.parent() {
        Some(directory) if directory != Path::new("") => directory,
        Some(_) | None => Path::new("."),
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let candidate = directory.join(entry?.file_name());
        if log_of(&candidate).as_deref().and_then(Path::file_name) != path.file_name() {
            continue;
        }
        let number = candidate.extension().and_then(|digits| digits.to_str()?.parse().ok());
        if let Some(first_seq) = number {
            files.push((first_seq, candidate));
        }
    }
    files.sort();
    Ok(files)
}

fn rotated_path(path: &Path, first_seq: u64) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".{first_seq:0NAME_DIGITS$}"));
    name.into()
}

/// Only root reads the log; a symbolic link in its place is not followed.
fn open_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    options.read(true).append(true).create(true).mode(0o600).custom_flags(flags.bits());
    options
}

/// The end of a file.
struct End {
    head: Option<Head>,
    length: u64,
    lacks_newline: bool,
    torn: Option<Torn>,
}

impl End {
    /// Finds the last whole line. Reads backwards, and usually no more than one window.
    fn of(file: &mut File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let Tail { bytes, found } =
            last_line(file, length, u64::MAX, |line| chain::read(line).ok())?;
        let (head, end) = found.map_or((None, 0), |(link, end)| (Some(link.head), end));
        let rest = &bytes[end..];
        let rest = if head.is_some() { rest.strip_prefix(b"\n").unwrap_or(rest) } else { rest };
        let torn = rest.strip_suffix(b"\n").unwrap_or(rest);
        Ok(Self {
            head,
            length,
            lacks_newline: !bytes.is_empty() && !bytes.ends_with(b"\n"),
            torn: (!rest.is_empty()).then(|| Torn {
                bytes: torn.len() as u64,
                sha256: Hash::of(torn),
                text: Text::new(torn),
            }),
        })
    }
}

/// The last bytes of a file.
struct Tail<T> {
    /// All that was read where nothing was found.
    bytes: Vec<u8>,
    /// What was made of the last line of which anything could be made, and where that line ends in `bytes`.
    found: Option<(T, usize)>,
}

/// The end of a file of `length` bytes from the last line on that `read` makes something of. Reads
/// backwards, usually no more than one window, and `most` bytes at the most.
fn last_line<T>(
    file: &mut File,
    length: u64,
    most: u64,
    read: impl Fn(&[u8]) -> Option<T>,
) -> io::Result<Tail<T>> {
    let mut window = 2 * MAX_LINE_BYTES as u64;
    loop {
        window = window.min(most);
        let start = length.saturating_sub(window);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(length - start).read_to_end(&mut bytes)?;
        let found = last_line_of(&bytes, &read);
        if found.is_some() || start == 0 || window == most {
            return Ok(Tail { bytes, found });
        }
        window *= 8;
    }
}

/// The last line of `bytes` that `read` makes something of, and where it ends.
fn last_line_of<T>(bytes: &[u8], read: impl Fn(&[u8]) -> Option<T>) -> Option<(T, usize)> {
    let mut end = bytes.len();
    loop {
        let start = bytes[..end].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if let Some(found) = read(&bytes[start..end]) {
            return Some((found, end));
        }
        end = start.checked_sub(1)?;
    }
}

/// The number of the first record of a file; `None` if it has none.
fn first_seq(file: &mut File) -> io::Result<Option<u64>> {
    Ok(first_link(file)?.map(|link| link.head.seq))
}

/// The first whole line of a file.
fn first_link(file: &mut File) -> io::Result<Option<Link>> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(2 * MAX_LINE_BYTES as u64).read_to_end(&mut bytes)?;
    Ok(bytes.split(|byte| *byte == b'\n').find_map(|line| chain::read(line).ok()))
}

/// What the newest file that begins with a `rotated` record says is the oldest record kept.
fn first_kept(path: &Path) -> io::Result<u64> {
    for path in files(path)?.into_iter().rev() {
        if let Some(Link { role: Role::Rotated { first_kept }, .. }) =
            first_link(&mut File::open(path)?)?
        {
            return Ok(first_kept);
        }
    }
    Ok(1)
}
