//! Wall clock and boot time.
//!
//! People and manifests speak of wall clock time, the kernel half of boot time, which no one can
//! set. The difference is read anew when the wall clock is stepped.

use std::time::Duration;

use agentguard_common::allowlist::NEVER;
use jiff::{SignedDuration, Timestamp};
use nix::time::{ClockId, clock_gettime};

use crate::grant::Expiry;

/// A step of the wall clock that is not mere correction of its speed.
const STEP: Duration = Duration::from_millis(500);

/// The wall clock's time at boot, as seen now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    boot: Timestamp,
}

impl Clock {
    /// Reads both clocks.
    #[must_use]
    pub fn read() -> Self {
        let now = boot_now();
        Self { boot: Timestamp::now().saturating_sub(signed(now)).unwrap_or(Timestamp::UNIX_EPOCH) }
    }

    /// The clock again, if the wall clock was stepped meanwhile.
    #[must_use]
    pub fn stepped(self) -> Option<Self> {
        let now = Self::read();
        (now.boot.duration_since(self.boot).unsigned_abs() > STEP).then_some(now)
    }

    /// The wall clock's time at a boot time in nanoseconds.
    #[must_use]
    pub fn at(self, boot_ns: u64) -> Timestamp {
        self.boot.saturating_add(signed(Duration::from_nanos(boot_ns))).unwrap_or(Timestamp::MAX)
    }

    /// The boot time, in nanoseconds, at which a grant ends.
    #[must_use]
    pub fn end(self, expiry: Expiry) -> u64 {
        match expiry {
            Expiry::Never => NEVER,
            // What ended before boot ended at its first nanosecond: zero would mean that nothing
            // ever covered it.
            Expiry::At(time) => {
                u64::try_from(time.duration_since(self.boot).as_nanos()).unwrap_or(1).clamp(1, NEVER - 1)
            }
        }
    }
}

/// Nanoseconds of boot time, now.
#[must_use]
pub fn boot_ns() -> u64 {
    u64::try_from(boot_now().as_nanos()).unwrap_or(u64::MAX)
}

fn boot_now() -> Duration {
    // The clock exists since Linux 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_in_the_future_is_a_boot_time_in_the_future() {
        let clock = Clock::read();
        let end = clock.end(Expiry::At(Timestamp::now() + SignedDuration::from_secs(60)));
        let left = end - boot_ns();
        assert!((59_000_000_000..61_000_000_000).contains(&left), "{left}");
    }

    #[test]
    fn what_ended_before_boot_is_over_and_a_standing_grant_never_is() {
        let clock = Clock::read();
        assert_eq!(clock.end(Expiry::At(Timestamp::UNIX_EPOCH)), 1);
        assert_eq!(clock.end(Expiry::Never), NEVER);
    }

    #[test]
    fn a_boot_time_is_told_in_wall_clock_time() {
        let clock = Clock::read();
        let now = clock.at(boot_ns());
        assert!(now.duration_since(Timestamp::now()).unsigned_abs() < Duration::from_secs(1));
    }
}
