//! The audit log: a chain of records, written by one thread, in front of which nobody waits.
//!
//! [`AuditLog::append`] puts a record into a bounded queue and returns at once. The writer thread
//! takes records out, links them ([`chain`]), writes them (`sink`) and hands the line to those who
//! subscribed. When a write fails, as on a full disk, the writer keeps the record and tries again
//! every second; what finds no room in the queue meanwhile is counted, and a `loss` record says so
//! as soon as writing works. Requests that were allowed may fill half of the queue only, so a flood
//! of them does not push out denials.
//!
//! Must not know how a verdict comes about, who reads the log, or how it is configured.

pub mod chain;
pub mod family;
pub mod record;
pub mod shown;
mod sink;
pub mod text;
pub mod verify;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::{broadcast, oneshot};

use crate::fault;

pub use chain::{Hash, Head};
pub use record::{Record, RecordBody};
pub use sink::{Limits, OpenError};
pub use text::Text;
pub use verify::{VerifyReport, verify};

use chain::LineError;
use record::{Class, LossCause, LossRecord, RecoveredRecord, RotatedRecord};
use sink::{RotatingFile, Sink, Torn};

/// How long the writer waits before it tries a failed write again, and how often losses are
/// written down while they go on.
const PAUSE: Duration = Duration::from_secs(1);

/// How long [`AuditLog::flush`] and [`AuditLog::close`] wait for a writer that is stuck, as behind
/// a pipe that nobody reads.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lines that a slow subscriber may be behind before it misses some.
const SUBSCRIBER_LINES: usize = 1024;

/// Where the log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output. It can not be read back, so every start begins a chain of its own.
    Stdout,
    /// A file, rotated within limits; the chain goes on across files and starts.
    File { path: PathBuf, limits: Limits },
}

/// How the log is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    pub output: Output,
    /// Records that may wait to be written; at least 2.
    pub queue: usize,
}

impl Options {
    /// Enough for a second of heavy denial at a few megabytes.
    pub const QUEUE: usize = 8192;
}

/// What became of the records so far, in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Lines written, those about the log itself included.
    pub written: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Records that found no room in the queue, or fitted no line.
    pub lost: u64,
    /// Records waiting to be written.
    pub queued: u64,
    /// Writes that failed; each is tried again.
    pub write_failures: u64,
    /// Whether the last write failed.
    pub failing: bool,
    /// Files begun after the first.
    pub rotations: u64,
    /// Files removed to keep the bound.
    pub removed_files: u64,
    /// The last line written.
    pub head: Head,
}

/// The log is not safely on disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlushError {
    #[error("the audit log can not be written ({0}); it is tried again every second")]
    Failing(String),
    #[error("the audit log was not written within {} s; see what blocks its output", PATIENCE.as_secs())]
    Stuck,
    #[error("the audit log is closed")]
    Closed,
}

/// The log. Clones are the same log.
#[derive(Clone)]
pub struct AuditLog {
    handle: Arc<Handle>,
}

/// Ends the writer when the last clone of the log is gone.
struct Handle {
    shared: Arc<Shared>,
    lines: broadcast::Sender<Arc<str>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close(None);
    }
}

/// What callers and the writer share.
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    capacity: usize,
}

struct State {
    queue: VecDeque<Item>,
    /// Records in the queue.
    queued: usize,
    loss: Option<Loss>,
    closing: bool,
    /// Told when the writer has ended.
    ended: Vec<oneshot::Sender<()>>,
    counts: Counts,
}

enum Item {
    Record(Pending),
    Flush(oneshot::Sender<Result<(), FlushError>>),
}

struct Pending {
    time: Timestamp,
    body: RecordBody,
}

/// Records lost since the last `loss` record.
#[derive(Clone, Debug)]
struct Loss {
    allowed: u64,
    denied: u64,
    other: u64,
    since: Timestamp,
    until: Timestamp,
    began: Instant,
    error: Option<String>,
}

impl AuditLog {
    /// Opens the log and starts its writer. The end of an existing log is found and continued; half
    /// a line that a crash left is closed off by a `recovered` record.
    ///
    /// # Errors
    /// When the file can not be opened, is in use by another process, or its limits are too small.
    pub fn open(options: Options, node: &str) -> Result<Self, OpenError> {
        let (sink, head, torn) = match options.output {
            Output::Stdout => (Sink::Stream(Box::new(io::stdout())), Head::EMPTY, None),
            Output::File { path, limits } => {
                let (file, opened) = RotatingFile::open(&path, limits)?;
                (Sink::File(file), opened.head, opened.torn)
            }
        };
        Self::start(sink, head, torn, node, options.queue)
    }

    /// A log that goes to `stream`.
    ///
    /// # Errors
    /// When the writer can not start.
    pub fn to_stream(
        stream: impl Write + Send + 'static,
        node: &str,
        queue: usize,
    ) -> Result<Self, OpenError> {
        Self::start(Sink::Stream(Box::new(stream)), Head::EMPTY, None, node, queue)
    }

    fn start(
        sink: Sink,
        head: Head,
        torn: Option<Torn>,
        node: &str,
        queue: usize,
    ) -> Result<Self, OpenError> {
        let counts = Counts {
            written: 0,
            bytes: 0,
            lost: 0,
            queued: 0,
            write_failures: 0,
            failing: false,
            rotations: 0,
            removed_files: 0,
            head,
        };
        let state = State {
            queue: VecDeque::new(),
            queued: 0,
            loss: None,
            closing: false,
            ended: Vec::new(),
            counts,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
            capacity: queue.max(2),
        });
        let (lines, _) = broadcast::channel(SUBSCRIBER_LINES);
        let writer = Writer {
            shared: Arc::clone(&shared),
            lines: lines.clone(),
            sink,
            head,
            torn,
            node: Text::new(node),
        };
        std::thread::Builder::new()
            .name("audit-writer".into())
            .spawn(move || writer.run())
            .map_err(OpenError::Thread)?;
        Ok(Self { handle: Arc::new(Handle { shared, lines }) })
    }

    /// Records that something happens now. Never waits; what finds no room is counted and said in a
    /// `loss` record.
    pub fn append(&self, body: RecordBody) {
        self.append_at(Timestamp::now(), body);
    }

    /// Records that something happened at `time`.
    pub fn append_at(&self, time: Timestamp, body: RecordBody) {
        let shared = &self.handle.shared;
        let mut state = shared.state();
        let class = body.class();
        let room = match class {
            Class::Allowed => shared.capacity / 2,
            Class::Denied | Class::Other => shared.capacity,
        };
        if state.closing || state.queued >= room {
            state.lose(class, None);
            return;
        }
        state.queued += 1;
        state.queue.push_back(Item::Record(Pending { time, body }));
        shared.wake.notify_one();
    }

    /// Every line from now on, without its newline, as soon as it is written.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<str>> {
        self.handle.lines.subscribe()
    }

    /// Waits until all that was appended before is on disk.
    ///
    /// # Errors
    /// When writing fails or is stuck. Nothing is dropped: the records stay queued.
    pub async fn flush(&self) -> Result<(), FlushError> {
        let (tell, told) = oneshot::channel();
        {
            let mut state = self.handle.shared.state();
            if state.closing {
                return Err(FlushError::Closed);
            }
            state.queue.push_back(Item::Flush(tell));
            self.handle.shared.wake.notify_one();
        }
        match tokio::time::timeout(PATIENCE, told).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(FlushError::Closed),
            Err(_) => Err(FlushError::Stuck),
        }
    }

    /// Writes what is queued, if that works, and ends the writer; later records are lost.
    ///
    /// # Errors
    /// When the writer is stuck.
    pub async fn close(&self) -> Result<(), FlushError> {
        let (tell, told) = oneshot::channel();
        self.handle.shared.close(Some(tell));
        match tokio::time::timeout(PATIENCE, told).await {
            Ok(_) => Ok(()),
            Err(_) => Err(FlushError::Stuck),
        }
    }

    /// What became of the records so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let state = self.handle.shared.state();
        Counts { queued: state.queued as u64, ..state.counts }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock and leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, tell: Option<oneshot::Sender<()>>) {
        let mut state = self.state();
        state.closing = true;
        state.ended.extend(tell);
        self.wake.notify_one();
    }
}

impl State {
    fn lose(&mut self, class: Class, error: Option<String>) {
        let now = Timestamp::now();
        let loss = self.loss.get_or_insert_with(|| Loss {
            allowed: 0,
            denied: 0,
            other: 0,
            since: now,
            until: now,
            began: Instant::now(),
            error: None,
        });
        match class {
            Class::Allowed => loss.allowed += 1,
            Class::Denied => loss.denied += 1,
            Class::Other => loss.other += 1,
        }
        loss.until = now;
        if error.is_some() {
            loss.error = error;
        }
        self.counts.lost += 1;
    }
}

/// What the writer does next.
enum Task {
    Write(Pending),
    Flush(oneshot::Sender<Result<(), FlushError>>),
    WriteLoss(Loss),
    End,
}

/// A record that was not written.
enum WriteError {
    /// Later it may work.
    Output(String),
    /// It never will.
    Line(LineError),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Output(error.to_string())
    }
}

struct Writer {
    shared: Arc<Shared>,
    lines: broadcast::Sender<Arc<str>>,
    sink: Sink,
    head: Head,
    torn: Option<Torn>,
    node: Text,
}

impl Writer {
    fn run(mut self) {
        loop {
            match self.next() {
                Task::Write(pending) => self.write_or_hold(pending),
                Task::WriteLoss(loss) => self.write_loss(loss),
                Task::Flush(tell) => {
                    let result =
                        self.sink.sync().map_err(|error| FlushError::Failing(error.to_string()));
                    // Who asked may have stopped waiting.
                    let _ = tell.send(result);
                }
                Task::End => break,
            }
        }
        // A failure to sync at the end has nobody left to hear of it.
        let _ = self.sink.sync();
        let ended = std::mem::take(&mut self.shared.state().ended);
        // The file is unlocked before anybody hears that it is.
        drop(self);
        for tell in ended {
            let _ = tell.send(());
        }
    }

    /// Waits for the next task.
    fn next(&self) -> Task {
        let mut state = self.shared.state();
        loop {
            let due = state
                .loss
                .as_ref()
                .is_some_and(|loss| state.queue.is_empty() || loss.began.elapsed() >= PAUSE);
            if due && let Some(loss) = state.loss.take() {
                return Task::WriteLoss(loss);
            }
            match state.queue.pop_front() {
                Some(Item::Record(pending)) => {
                    state.queued -= 1;
                    return Task::Write(pending);
                }
                Some(Item::Flush(tell)) => return Task::Flush(tell),
                None if state.closing => return Task::End,
                None => {
                    state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Writes a record, again and again if need be. Gives up only when the log is being closed.
    fn write_or_hold(&mut self, pending: Pending) {
        loop {
            match self.write(pending.time, &pending.body) {
                Ok(()) => return,
                Err(WriteError::Line(error)) => {
                    tracing::error!(%error, "an audit record was dropped");
                    self.shared.state().lose(pending.body.class(), Some(error.to_string()));
                    return;
                }
                Err(WriteError::Output(error)) => {
                    if self.pause(&error) {
                        self.shared.state().lose(pending.body.class(), Some(error));
                        return;
                    }
                }
            }
        }
    }

    fn write_loss(&mut self, loss: Loss) {
        let record = RecordBody::Loss(LossRecord {
            cause: LossCause::Queue,
            allowed: loss.allowed,
            denied: loss.denied,
            other: loss.other,
            since: loss.since,
            until: loss.until,
            error: loss.error.as_deref().map(Text::from),
        });
        if let Err(WriteError::Output(error)) = self.write(Timestamp::now(), &record) {
            if self.pause(&error) {
                tracing::error!(?loss, "audit records were lost, and the log can not say so");
                return;
            }
            let mut state = self.shared.state();
            let newer = state.loss.take();
            let mut sum = Loss { error: Some(error), ..loss };
            if let Some(newer) = newer {
                sum.allowed += newer.allowed;
                sum.denied += newer.denied;
                sum.other += newer.other;
                sum.until = newer.until;
            }
            state.loss = Some(sum);
        }
    }

    /// Notes a failed write, tells those who wait for a flush, and waits a moment. True when the
    /// log is being closed, so that there is no later.
    fn pause(&self, error: &str) -> bool {
        let mut state = self.shared.state();
        if !state.counts.failing {
            tracing::error!(error, "the audit log can not be written; trying again every second");
        }
        state.counts.write_failures += 1;
        state.counts.failing = true;
        let until = Instant::now() + PAUSE;
        loop {
            for item in std::mem::take(&mut state.queue) {
                match item {
                    Item::Record(_) => state.queue.push_back(item),
                    Item::Flush(tell) => {
                        // Who asked may have stopped waiting.
                        let _ = tell.send(Err(FlushError::Failing(error.to_owned())));
                    }
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.closing || left.is_zero() {
                return state.closing;
            }
            let (woken, _) =
                self.shared.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
    }

    /// Writes a record, after whatever the log has to say about itself first.
    fn write(&mut self, time: Timestamp, body: &RecordBody) -> Result<(), WriteError> {
        self.prepare()?;
        let (line, head) = self.line(time, body)?;
        if let Sink::File(file) = &mut self.sink
            && !file.has_room(line.len())
        {
            file.rotate(head.seq)?;
            self.prepare()?;
            return self.put_record(time, body);
        }
        self.put(&line, head)
    }

    /// Opens the file if need be, closes off what a crash or a failed write left, and lets a file
    /// that continues another begin by saying so.
    fn prepare(&mut self) -> Result<(), WriteError> {
        let Sink::File(file) = &mut self.sink else { return Ok(()) };
        if let Some(opened) =
            file.ready(self.head).map_err(|error| WriteError::Output(error.to_string()))?
        {
            self.head = opened.head;
            self.torn = opened.torn;
        }
        if let Some(Torn { bytes, sha256, text }) = self.torn.clone() {
            let record = RecoveredRecord { torn_bytes: bytes, torn_sha256: sha256, torn: text };
            self.put_record(Timestamp::now(), &RecordBody::Recovered(record))?;
            self.torn = None;
        }
        let Sink::File(file) = &mut self.sink else { return Ok(()) };
        file.remove_excess()?;
        if file.is_empty() && self.head.seq > 0 {
            let left = file.rotation()?;
            let record =
                RotatedRecord { first_kept: left.first_kept, removed_files: left.removed_files };
            let told = self.put_record(Timestamp::now(), &RecordBody::Rotated(record));
            fault::point("audit.told");
            let Sink::File(file) = &mut self.sink else { return told };
            file.rotated(&left, told.is_ok());
            // Also where there was no room to tell it, which may be on account of what goes. What was told
            // is on disk first, since the removal may be there at once.
            if told.is_ok() {
                file.sync()?;
            }
            file.remove_excess()?;
            fault::point("audit.removed");
            told?;
            let mut state = self.shared.state();
            state.counts.rotations += 1;
            state.counts.removed_files += left.removed_files;
        }
        Ok(())
    }

    fn line(&self, time: Timestamp, body: &RecordBody) -> Result<(String, Head), WriteError> {
        chain::line(&self.head, time, &self.node, body).map_err(WriteError::Line)
    }

    fn put_record(&mut self, time: Timestamp, body: &RecordBody) -> Result<(), WriteError> {
        let (line, head) = self.line(time, body)?;
        self.put(&line, head)
    }

    fn put(&mut self, line: &str, head: Head) -> Result<(), WriteError> {
        self.sink.write(line)?;
        self.head = head;
        let mut state = self.shared.state();
        if state.counts.failing {
            tracing::info!("the audit log is written again");
        }
        state.counts.failing = false;
        state.counts.written += 1;
        state.counts.bytes += line.len() as u64 + 1;
        state.counts.head = head;
        drop(state);
        if self.lines.receiver_count() > 0 {
            // Fails when the last subscriber has just left.
            let _ = self.lines.send(line.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
