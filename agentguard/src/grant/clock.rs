//! Turns wall-clock time into the boot time by which the kernel half lets grants expire.
//!
//! Boot time never jumps and goes on during suspend. The distance between the two clocks is read
//! once and kept, so that the same wall-clock time always becomes the same boot time; otherwise
//! every compilation would give slightly other tables.

use agentguard_common::allowlist::NEVER;
use jiff::Timestamp;
use nix::{
    errno::Errno,
    time::{ClockId, clock_gettime},
};

use super::document::Expiry;

/// Differences up to this are the clock being slewed, not set.
const STEP_NANOSECONDS: i128 = 1_000_000_000;

/// The distance between wall-clock time and boot time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Nanoseconds that the wall clock is ahead of `CLOCK_BOOTTIME`.
    ahead: i128,
}

/// A clock of the kernel did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system clocks can not be read: {0}; check that no filter refuses clock_gettime")]
pub struct ClockError(#[from] Errno);

impl Clock {
    /// Reads both clocks.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to tell the time.
    pub fn read() -> Result<Self, ClockError> {
        Ok(Self { ahead: distance()? })
    }

    /// A clock for a machine that started at `boot`.
    #[must_use]
    pub fn started_at(boot: Timestamp) -> Self {
        Self { ahead: boot.as_nanosecond() }
    }

    /// `time` as nanoseconds of boot time. What was before the machine started is zero; what is
    /// too far off for the tables is their last moment, just before "never".
    #[must_use]
    pub fn to_boot(&self, time: Timestamp) -> u64 {
        let since = (time.as_nanosecond() - self.ahead).max(0);
        u64::try_from(since).map_or(NEVER - 1, |since| since.min(NEVER - 1))
    }

    /// The wall-clock time at `boot_ns` nanoseconds of boot time.
    #[must_use]
    pub fn at(&self, boot_ns: u64) -> Timestamp {
        Timestamp::from_nanosecond(self.ahead + i128::from(boot_ns)).unwrap_or(Timestamp::MAX)
    }

    /// When a grant ends, as nanoseconds of boot time.
    #[must_use]
    pub fn expiry(&self, expiry: Expiry) -> u64 {
        match expiry {
            Expiry::At(end) => self.to_boot(end),
            Expiry::Never => NEVER,
        }
    }

    /// Reads the clocks again and takes over their distance if the wall clock was set by more than
    /// a second since; whether it was.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to tell the time; nothing changes then.
    pub fn refresh(&mut self) -> Result<bool, ClockError> {
        let ahead = distance()?;
        let stepped = (ahead - self.ahead).abs() > STEP_NANOSECONDS;
        if stepped {
            self.ahead = ahead;
        }
        Ok(stepped)
    }
}

/// Nanoseconds of boot time, now; the last moment there is if the kernel does not tell, so that
/// everything that ends is over.
#[must_use]
pub fn boot_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(u64::MAX, |time| {
        let nanoseconds = i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec());
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    })
}

fn distance() -> Result<i128, ClockError> {
    let nanoseconds = |clock| {
        let time = clock_gettime(clock)?;
        Ok::<_, Errno>(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
    };
    // The moment between two readings of boot time is theirs on average, whatever came in between.
    let before = nanoseconds(ClockId::CLOCK_BOOTTIME)?;
    let wall = nanoseconds(ClockId::CLOCK_REALTIME)?;
    let after = nanoseconds(ClockId::CLOCK_BOOTTIME)?;
    Ok(wall - (before + after) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn wall_clock_time_becomes_time_since_boot() {
        let clock = Clock::started_at(at(1_000));
        assert_eq!(clock.to_boot(at(1_001)), 1_000_000_000);
        assert_eq!(clock.to_boot(at(1_000)), 0);
        assert_eq!(clock.to_boot(at(1)), 0);
        assert_eq!(clock.expiry(Expiry::Never), NEVER);
        assert!(Clock::started_at(Timestamp::MIN).to_boot(Timestamp::MAX) < NEVER);
    }

    #[test]
    fn only_a_step_of_the_wall_clock_moves_the_clock() {
        let mut clock = Clock::read().unwrap();
        let before = clock;
        assert_eq!(clock.refresh(), Ok(false));
        assert_eq!(clock, before);
        clock.ahead += 2 * STEP_NANOSECONDS;
        assert_eq!(clock.refresh(), Ok(true));
        assert!((clock.ahead - before.ahead).abs() < STEP_NANOSECONDS);
    }

    #[test]
    fn boot_time_is_the_kernels() {
        let clock = Clock::read().unwrap();
        let before = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap();
        let now = clock.to_boot(Timestamp::now());
        let before = u64::try_from(before.tv_sec()).unwrap();
        assert!((before - 1..=before + 5).contains(&(now / 1_000_000_000)));
    }
}
