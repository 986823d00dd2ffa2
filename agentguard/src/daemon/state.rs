//! What a restart must know, in one file.
//!
//! The kernel keeps enforcing without it; it is what the next daemon needs to go on telling and
//! changing what the kernel holds. Written as a whole, renamed into place, for root alone.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use agentguard_common::{CgroupId, FileId, Mode, WorkloadId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::container_files::ContainerRef;
use super::engine::{Workload, WorkloadSource};
use super::losses::Losses;
use super::names::SavedNames;
use crate::fault;
use crate::grant::{RestoreError, Snapshot};
use crate::identity::container::{PodName, ProcessRef};

/// The name of the file in the state directory.
const FILE: &str = "state.json";

/// What a restart must know.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    /// Above all numbers of allow-lists, rows of rules and workloads that were given out.
    #[serde(default)]
    pub next: (u32, u32, u32),
    /// The next number of a unix socket's name.
    #[serde(default)]
    pub next_unix_name: u32,
    pub names: SavedNames,
    pub grants: Snapshot,
    /// Rows of counters by identity.
    pub counter_rows: BTreeMap<String, u16>,
    pub workloads: Vec<SavedWorkload>,
    /// Which lost records the audit log has told of.
    #[serde(default)]
    pub losses: Losses,
}

/// A workload, as the file holds it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedWorkload {
    id: u32,
    name: String,
    identity: Option<String>,
    cgroup: PathBuf,
    cgroup_id: u64,
    mode: u8,
    source: WorkloadSource,
    created: Timestamp,
    owner: Option<u32>,
    unit: Option<String>,
    /// Inode, device and generation.
    launch: Vec<SavedFile>,
    #[serde(default)]
    pod: Option<SavedPod>,
    #[serde(default)]
    containers: Vec<SavedContainer>,
    #[serde(default)]
    owns_identity: bool,
}

type SavedFile = (u64, u32, u32);

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedPod {
    namespace: String,
    name: String,
    uid: String,
}

/// A container: while its process is there, its files can be looked up before its runtime answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedContainer {
    id: String,
    name: String,
    pid: u32,
    started: u64,
    root: PathBuf,
    launch: Vec<SavedFile>,
    #[serde(default)]
    cgroup: u64,
}

fn saved(files: &[FileId]) -> Vec<SavedFile> {
    files.iter().map(|file| (file.inode, file.device, file.generation)).collect()
}

fn files(saved: Vec<SavedFile>) -> Vec<FileId> {
    let file = |(inode, device, generation)| FileId { inode, device, generation };
    saved.into_iter().map(file).collect()
}

impl From<ContainerRef> for SavedContainer {
    fn from(container: ContainerRef) -> Self {
        let ContainerRef { id, name, process, root, launch, cgroup } = container;
        let ProcessRef { pid, started } = process;
        Self { id, name, pid, started, root, launch: saved(&launch), cgroup: cgroup.0 }
    }
}

impl From<SavedContainer> for ContainerRef {
    fn from(container: SavedContainer) -> Self {
        let SavedContainer { id, name, pid, started, root, launch, cgroup } = container;
        let process = ProcessRef { pid, started };
        Self { id, name, process, root, launch: files(launch), cgroup: CgroupId(cgroup) }
    }
}

impl From<PodName> for SavedPod {
    fn from(pod: PodName) -> Self {
        let PodName { namespace, name, uid } = pod;
        Self { namespace, name, uid }
    }
}

impl From<SavedPod> for PodName {
    fn from(pod: SavedPod) -> Self {
        let SavedPod { namespace, name, uid } = pod;
        Self { namespace, name, uid }
    }
}

impl From<&Workload> for SavedWorkload {
    fn from(workload: &Workload) -> Self {
        let Workload {
            id,
            name,
            identity,
            cgroup,
            cgroup_id,
            mode,
            source,
            created,
            owner,
            unit,
            launch,
            populated: _,
            pod,
            containers,
            owns_identity,
            gives_way: _,
        } = workload.clone();
        Self {
            id: id.0,
            name,
            identity: identity.as_ref().map(ToString::to_string),
            cgroup,
            cgroup_id: cgroup_id.0,
            mode: mode as u8,
            source,
            created,
            owner,
            unit,
            launch: saved(&launch),
            pod: pod.map(SavedPod::from),
            containers: containers.into_iter().map(SavedContainer::from).collect(),
            owns_identity,
        }
    }
}

impl SavedState {
    /// The cgroups that `exec` made.
    #[must_use]
    pub fn exec_cgroups(&self) -> Vec<PathBuf> {
        let made = self.workloads.iter().filter(|workload| match workload.source {
            WorkloadSource::Exec => true,
            WorkloadSource::Manifest | WorkloadSource::Container => false,
        });
        made.map(|workload| workload.cgroup.clone()).collect()
    }
}

impl SavedWorkload {
    /// The workload again.
    ///
    /// # Errors
    ///
    /// Says which part of it is not valid.
    pub fn restore(self) -> Result<Workload, String> {
        let Self {
            id,
            name,
            identity,
            cgroup,
            cgroup_id,
            mode,
            source,
            created,
            owner,
            unit,
            launch,
            pod,
            containers,
            owns_identity,
        } = self;
        let parsed = identity.as_deref().map(str::parse).transpose();
        Ok(Workload {
            id: WorkloadId(id),
            identity: parsed
                .map_err(|error| format!("workload {name}: identity {identity:?} {error}"))?,
            mode: Mode::try_from(mode)
                .map_err(|unknown| format!("workload {name}: mode {} is unknown", unknown.0))?,
            name,
            cgroup,
            cgroup_id: CgroupId(cgroup_id),
            source,
            created,
            owner,
            unit,
            launch: files(launch),
            populated: true,
            pod: pod.map(PodName::from),
            containers: containers.into_iter().map(ContainerRef::from).collect(),
            owns_identity,
            gives_way: false,
        })
    }
}

/// The file can not be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("the state file {path} can not be read: {source}; check the state_directory")]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "the state file {path} is not valid: {source}; move it away to start without it: grants given through the API and workloads started by exec are then unknown"
    )]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error(
        "the state file {path} is not valid: {source}; what was revoked must stay so: start the agentguard that wrote it, or move the file away to start without it: grants given through the API and revocations are then unknown"
    )]
    Grants { path: PathBuf, source: RestoreError },
    #[error(
        "the state file {path} can not be written: {source}; free the disk or set state_directory"
    )]
    Write { path: PathBuf, source: io::Error },
}

/// Reads what an earlier daemon left; nothing if none was here.
///
/// # Errors
///
/// When there is a file and it can not be used: a daemon that went on without it would forget
/// revocations.
pub fn load(directory: &Path) -> Result<SavedState, StateError> {
    let path = file(directory);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => {
            return Ok(SavedState::default());
        }
        Err(source) => return Err(StateError::Read { path, source }),
    };
    serde_json::from_slice(&text).map_err(|source| StateError::Parse { path, source })
}

/// Where it is.
pub(super) fn file(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

/// Writes the file anew.
///
/// # Errors
///
/// When it can not be written; the old one stays.
pub fn save(directory: &Path, state: &SavedState) -> Result<(), StateError> {
    let path = file(directory);
    fault::point("save.begun");
    let written = serde_json::to_vec(state)
        .map_err(io::Error::from)
        .and_then(|text| replace(&path, &text, || fault::point("save.written")));
    fault::point("save.renamed");
    written.map_err(|source| StateError::Write { path, source })
}

/// Writes a file for root alone, whole or not at all.
pub(super) fn replace(path: &Path, text: &[u8], is_written: impl FnOnce()) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file =
        File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    let written = file.write_all(text).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // Half a file is of no use, and takes room where there is none.
        let _there_is_none = fs::remove_file(&new);
        return Err(error);
    }
    is_written();
    fs::rename(&new, path)?;
    // What was renamed is the file's only after its directory is written.
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Removes the file.
///
/// # Errors
///
/// When it is there and stays.
pub fn remove(directory: &Path) -> io::Result<bool> {
    remove_file(&directory.join(FILE))
}

/// Removes a file that may be there; whether it was.
pub(super) fn remove_file(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
