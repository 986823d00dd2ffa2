//! What each manifest, of a file or of the cluster, said when it was last without an error, kept across restarts.
//!
//! One file beside the state. The texts are kept and not what they mean, so that they are read by
//! the rules of the daemon that takes them up, and errors name lines of what was really written.
//! Knows nothing of what the documents say.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::state::{remove_file, replace};
use crate::fault;
use crate::manifest::{Creation, Manifest, parse_text};

/// The name of the file in the state directory.
const FILE: &str = "manifests.json";
/// The version of the shape below.
const VERSION: u32 = 1;

/// What a file said when it was without an error.
#[derive(Clone, Debug)]
pub struct Said {
    text: Arc<[u8]>,
    pub manifests: Vec<Manifest>,
    /// Since when it says so.
    pub since: Timestamp,
    /// When it was created, where that is known.
    created: Option<Timestamp>,
}

/// What each file said.
pub type Files = BTreeMap<PathBuf, Said>;

impl Said {
    /// What `text`, read at `since`, means; `manifests` is what it was read as.
    #[must_use]
    pub fn new(text: &[u8], manifests: Vec<Manifest>, since: Timestamp) -> Self {
        Self { text: text.into(), manifests, since, created: None }
    }

    /// The same, of what was created at `created`.
    #[must_use]
    pub fn created(self, created: Timestamp) -> Self {
        Self { created: Some(created), ..self }
    }

    /// Whether `text`, created at `created`, says this.
    #[must_use]
    pub fn is_of(&self, text: &[u8], created: Option<Timestamp>) -> bool {
        *self.text == *text && self.created == created
    }
}

/// The same text means the same, counted from the same time.
impl PartialEq for Said {
    fn eq(&self, other: &Self) -> bool {
        self.is_of(&other.text, other.created)
    }
}

/// The file can not be used.
#[derive(Debug, thiserror::Error)]
pub enum LastGoodError {
    #[error(
        "{path}, which says what manifests last said without an error, can not be read: {source}; files with an error now say nothing until they are mended"
    )]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "what manifests say now can not be kept for a restart in {path}: {source}; free the disk or set state_directory"
    )]
    Write { path: PathBuf, source: io::Error },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    files: Vec<SavedFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedFile {
    path: PathBuf,
    since: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created: Option<Timestamp>,
    text: String,
}

/// Reads what an earlier daemon left; nothing if it left nothing.
///
/// # Errors
///
/// When there is a file and it can not be used.
pub fn load(directory: &Path) -> Result<Option<Files>, LastGoodError> {
    let path = directory.join(FILE);
    let read = || -> io::Result<Option<Saved>> {
        match fs::read(&path) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    };
    let error = |source| LastGoodError::Read { path: path.clone(), source };
    let Some(Saved { version, files }) = read().map_err(error)? else { return Ok(None) };
    if version != VERSION {
        let other = format!("it has version {version}, and this agentguard reads {VERSION}");
        return Err(error(io::Error::other(other)));
    }
    let mut good = Files::new();
    for SavedFile { path, since, created, text } in files {
        let name = path.display().to_string();
        let creation = created.map_or(Creation::Unknown, Creation::At);
        let (manifests, errors) = parse_text(&name, text.as_bytes(), creation);
        // An earlier version may have accepted more.
        for error in &errors {
            tracing::error!(%error, "what a manifest last said is not valid any more");
        }
        if errors.is_empty() {
            let said = Said { created, ..Said::new(text.as_bytes(), manifests, since) };
            good.insert(path, said);
        }
    }
    Ok(Some(good))
}

/// Writes the file anew.
///
/// # Errors
///
/// When it can not be written; the old one stays.
pub fn save(directory: &Path, files: &Files) -> Result<(), LastGoodError> {
    let path = directory.join(FILE);
    let files = files.iter().map(|(path, said)| SavedFile {
        path: path.clone(),
        since: said.since,
        created: said.created,
        // Manifests are UTF-8, or they have an error.
        text: String::from_utf8_lossy(&said.text).into_owned(),
    });
    let saved = Saved { version: VERSION, files: files.collect() };
    fault::point("manifests.begun");
    let written = serde_json::to_vec(&saved)
        .map_err(io::Error::from)
        .and_then(|text| replace(&path, &text, || fault::point("manifests.written")));
    fault::point("manifests.renamed");
    written.map_err(|source| LastGoodError::Write { path, source })
}

/// Removes the file.
///
/// # Errors
///
/// When it is there and stays.
pub fn remove(directory: &Path) -> io::Result<bool> {
    remove_file(&directory.join(FILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCOPE: &str = "apiVersion: agentguard.dev/v1alpha1\nkind: Scope\nmetadata: {name: a}\n\
        spec: {scope: a, description: a test, listen: [{protocol: TCP, port: 1}]}\n";

    fn said(text: &str) -> Said {
        let (manifests, errors) = parse_text("a.yaml", text.as_bytes(), Creation::Unknown);
        assert_eq!(errors, []);
        Said::new(text.as_bytes(), manifests, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn what_was_said_is_said_again() {
        let directory = tempfile::tempdir().unwrap();
        assert!(load(directory.path()).unwrap().is_none());
        let created = Timestamp::UNIX_EPOCH;
        let files = Files::from([
            (PathBuf::from("/m/a.yaml"), said(SCOPE)),
            (PathBuf::from("scope/a"), said(SCOPE).created(created)),
        ]);
        assert_ne!(files[Path::new("/m/a.yaml")], files[Path::new("scope/a")]);
        save(directory.path(), &files).unwrap();
        let again = load(directory.path()).unwrap().unwrap();
        assert_eq!(again, files);
        let one = &again[Path::new("/m/a.yaml")];
        assert_eq!((one.manifests.len(), one.since), (1, Timestamp::UNIX_EPOCH));
        assert!(remove(directory.path()).unwrap());
        assert!(!remove(directory.path()).unwrap());
    }

    #[test]
    fn what_is_damaged_or_of_another_version_is_an_error_and_what_became_invalid_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let write = |text: &str| fs::write(directory.path().join(FILE), text).unwrap();
        for damaged in ["", "{", r#"{"version":2,"files":[]}"#, r#"{"version":1}"#] {
            write(damaged);
            let refused = load(directory.path());
            assert!(matches!(refused, Err(LastGoodError::Read { .. })), "{damaged}: {refused:?}");
        }
        let file = |path: &str, text: &str| serde_json::json!({"path": path, "since": "2026-01-01T00:00:00Z", "text": text});
        let files = [file("/m/a.yaml", SCOPE), file("/m/b.yaml", "kind: [")];
        write(&serde_json::json!({"version": 1, "files": files}).to_string());
        let good = load(directory.path()).unwrap().unwrap();
        assert_eq!(good.keys().collect::<Vec<_>>(), [Path::new("/m/a.yaml")]);
    }
}
