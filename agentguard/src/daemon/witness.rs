//! Reads the kernel's records, joins the words to their numbers, and has them written down.
//!
//! Runs on a thread of its own, so that nothing the daemon does holds it up. It changes nothing
//! that is enforced.

use std::cell::LazyCell;
use std::collections::VecDeque;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agentguard_common::event::{Event, Hook, Process as KnownProcess, RequestKind};
use agentguard_common::{Mode, Verdict};
use jiff::Timestamp;

use super::engine::{LAUNCH, launch_grant};
use super::names::{Names, container_record, pod_record};
use crate::audit::record::{
    Ancestor, BoundName, Outcome, Process, ProcessStart, RecordBody, Request, VerdictRecord, Word,
    Workload,
};
use crate::audit::{AuditLog, NotWritten, text::Text};
use crate::datapath::Processes;
use crate::datapath::events::{KernelRecord, Rings, UnknownRecord};
use crate::fault;
use crate::grant::clock::Clock;

/// Records taken before other work gets its turn.
const BATCH: usize = 1024;
/// How long a ring is waited for.
const NAP: Duration = Duration::from_millis(50);
/// Denials that are kept for `explain --last`.
const KEPT_DENIALS: usize = 1024;

/// A denial, as `explain --last` needs it.
#[derive(Clone, Debug)]
pub struct Denial {
    pub time: Timestamp,
    pub event: Event,
    /// The path of an exec, as the caller named it.
    pub path: Option<PathBuf>,
    /// The name of a unix socket, as its server bound it.
    pub socket: BoundName,
    pub executable: Option<PathBuf>,
    /// What the workload was then; it may be gone now.
    pub workload: String,
    pub identity: Option<String>,
}

/// The latest denials, shared with the engine.
#[derive(Debug, Default)]
pub struct Denials {
    latest: Mutex<VecDeque<Denial>>,
    undecodable: AtomicU64,
}

impl Denials {
    /// The latest denial that `wanted` accepts.
    #[must_use]
    pub fn last(&self, wanted: impl Fn(&Denial) -> bool) -> Option<Denial> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.iter().rev().find(|denial| wanted(denial)).cloned()
    }

    /// The latest denials, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Denial> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.iter().cloned().collect()
    }

    /// Records that were none of this version's.
    #[must_use]
    pub fn undecodable(&self) -> u64 {
        self.undecodable.load(Ordering::Relaxed)
    }

    /// Takes back the latest one, which will be told again.
    fn take_back(&self) {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).pop_back();
    }

    fn keep(&self, denial: Denial) {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.len() == KEPT_DENIALS {
            latest.pop_front();
        }
        latest.push_back(denial);
    }
}

/// The reader of the kernel's records.
pub struct Witness {
    pub names: Arc<Names>,
    pub processes: Processes,
    pub audit: AuditLog,
    pub denials: Arc<Denials>,
    pub clock: Clock,
    /// Set when records may be missing.
    pub may_have_lost: Arc<AtomicBool>,
    /// Whether the kernel half can end a task that is not the caller.
    pub ends_others: bool,
    /// Whether procfs shows processes by the numbers that the kernel half tells.
    pub reads_procfs: bool,
}

impl Witness {
    /// Reads until told to stop, then what is left. What can not be written down stays in its ring.
    pub fn run(&mut self, mut rings: Rings, stop: &AtomicBool) {
        self.pass_over_written(&mut rings);
        loop {
            let stopping = stop.load(Ordering::Acquire);
            while self.drain(&mut rings, stop) == BATCH {}
            if stopping {
                return;
            }
            // Told to stop meanwhile, it may have left some.
            if !stop.load(Ordering::Acquire) {
                self.names.note_all_told();
            }
            if let Err(error) = rings.wait(NAP) {
                tracing::error!(%error, "the rings of records can not be watched; reading on");
                std::thread::sleep(NAP);
            }
        }
    }

    /// Takes off its ring what a daemon wrote down that died before it could: of all that is in the rings
    /// that can only be the last verdict of the log.
    fn pass_over_written(&self, rings: &mut Rings) {
        // Not read where the rings are empty.
        let last = LazyCell::new(|| {
            self.audit.last_verdict().unwrap_or_else(|error| {
                tracing::warn!(
                    %error,
                    "the audit log can not be read back; what a daemon that died wrote last may be written again"
                );
                None
            })
        });
        rings.pass_over(|record| {
            let Some(last) = &*last else { return false };
            let Ok(told) = self.tell(record) else { return false };
            let is_written = told.is_of_one_decision_with(last);
            if is_written {
                self.remember(record, self.clock.at(record.event().time), &told);
            }
            is_written
        });
    }

    fn drain(&mut self, rings: &mut Rings, stop: &AtomicBool) -> usize {
        if let Err(error) = self.clock.refresh() {
            tracing::error!(%error, "it is not known whether the wall clock was set");
        }
        let taken = rings.drain(BATCH, |record| self.witness(record, stop));
        if rings.may_have_lost() {
            self.may_have_lost.store(true, Ordering::Release);
        }
        taken
    }

    /// Writes a record down, which may take until the log's disk has room again.
    fn witness(
        &self,
        record: Result<KernelRecord, UnknownRecord>,
        stop: &AtomicBool,
    ) -> ControlFlow<()> {
        let told = record.map_err(|unknown| unknown.to_string()).and_then(|record| {
            let told = self.tell(&record)?;
            Ok((record, told))
        });
        match told {
            Ok((record, told)) => {
                let time = self.clock.at(record.event().time);
                let is_kept = self.remember(&record, time, &told);
                let body = RecordBody::Verdict(Box::new(told));
                match self.audit.write_at(time, &body, || stop.load(Ordering::Acquire)) {
                    Ok(()) => {
                        fault::point("witness.written");
                        ControlFlow::Continue(())
                    }
                    Err(NotWritten) => {
                        if is_kept {
                            self.denials.take_back();
                        }
                        ControlFlow::Break(())
                    }
                }
            }
            Err(error) => {
                self.denials.undecodable.fetch_add(1, Ordering::Relaxed);
                tracing::error!(error, "a record of the kernel can not be read");
                ControlFlow::Continue(())
            }
        }
    }

    /// Keeps a denial; whether it is one.
    fn remember(&self, record: &KernelRecord, time: Timestamp, told: &VerdictRecord) -> bool {
        if told.outcome.reason().is_none() {
            return false;
        }
        let path = exec_path(record).and_then(path_of);
        let socket = match record {
            KernelRecord::Request(_) => BoundName::None,
            KernelRecord::Path(record) => BoundName::of(&record.event, &record.path),
        };
        let executable = told.process.executable.as_ref().map(|text| text.as_str().into());
        let workload = told.workload.name.as_str().to_owned();
        let identity = told.workload.identity.as_ref().map(|text| text.as_str().to_owned());
        let event = *record.event();
        self.denials.keep(Denial { time, event, path, socket, executable, workload, identity });
        true
    }

    /// The record in words.
    fn tell(&self, record: &KernelRecord) -> Result<VerdictRecord, String> {
        let event = record.event();
        let path = match record {
            KernelRecord::Request(_) => None,
            KernelRecord::Path(record) => Some(record.path.as_slice()),
        };
        let verdict = Verdict::try_from(event.verdict)
            .map_err(|unknown| format!("it has the unknown verdict {}", unknown.0))?;
        let mode = Mode::try_from(event.mode)
            .map_err(|unknown| format!("it has the unknown mode {}", unknown.0))?;
        let hook = Hook::try_from(event.hook)
            .map_err(|unknown| format!("it has the unknown hook {}", unknown.0))?;
        let request = Request::of(event, path)
            .map_err(|unknown| format!("it has the unknown request {}", unknown.0))?;
        let name = self.names.workload(event.key.workload);
        let started = match (event.is_start(), verdict, &name) {
            (true, Verdict::Allow, Some(workload)) => Some(launch_grant(&workload.name)),
            _ => None,
        };
        let (scope, grant) = match started {
            Some(grant) => (Some(LAUNCH.to_owned()), Some(grant)),
            None => (self.names.scope_word(event.scope), self.names.grant_word(event.grant)),
        };
        Ok(VerdictRecord {
            boot_ns: event.time,
            workload: Workload {
                identity: self.names.identity_word(event.identity).map(Text::new),
                name: Text::new(name.as_ref().map_or("unknown", |name| &name.name)),
                cgroup_id: event.cgroup,
                cgroup: name.as_ref().map(|name| Text::new(&name.cgroup)),
                unit: name.as_ref().and_then(|name| name.unit.as_ref()).map(Text::new),
                container: name
                    .as_ref()
                    .and_then(|name| name.containers.get(&event.cgroup))
                    .map(container_record),
                pod: name.and_then(|name| name.pod).as_ref().map(pod_record),
            },
            process: self.process(event, exec_path(record)),
            request,
            outcome: if event.of_another != 0 && !self.ends_others {
                Outcome::new(verdict, mode).let_through()
            } else {
                Outcome::new(verdict, mode)
            },
            scope: scope.map(Text::new),
            grant: grant.map(Text::new),
            allowlist_generation: u64::from(event.key.allowlist.0),
            hook: Word(hook),
            layer: hook.layer().into(),
            folded: event.folded,
        })
    }

    /// The process and its ancestors: by what the kernel half keeps of them, which is still there
    /// when they are gone, else by procfs.
    fn process(&self, event: &Event, exec: Option<&[u8]>) -> Process {
        let mut process = Process::of(event);
        if event.detached != 0 {
            return process;
        }
        let known = self.processes.get(event.pid);
        process.start = known.as_ref().map(|known| self.start(known));
        process.executable = exec
            .map(until_nul)
            .map(Text::new)
            .or_else(|| self.executable(event.pid, known.as_ref()));
        let mut parents = Vec::new();
        let mut parent =
            known.map_or_else(|| self.parent_of(event.pid), |known| Some(known.parent));
        while let Some(pid) = parent
            && pid > 0
            && parents.len() < Process::MAX_PARENTS
        {
            let known = self.processes.get(pid);
            parents.push(Ancestor {
                pid,
                start: known.as_ref().map(|known| self.start(known)),
                executable: self.executable(pid, known.as_ref()),
            });
            parent = known.map_or_else(|| self.parent_of(pid), |known| Some(known.parent));
        }
        process.with_parents(parents)
    }

    fn start(&self, known: &KnownProcess) -> ProcessStart {
        ProcessStart { time: self.clock.at(known.start), boot_ns: known.start }
    }

    fn executable(&self, pid: u32, known: Option<&KnownProcess>) -> Option<Text> {
        if self.reads_procfs
            && let Ok(path) = fs::read_link(format!("/proc/{pid}/exe"))
        {
            use std::os::unix::ffi::OsStrExt as _;
            return Some(Text::new(path.as_os_str().as_bytes()));
        }
        known.map(|known| until_nul(&known.path)).filter(|path| !path.is_empty()).map(Text::new)
    }

    fn parent_of(&self, pid: u32) -> Option<u32> {
        let process = procfs::process::Process::new(i32::try_from(pid).ok()?);
        let stat = process.ok().filter(|_| self.reads_procfs)?.stat().ok()?;
        u32::try_from(stat.ppid).ok()
    }
}

/// The path of an exec, as the caller named it.
fn exec_path(record: &KernelRecord) -> Option<&[u8]> {
    match record {
        KernelRecord::Path(record) if record.event.kind == RequestKind::Exec as u8 => {
            Some(&record.path)
        }
        KernelRecord::Path(_) | KernelRecord::Request(_) => None,
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn path_of(bytes: &[u8]) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = until_nul(bytes);
    (!path.is_empty()).then(|| PathBuf::from(std::ffi::OsStr::from_bytes(path)))
}
