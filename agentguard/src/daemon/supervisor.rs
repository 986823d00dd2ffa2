//! What the service manager is told: that everything is in force, that the daemon still works, that it
//! stops. Without a service manager nothing is told.

use sd_notify::NotifyState;

/// Manifests are in force and the control socket answers.
pub(super) fn ready() {
    tell(&[NotifyState::Ready, NotifyState::Status("what is granted is in force")]);
}

/// The daemon has just done what was due. Told at each tick, which is far more often than a watchdog
/// asks for, so that one that hangs is the only one that is missed.
pub(super) fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// The daemon goes; what is in force stays.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("what is in force stays in force")]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager was not told");
    }
}
