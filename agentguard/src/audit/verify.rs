//! Checks a log against its own chain, and names every fault by file and line.
//!
//! Finds records that are missing, changed, in another order or there twice, lines that are torn,
//! and a beginning that the log itself does not account for. What was cut off the end shows only
//! against a [`Head`] that was noted elsewhere. Reads line by line; must not know how records are
//! written.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::chain::{self, BrokenLine, Hash, Head, Link, MAX_LINE_BYTES, Role};
use super::sink;

/// Faults that are named one by one; more are only counted.
pub const MAX_FAULTS: usize = 1000;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// The files read, oldest first.
    pub files: Vec<PathBuf>,
    /// Records that are whole.
    pub records: u64,
    /// The first record; `None` if there is none.
    pub first_seq: Option<u64>,
    /// The last record; `None` if there is none.
    pub head: Option<Head>,
    /// Where the records begin.
    pub start: Start,
    /// Crashes that were closed off by a `recovered` record.
    pub recovered: u64,
    /// What is wrong, up to [`MAX_FAULTS`].
    pub faults: Vec<Fault>,
    /// Faults beyond these.
    pub more_faults: u64,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.faults.is_empty()
    }
}

/// Where the records of a log begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// There are none.
    Empty,
    /// With the first of the chain.
    Beginning,
    /// Older ones were rotated away, and the log says so.
    RotatedAway,
    /// Older ones stand in files that were not given.
    NotGiven,
    /// Older ones are missing, and the log does not say that it removed them.
    Unexplained,
}

/// Something wrong at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub file: PathBuf,
    /// From 1; 0 stands for the file as a whole.
    pub line: u64,
    pub kind: FaultKind,
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}", self.file.display(), self.line, self.kind)
    }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultKind {
    #[error("the line does not read as a record")]
    Malformed,
    #[error("record {seq} was changed: its content does not match its hash")]
    Changed { seq: u64 },
    #[error("records {from} to {to} are missing before this line")]
    Missing { from: u64, to: u64 },
    #[error("record {seq} stands after record {after}")]
    Reordered { seq: u64, after: u64 },
    #[error("record {seq} is there twice")]
    Duplicated { seq: u64 },
    #[error("record {seq} does not continue the record before it: one of them was replaced")]
    Unlinked { seq: u64 },
    #[error("a new chain begins here; verify each chain by itself")]
    Restarted,
    #[error("the file ends in the middle of a line: a crash, or a write in progress")]
    Torn,
    #[error("records {from} to {to} are missing, and the log does not say that it removed them")]
    MissingStart { from: u64, to: u64 },
    #[error("the log ends before record {seq}, which it is known to have held")]
    MissingEnd { seq: u64 },
    #[error("record {seq} is not the one that the log is known to have held: it was rewritten")]
    Rewritten { seq: u64 },
}

/// Why a log can not be checked.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("{path}: {source}; give an audit log, a file of one, or a directory with one log")]
    Io { path: PathBuf, source: io::Error },
    #[error("{0} holds no audit log; give the file, or the directory that it is in")]
    NoLog(PathBuf),
    #[error("{directory} holds more than one log ({logs}); give one of them")]
    ManyLogs { directory: PathBuf, logs: String },
}

/// Checks the log at `path` with all its rotated files; one rotated file by itself; or the one log
/// in a directory. If `expected` is given, that line must be part of the log.
///
/// # Errors
/// When the files can not be read or do not name one log.
pub fn verify(path: &Path, expected: Option<Head>) -> Result<VerifyReport, VerifyError> {
    let error = |source| VerifyError::Io { path: path.to_owned(), source };
    let metadata = match path.metadata() {
        Ok(metadata) => Some(metadata),
        // The newest file may just have been moved away.
        Err(source) if source.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(error(source)),
    };
    if metadata.is_some_and(|metadata| metadata.is_dir()) {
        let log = only_log(path)?;
        return verify_files(&sink::files(&log).map_err(error)?, Extent::Whole, expected);
    }
    if sink::log_of(path).is_some() {
        return verify_files(&[path.to_owned()], Extent::Part, expected);
    }
    let files = sink::files(path).map_err(error)?;
    if files.is_empty() {
        return Err(VerifyError::NoLog(path.to_owned()));
    }
    verify_files(&files, Extent::Whole, expected)
}

/// Whether files are all that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All files of the log.
    Whole,
    /// Some of them, without a gap.
    Part,
}

/// Checks `files`, given in order.
///
/// # Errors
/// When a file can not be read.
pub fn verify_files(
    files: &[PathBuf],
    extent: Extent,
    expected: Option<Head>,
) -> Result<VerifyReport, VerifyError> {
    // All are opened first, so that a rotation meanwhile takes none away.
    let mut open = Vec::new();
    for path in files {
        let error = |source| VerifyError::Io { path: path.clone(), source };
        open.push((path, BufReader::new(File::open(path).map_err(error)?)));
    }
    let mut verifier = Verifier::new(expected);
    for (path, mut reader) in open {
        let error = |source| VerifyError::Io { path: path.clone(), source };
        verifier.read_file(path, &mut reader).map_err(error)?;
    }
    Ok(verifier.finish(files, extent))
}

/// The log in a directory.
fn only_log(directory: &Path) -> Result<PathBuf, VerifyError> {
    let error = |source| VerifyError::Io { path: directory.to_owned(), source };
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(error)? {
        let path = directory.join(entry.map_err(error)?.file_name());
        let log = match sink::log_of(&path) {
            Some(log) => log,
            None if begins_like_a_log(&path) => path,
            None => continue,
        };
        if !logs.contains(&log) {
            logs.push(log);
        }
    }
    logs.sort();
    match logs.as_slice() {
        [] => Err(VerifyError::NoLog(directory.to_owned())),
        [log] => Ok(log.clone()),
        [_, _, ..] => {
            let logs: Vec<String> = logs.iter().map(|log| log.display().to_string()).collect();
            Err(VerifyError::ManyLogs { directory: directory.to_owned(), logs: logs.join(", ") })
        }
    }
}

/// Whether a file looks like a log of ours, even if a line of it was changed.
fn begins_like_a_log(path: &Path) -> bool {
    let mut start = [0; 7];
    path.is_file()
        && File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok()
        && start == *b"{\"seq\":"
}

/// Reads lines in order and remembers no more than the end of the chain.
struct Verifier {
    expected: Option<Head>,
    expected_seen: Option<Hash>,
    first: Option<(PathBuf, Link)>,
    /// The record with the highest number so far.
    head: Option<Head>,
    /// Lines since the last record that are none; forgiven by a `recovered` record.
    unread: Vec<Fault>,
    unread_bytes: Vec<u8>,
    /// Records known to be missing so far, which may still turn up, by the fault that says so.
    missing: HashMap<u64, usize>,
    first_kept: u64,
    records: u64,
    recovered: u64,
    faults: Vec<Fault>,
    more_faults: u64,
}

impl Verifier {
    fn new(expected: Option<Head>) -> Self {
        Self {
            expected,
            expected_seen: None,
            first: None,
            head: None,
            unread: Vec::new(),
            unread_bytes: Vec::new(),
            missing: HashMap::new(),
            first_kept: 1,
            records: 0,
            recovered: 0,
            faults: Vec::new(),
            more_faults: 0,
        }
    }

    fn read_file(&mut self, path: &Path, reader: &mut impl BufRead) -> io::Result<()> {
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            reader.take(4 * MAX_LINE_BYTES as u64).read_until(b'\n', &mut line)?;
            if line.is_empty() {
                break;
            }
            let fault = |kind| Fault { file: path.to_owned(), line: number, kind };
            let whole = line.ends_with(b"\n");
            if whole {
                line.pop();
            }
            match chain::read(&line) {
                Ok(link) => {
                    self.read_link(path, number, link);
                    if !whole {
                        self.report(fault(FaultKind::Torn));
                    }
                }
                Err(broken) => self.read_broken(
                    &line,
                    fault(match broken {
                        BrokenLine::Malformed if whole => FaultKind::Malformed,
                        BrokenLine::Malformed => FaultKind::Torn,
                        BrokenLine::Changed { seq } => FaultKind::Changed { seq },
                    }),
                ),
            }
        }
        Ok(())
    }

    fn read_broken(&mut self, line: &[u8], fault: Fault) {
        if self.unread.len() >= MAX_FAULTS {
            self.report_unread();
        }
        if !self.unread.is_empty() {
            self.unread_bytes.push(b'\n');
        }
        self.unread_bytes.extend_from_slice(line);
        self.unread.push(fault);
    }

    fn read_link(&mut self, path: &Path, line: u64, link: Link) {
        let fault = |kind| Fault { file: path.to_owned(), line, kind };
        let Head { seq, hash } = link.head;
        let broken = self.unread.len() as u64;
        match link.role {
            Role::Ordinary => {}
            Role::Rotated { first_kept } => self.first_kept = self.first_kept.max(first_kept),
            Role::Recovered { torn_bytes, torn_sha256 } => {
                if torn_bytes == self.unread_bytes.len() as u64
                    && torn_sha256 == Hash::of(&self.unread_bytes)
                {
                    self.recovered += 1;
                    self.unread.clear();
                }
            }
        }
        self.report_unread();
        self.records += 1;
        if self.expected.is_some_and(|expected| expected.seq == seq) {
            self.expected_seen = Some(hash);
        }
        let first = self.first.get_or_insert_with(|| (path.to_owned(), link.clone())).1.head;
        let Some(head) = self.head else {
            if seq == 1 && link.prev != Hash::ZERO {
                self.report(fault(FaultKind::Unlinked { seq }));
            }
            self.head = Some(link.head);
            return;
        };
        if seq == head.seq + 1 {
            if link.prev != head.hash {
                self.report(fault(FaultKind::Unlinked { seq }));
            }
            self.head = Some(link.head);
        } else if seq > head.seq {
            let (from, to) = (head.seq + 1, seq - 1);
            // Lines that could not be read were named already; they account for as many records.
            if to - from + 1 != broken {
                for absent in from..=to.min(from + MAX_FAULTS as u64) {
                    self.missing.insert(absent, self.faults.len());
                }
                self.report(fault(FaultKind::Missing { from, to }));
            }
            self.head = Some(link.head);
        } else if seq == 1 && first != link.head && link.prev == Hash::ZERO {
            self.report(fault(FaultKind::Restarted));
            self.head = Some(link.head);
        } else if let Some(told) = self.missing.remove(&seq) {
            // What was reported as missing alone has turned up.
            if let Some(known) = self.faults.get_mut(told)
                && known.kind == (FaultKind::Missing { from: seq, to: seq })
            {
                *known = fault(FaultKind::Reordered { seq, after: head.seq });
            } else {
                self.report(fault(FaultKind::Reordered { seq, after: head.seq }));
            }
        } else {
            self.report(fault(FaultKind::Duplicated { seq }));
        }
    }

    fn report_unread(&mut self) {
        self.unread_bytes.clear();
        for fault in std::mem::take(&mut self.unread) {
            self.report(fault);
        }
    }

    fn report(&mut self, fault: Fault) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        } else {
            self.more_faults += 1;
        }
    }

    fn finish(mut self, files: &[PathBuf], extent: Extent) -> VerifyReport {
        self.report_unread();
        let start = self.start(extent);
        if let Some((file, link)) = self.first.clone()
            && start == Start::Unexplained
        {
            let begins_file = matches!(link.role, Role::Rotated { .. });
            let from = if begins_file { self.first_kept } else { 1 };
            let to = link.head.seq - 1;
            let kind = FaultKind::MissingStart { from: from.min(to), to };
            self.report(Fault { file, line: 1, kind });
        }
        if let Some(expected) = self.expected {
            let kind = match self.expected_seen {
                Some(hash) if hash == expected.hash => None,
                Some(_) => Some(FaultKind::Rewritten { seq: expected.seq }),
                None => Some(FaultKind::MissingEnd { seq: expected.seq }),
            };
            let known_gone = self.first.as_ref().is_some_and(|(_, link)| {
                link.head.seq > expected.seq && start != Start::Unexplained
            });
            if let Some(kind) = kind
                && expected != Head::EMPTY
                && !known_gone
            {
                let file = files.last().cloned().unwrap_or_default();
                self.report(Fault { file, line: 0, kind });
            }
        }
        VerifyReport {
            files: files.to_vec(),
            records: self.records,
            first_seq: self.first.map(|(_, link)| link.head.seq),
            head: self.head,
            start,
            recovered: self.recovered,
            faults: self.faults,
            more_faults: self.more_faults,
        }
    }

    fn start(&self, extent: Extent) -> Start {
        let Some((_, first)) = &self.first else { return Start::Empty };
        let begins_file = match first.role {
            Role::Rotated { .. } | Role::Recovered { .. } => true,
            Role::Ordinary => false,
        };
        match extent {
            Extent::Whole | Extent::Part if first.head.seq == 1 => Start::Beginning,
            Extent::Whole | Extent::Part if !begins_file => Start::Unexplained,
            Extent::Whole | Extent::Part if first.head.seq <= self.first_kept => Start::RotatedAway,
            Extent::Whole => Start::Unexplained,
            Extent::Part => Start::NotGiven,
        }
    }
}
