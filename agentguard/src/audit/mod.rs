//! The audit log: a chain of records, written one at a time, with two ways in.
//!
//! [`AuditLog::append`] is for those who must not wait: it puts a record into a bounded queue and returns
//! at once. [`AuditLog::write_at`] is for who has the record elsewhere until it is written, as the reader
//! of the kernel's rings: it waits, so that a daemon that dies takes nothing with it that nobody counts.
//! Either way a record is linked ([`chain`]), written (`sink`) and handed to those who subscribed, in the
//! order in which they came. When a write fails, as on a full disk, nothing is given up and it is tried
//! again every second; what finds no room in the queue meanwhile is counted, and a `loss` record says so
//! as soon as writing works.
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
use record::{Class, LossCause, LossRecord, RecoveredRecord, RotatedRecord, VerdictRecord};
use sink::{RotatingFile, Sink, Torn};

/// How long the writer waits before it tries a failed write again, and how often losses are
/// written down while they go on.
const PAUSE: Duration = Duration::from_secs(1);

/// How long [`AuditLog::flush`], [`AuditLog::close`] and the end of the daemon wait for a writer that is
/// stuck, as behind a pipe that nobody reads.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

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
    /// Of the daemon's own records there are few; enough for thousands of workloads that come at once.
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

/// A record was not written, and nothing of it is in the log: who had it has it still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotWritten;

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
    /// Locked before `state`, and held while something is written; `None` once the log is closed.
    writer: Mutex<Option<Writer>>,
    state: Mutex<State>,
    /// Tells the writer's thread, and those who wait to try again, that there is something to do.
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
        let (lines, _) = broadcast::channel(SUBSCRIBER_LINES);
        let writer = Writer { lines: lines.clone(), sink, head, torn, node: Text::new(node) };
        let shared = Arc::new(Shared {
            writer: Mutex::new(Some(writer)),
            state: Mutex::new(state),
            wake: Condvar::new(),
            capacity: queue.max(2),
        });
        let writes = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("audit-writer".into())
            .spawn(move || writes.run())
            .map_err(OpenError::Thread)?;
        Ok(Self { handle: Arc::new(Handle { shared, lines }) })
    }

    /// Records that something happens now. Never waits; what finds no room is counted and said in a
    /// `loss` record.
    pub fn append(&self, body: RecordBody) {
        let shared = &self.handle.shared;
        let mut state = shared.state();
        if state.closing || state.queued >= shared.capacity {
            state.lose(body.class(), None);
            return;
        }
        state.queued += 1;
        state.queue.push_back(Item::Record(Pending { time: Timestamp::now(), body }));
        shared.wake.notify_all();
    }

    /// Records that something happened at `time`, after all that was appended before. Waits until it is
    /// written, however long that takes; of a record that fits no line, until that is counted.
    ///
    /// # Errors
    /// When writing fails and `gives_up`, which is asked once a second then, or the log is closed.
    pub fn write_at(
        &self,
        time: Timestamp,
        body: &RecordBody,
        gives_up: impl Fn() -> bool,
    ) -> Result<(), NotWritten> {
        let shared = &self.handle.shared;
        loop {
            let written = shared.attempt(|writer| {
                writer.write_queued(shared)?;
                writer.write(shared, time, body)
            });
            match written {
                None => return Err(NotWritten),
                Some(Ok(())) => return Ok(()),
                Some(Err(WriteError::Line(error))) => {
                    shared.lose(body.class(), error);
                    return Ok(());
                }
                Some(Err(WriteError::Output(error))) => {
                    if gives_up() || shared.pause(&error) {
                        return Err(NotWritten);
                    }
                }
            }
        }
    }

    /// The last verdict in the log, also one from before it was opened; `None` where there is none among the
    /// last megabytes, or the log can not be read back.
    ///
    /// # Errors
    /// When a file of the log can not be read.
    pub fn last_verdict(&self) -> io::Result<Option<VerdictRecord>> {
        // Nothing is written, and so no file renamed, meanwhile.
        match self.handle.shared.writer().as_ref().map(|writer| &writer.sink) {
            Some(Sink::File(file)) => file.last(chain::verdict),
            Some(Sink::Stream(_)) | None => Ok(None),
        }
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
            self.handle.shared.wake.notify_all();
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

    fn writer(&self) -> MutexGuard<'_, Option<Writer>> {
        // A line is written by one call: a panic between two of them leaves whole lines.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, tell: Option<oneshot::Sender<()>>) {
        let mut state = self.state();
        state.closing = true;
        state.ended.extend(tell);
        self.wake.notify_all();
    }

    /// Notes that a record is in no log and never will be.
    fn lose(&self, class: Class, error: LineError) {
        tracing::error!(%error, "an audit record was dropped");
        self.state().lose(class, Some(error.to_string()));
        self.wake.notify_all();
    }

    /// Lets the writer work, where the log is not closed, and notes it if that fails: before anybody else
    /// can write, who would have it noted that writing works.
    fn attempt(
        &self,
        work: impl FnOnce(&mut Writer) -> Result<(), WriteError>,
    ) -> Option<Result<(), WriteError>> {
        let mut writer = self.writer();
        let written = work(writer.as_mut()?);
        if let Err(WriteError::Output(error)) = &written {
            let mut state = self.state();
            if !state.counts.failing {
                tracing::error!(
                    error,
                    "the audit log can not be written; trying again every second"
                );
            }
            state.counts.write_failures += 1;
            state.counts.failing = true;
        }
        Some(written)
    }

    /// Writes what is appended until the log is closed.
    fn run(&self) {
        while self.has_work() {
            let written = self.attempt(|writer| writer.write_queued(self));
            if let Some(Err(WriteError::Output(error))) = written
                && self.pause(&error)
            {
                self.give_up(&error);
            }
        }
        // The file is unlocked before anybody hears that it is.
        let synced = self.writer().take().map_or(Ok(()), |mut writer| writer.sink.sync());
        if let Err(error) = synced {
            tracing::error!(%error, "the last audit records may not outlast a power failure");
        }
        let ended = std::mem::take(&mut self.state().ended);
        for tell in ended {
            // Who asked may have stopped waiting.
            let _ = tell.send(());
        }
    }

    /// Waits for something to write; false when the log is closed and nothing is left.
    fn has_work(&self) -> bool {
        let mut state = self.state();
        loop {
            if !state.queue.is_empty() || state.loss.is_some() {
                return true;
            }
            if state.closing {
                return false;
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What is to be written next of what was appended.
    fn next(&self) -> Option<Task> {
        let mut state = self.state();
        let is_due = |state: &State| {
            state
                .loss
                .as_ref()
                .is_some_and(|loss| state.queue.is_empty() || loss.began.elapsed() >= PAUSE)
        };
        if is_due(&state)
            && let Some(loss) = state.loss.take()
        {
            return Some(Task::WriteLoss(loss));
        }
        // One in the writer's hand is queued until it is written.
        Some(match state.queue.pop_front()? {
            Item::Record(pending) => Task::Write(pending),
            Item::Flush(tell) => Task::Flush(tell),
        })
    }

    /// Tells those who wait for a flush that writing fails, and waits a moment. True when the log is being
    /// closed, so that there is no later.
    fn pause(&self, error: &str) -> bool {
        let mut state = self.state();
        let until = Instant::now() + PAUSE;
        loop {
            if !state.counts.failing {
                // Somebody else has written meanwhile.
                return false;
            }
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
                self.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
    }

    /// Counts as lost what is appended still, where the log is being closed and can not be written.
    fn give_up(&self, error: &str) {
        let mut state = self.state();
        for item in std::mem::take(&mut state.queue) {
            if let Item::Record(pending) = item {
                state.queued -= 1;
                state.lose(pending.body.class(), Some(error.to_owned()));
            }
        }
        if let Some(loss) = state.loss.take() {
            tracing::error!(?loss, "audit records were lost, and the log can not say so");
        }
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

/// What is written next.
enum Task {
    Write(Pending),
    Flush(oneshot::Sender<Result<(), FlushError>>),
    WriteLoss(Loss),
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

/// Links records and writes them.
struct Writer {
    lines: broadcast::Sender<Arc<str>>,
    sink: Sink,
    head: Head,
    torn: Option<Torn>,
    node: Text,
}

impl Writer {
    /// Writes what was appended, in its order, until nothing is left of it. What fails stays the next.
    fn write_queued(&mut self, shared: &Shared) -> Result<(), WriteError> {
        while let Some(task) = shared.next() {
            match task {
                Task::Write(pending) => {
                    match self.write(shared, pending.time, &pending.body) {
                        Ok(()) => {}
                        Err(WriteError::Line(error)) => shared.lose(pending.body.class(), error),
                        Err(error) => {
                            shared.state().queue.push_front(Item::Record(pending));
                            return Err(error);
                        }
                    }
                    shared.state().queued -= 1;
                }
                Task::WriteLoss(loss) => self.write_loss(shared, loss)?,
                Task::Flush(tell) => {
                    let result =
                        self.sink.sync().map_err(|error| FlushError::Failing(error.to_string()));
                    // Who asked may have stopped waiting.
                    let _ = tell.send(result);
                }
            }
        }
        Ok(())
    }

    fn write_loss(&mut self, shared: &Shared, loss: Loss) -> Result<(), WriteError> {
        let record = RecordBody::Loss(LossRecord {
            cause: LossCause::Queue,
            allowed: loss.allowed,
            denied: loss.denied,
            other: loss.other,
            since: loss.since,
            until: loss.until,
            error: loss.error.as_deref().map(Text::from),
        });
        let Err(WriteError::Output(error)) = self.write(shared, Timestamp::now(), &record) else {
            return Ok(());
        };
        let mut state = shared.state();
        let mut sum = Loss { error: Some(error.clone()), ..loss };
        if let Some(newer) = state.loss.take() {
            sum.allowed += newer.allowed;
            sum.denied += newer.denied;
            sum.other += newer.other;
            sum.until = newer.until;
        }
        state.loss = Some(sum);
        Err(WriteError::Output(error))
    }

    /// Writes a record, after whatever the log has to say about itself first.
    fn write(
        &mut self,
        shared: &Shared,
        time: Timestamp,
        body: &RecordBody,
    ) -> Result<(), WriteError> {
        self.prepare(shared)?;
        let (line, head) = self.line(time, body)?;
        if let Sink::File(file) = &mut self.sink
            && !file.has_room(line.len())
        {
            file.rotate(head.seq)?;
            self.prepare(shared)?;
            return self.put_record(shared, time, body);
        }
        self.put(shared, &line, head)
    }

    /// Opens the file if need be, closes off what a crash or a failed write left, and lets a file
    /// that continues another begin by saying so.
    fn prepare(&mut self, shared: &Shared) -> Result<(), WriteError> {
        let Sink::File(file) = &mut self.sink else { return Ok(()) };
        if let Some(opened) =
            file.ready(self.head).map_err(|error| WriteError::Output(error.to_string()))?
        {
            self.head = opened.head;
            self.torn = opened.torn;
        }
        if let Some(Torn { bytes, sha256, text }) = self.torn.clone() {
            let record = RecoveredRecord { torn_bytes: bytes, torn_sha256: sha256, torn: text };
            self.put_record(shared, Timestamp::now(), &RecordBody::Recovered(record))?;
            self.torn = None;
        }
        let Sink::File(file) = &mut self.sink else { return Ok(()) };
        file.remove_excess()?;
        if file.is_empty() && self.head.seq > 0 {
            let left = file.rotation()?;
            let record =
                RotatedRecord { first_kept: left.first_kept, removed_files: left.removed_files };
            let told = self.put_record(shared, Timestamp::now(), &RecordBody::Rotated(record));
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
            let mut state = shared.state();
            state.counts.rotations += 1;
            state.counts.removed_files += left.removed_files;
        }
        Ok(())
    }

    fn line(&self, time: Timestamp, body: &RecordBody) -> Result<(String, Head), WriteError> {
        chain::line(&self.head, time, &self.node, body).map_err(WriteError::Line)
    }

    fn put_record(
        &mut self,
        shared: &Shared,
        time: Timestamp,
        body: &RecordBody,
    ) -> Result<(), WriteError> {
        let (line, head) = self.line(time, body)?;
        self.put(shared, &line, head)
    }

    fn put(&mut self, shared: &Shared, line: &str, head: Head) -> Result<(), WriteError> {
        self.sink.write(line)?;
        self.head = head;
        let mut state = shared.state();
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
