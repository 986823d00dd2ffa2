//! Ctrl-C, so that what was made is taken away before the command ends.
//!
//! Its one job is to turn the signals that end a command into an error at the next [`check`]: an
//! error takes the ordinary way out, on which every value cleans up after itself. One thread waits
//! for the signals; the flag is all that is shared.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{SigSet, Signal};

/// Whether a signal has come.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// How long [`sleep`] goes without looking.
const LOOK: Duration = Duration::from_millis(50);

/// From now on signals wait for a [`check`]. To be called before any other thread is started;
/// programs that are started have them blocked too, until they change it.
///
/// # Errors
///
/// The kernel refuses to block the signals.
pub(crate) fn defer() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("signals cannot be blocked")?;
    thread::spawn(move || {
        if signals.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// Whether to go on.
///
/// # Errors
///
/// A signal has come.
pub(crate) fn check() -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// Waits, but not beyond a signal.
///
/// # Errors
///
/// A signal has come.
pub(crate) fn sleep(duration: Duration) -> Result<()> {
    let end = Instant::now() + duration;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(LOOK));
    }
}
