//! When a runtime is asked again: as soon as it tells of a change, where it does, and from time to
//! time in any case.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

/// How often a runtime that does not tell of changes is asked. What is born in a known pod is held
/// already, and hooks do not wait for this.
const POLL: Duration = Duration::from_millis(250);
/// How often one that does tell is asked all the same.
const RESYNC: Duration = Duration::from_secs(5);
/// How long further changes are waited for before what changed is asked for.
const GATHER: Duration = Duration::from_millis(20);

/// The changes that a runtime tells of.
#[derive(Debug, Default)]
pub(super) struct Changes {
    told: Arc<Notify>,
    stream: Arc<AtomicU8>,
    task: Option<AbortHandle>,
}

/// Where the stream of changes tells of one.
#[derive(Clone, Debug)]
pub(super) struct Teller {
    told: Arc<Notify>,
    stream: Arc<AtomicU8>,
}

/// How a stream of changes ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The connection broke.
    Broken,
    /// The runtime has no such stream.
    Unknown,
}

/// It is to be opened.
const CLOSED: u8 = 0;
/// It was asked for and has said nothing yet: a server need not answer before the first change.
const OPENED: u8 = 1;
const TELLS: u8 = 2;
const UNKNOWN: u8 = 3;

impl Changes {
    /// Follows the stream that `open` opens, if none is followed.
    pub(super) fn follow<S>(&mut self, open: impl FnOnce(Teller) -> S)
    where
        S: Future<Output = Ended> + Send + 'static,
    {
        if self.stream.load(Ordering::Acquire) != CLOSED {
            return;
        }
        self.stream.store(OPENED, Ordering::Release);
        let teller = Teller { told: Arc::clone(&self.told), stream: Arc::clone(&self.stream) };
        let stream = Arc::clone(&self.stream);
        let followed = open(teller);
        let follow = async move {
            let ended = match followed.await {
                Ended::Broken => CLOSED,
                Ended::Unknown => UNKNOWN,
            };
            stream.store(ended, Ordering::Release);
        };
        self.task = Some(tokio::spawn(follow).abort_handle());
    }

    /// Waits for a change, or until it is time to ask.
    pub(super) async fn next(&self) {
        let tells = self.stream.load(Ordering::Acquire) == TELLS;
        let patience = if tells { RESYNC } else { POLL };
        if timeout(patience, self.told.notified()).await.is_ok() {
            sleep(GATHER).await;
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Teller {
    pub(super) fn tell(&self) {
        self.stream.store(TELLS, Ordering::Release);
        self.told.notify_one();
    }
}
