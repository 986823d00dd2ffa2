//! Manifests from files and directories.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use super::{
    Creation, Manifest, ManifestError, ManifestWarning, assemble, parse_text, tree::MAX_FILE_BYTES,
    warnings,
};

/// The endings of the files that a directory contributes.
const SUFFIXES: [&str; 3] = ["yaml", "yml", "json"];

/// What `agentguard check` says about some paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// File by file in the order given, errors between documents last.
    pub errors: Vec<ManifestError>,
    pub warnings: Vec<ManifestWarning>,
    pub counts: Counts,
}

/// How many valid documents there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub files: usize,
    pub scopes: usize,
    pub grants: usize,
    /// How many of `grants` never expire.
    pub standing_grants: usize,
    pub workloads: usize,
}

/// Reads files, and of directories the `*.yaml`, `*.yml` and `*.json` files right inside, sorted.
///
/// Hidden files are passed over, as editors and Kubernetes volumes leave them. What cannot be read
/// is an error.
#[must_use]
pub fn parse_paths(paths: &[PathBuf]) -> (Vec<Manifest>, Vec<ManifestError>) {
    let (files, mut errors) = files_of(paths);
    let mut manifests = Vec::new();
    for file in files {
        let (more, faults) = parse_file(&file);
        manifests.extend(more);
        errors.extend(faults);
    }
    (manifests, errors)
}

/// Checks everything that `paths` hold, each document by itself and all against each other.
#[must_use]
pub fn check(paths: &[PathBuf], now: Timestamp) -> CheckReport {
    let (files, mut errors) = files_of(paths);
    let mut counts = Counts { files: files.len(), ..Counts::default() };
    let mut manifests = Vec::new();
    let mut empty = Vec::new();
    for file in files {
        let (more, faults) = parse_file(&file);
        if more.is_empty() && faults.is_empty() {
            empty.push(ManifestWarning(ManifestError::of_file(
                &file.display().to_string(),
                "holds no manifest",
                "write one, or remove the file",
            )));
        }
        manifests.extend(more);
        errors.extend(faults);
    }
    let mut warnings = warnings(&manifests, now);
    warnings.append(&mut empty);
    let (set, conflicts) = assemble(manifests);
    errors.extend(conflicts);
    counts.scopes = set.scopes.len();
    counts.grants = set.grants.len();
    counts.standing_grants =
        set.grants.iter().filter(|grant| grant.expiry == crate::grant::Expiry::Never).count();
    counts.workloads = set.workloads.len();
    CheckReport { errors, warnings, counts }
}

fn parse_file(path: &Path) -> (Vec<Manifest>, Vec<ManifestError>) {
    match read(path) {
        Ok(bytes) => parse_text(&path.display().to_string(), &bytes, Creation::Unknown),
        Err(error) => (Vec::new(), vec![error]),
    }
}

/// The bytes of a file, to be given to [`parse_text`].
///
/// # Errors
///
/// When it can not be read, or is no file.
#[expect(clippy::result_large_err, reason = "made once for a file, and shown at once")]
pub fn read(path: &Path) -> Result<Vec<u8>, ManifestError> {
    read_bounded(path).map_err(|error| unreadable(path, &error))
}

/// Reads one byte more than allowed at most, so that the parser can tell that it is too much.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Asked before opening, because opening a pipe waits for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The manifests of a directory: its files with a manifest's ending, sorted.
///
/// # Errors
///
/// When the directory can not be read.
#[expect(clippy::result_large_err, reason = "made once for a directory, and shown at once")]
pub fn files(directory: &Path) -> Result<Vec<PathBuf>, ManifestError> {
    manifests_in(directory).map_err(|error| unreadable(directory, &error))
}

fn files_of(paths: &[PathBuf]) -> (Vec<PathBuf>, Vec<ManifestError>) {
    let mut files = Vec::new();
    let mut errors = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        match manifests_in(path) {
            Ok(inside) => files.extend(inside),
            Err(error) => errors.push(unreadable(path, &error)),
        }
    }
    (files, errors)
}

fn manifests_in(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let suffix = path.extension().and_then(|suffix| suffix.to_str());
        let is_manifest = suffix.is_some_and(|suffix| SUFFIXES.contains(&suffix));
        if is_manifest && !hidden && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn unreadable(path: &Path, error: &io::Error) -> ManifestError {
    ManifestError::of_file(
        &path.display().to_string(),
        format!("cannot be read: {error}"),
        "check that it exists and that this user may read it",
    )
}
