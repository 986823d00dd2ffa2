//! Records on their way from the kernel: decoded, nothing joined yet.

use std::mem::ManuallyDrop;
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use agentguard_common::event::{Event, PathEvent};
use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zerocopy::FromBytes as _;

/// A record of the kernel.
#[derive(Clone, Debug)]
pub enum KernelRecord {
    /// Of what needs no path.
    Request(Event),
    /// Of an exec, with the path as the caller named it, or of a unix socket, with its name.
    Path(Box<PathEvent>),
}

impl KernelRecord {
    /// What all records have.
    #[must_use]
    pub const fn event(&self) -> &Event {
        match self {
            Self::Request(event) => event,
            Self::Path(record) => &record.event,
        }
    }
}

/// Bytes in a ring that are no record of this ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record of {length} bytes is none of this version's; the kernel half is another build's")]
pub struct UnknownRecord {
    pub length: usize,
}

/// Reads a record; those with a path are known by their length.
///
/// # Errors
///
/// When the length fits no record.
pub fn decode(bytes: &[u8]) -> Result<KernelRecord, UnknownRecord> {
    let unknown = || UnknownRecord { length: bytes.len() };
    if bytes.len() == size_of::<Event>() {
        Event::read_from_bytes(bytes).map(KernelRecord::Request).map_err(|_size| unknown())
    } else if bytes.len() == size_of::<PathEvent>() {
        PathEvent::read_from_bytes(bytes)
            .map(|record| KernelRecord::Path(Box::new(record)))
            .map_err(|_size| unknown())
    } else {
        Err(unknown())
    }
}

/// Both rings of records; for one reader on a thread of its own.
pub struct Rings {
    denied: Ring,
    allowed: Ring,
}

/// A ring of records.
pub(super) struct Ring {
    records: RingBuf<MapData>,
    /// In bytes.
    capacity: u32,
    /// Bytes taken since so many were taken that it may have been full.
    taken: u32,
    may_have_been_full: bool,
}

impl Ring {
    /// A ring of `capacity` bytes.
    pub(super) const fn new(records: RingBuf<MapData>, capacity: u32) -> Self {
        Self { records, capacity, taken: 0, may_have_been_full: false }
    }

    /// Hands over the next record, if there is one, and takes it off unless `take` breaks off.
    fn next(
        &mut self,
        take: impl FnOnce(Result<KernelRecord, UnknownRecord>) -> ControlFlow<()>,
    ) -> Option<ControlFlow<()>> {
        // Dropped, it is consumed, also by a panic in between.
        let item = ManuallyDrop::new(self.records.next()?);
        let taken = take(decode(&item));
        if taken.is_continue() {
            self.taken += item.len() as u32;
            drop(ManuallyDrop::into_inner(item));
            if self.taken >= self.capacity / 2 {
                self.taken = 0;
                self.may_have_been_full = true;
            }
        }
        Some(taken)
    }
}

impl Rings {
    pub(super) const fn new(denied: Ring, allowed: Ring) -> Self {
        Self { denied, allowed }
    }

    /// Hands over what is there, denials first, at most `limit` records. A record leaves its ring once
    /// `take` is done with it: until then a reader that dies has taken nothing. At `Break` it stays, and
    /// so does what comes after it. Returns how many were taken.
    pub fn drain(
        &mut self,
        limit: usize,
        mut take: impl FnMut(Result<KernelRecord, UnknownRecord>) -> ControlFlow<()>,
    ) -> usize {
        let mut taken = 0;
        for ring in [&mut self.denied, &mut self.allowed] {
            while taken < limit {
                match ring.next(&mut take) {
                    None => break,
                    Some(ControlFlow::Break(())) => return taken,
                    Some(ControlFlow::Continue(())) => taken += 1,
                }
            }
        }
        taken
    }

    /// Takes the next record off each ring where `is_told` knows it: what a reader that died was done with
    /// and had not taken off yet, of which there is one at the most.
    pub fn pass_over(&mut self, mut is_told: impl FnMut(&KernelRecord) -> bool) {
        for ring in [&mut self.denied, &mut self.allowed] {
            let _left = ring.next(|record| match record {
                Ok(record) if is_told(&record) => ControlFlow::Continue(()),
                Ok(_) | Err(UnknownRecord { .. }) => ControlFlow::Break(()),
            });
        }
    }

    /// Whether a ring may have been full since this was last asked, so that the kernel half may have lost
    /// records: a loss is followed by half a ring of records at least.
    pub fn may_have_lost(&mut self) -> bool {
        [&mut self.denied, &mut self.allowed]
            .map(|ring| std::mem::take(&mut ring.may_have_been_full))
            .contains(&true)
    }

    /// Sleeps until a ring has something, or `timeout` is over.
    ///
    /// # Errors
    ///
    /// When the rings can not be watched.
    pub fn wait(&self, timeout: Duration) -> Result<(), Errno> {
        wait(&[self.denied.records.as_fd(), self.allowed.records.as_fd()], timeout)
    }
}

fn wait(descriptors: &[BorrowedFd<'_>], timeout: Duration) -> Result<(), Errno> {
    let mut watched: Vec<PollFd<'_>> =
        descriptors.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    match poll(&mut watched, timeout) {
        Ok(_ready) => Ok(()),
        Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// What the programs say of themselves, off unless the settings turn it on.
pub struct Diagnostics(EbpfLogger<&'static dyn log::Log>);

impl Diagnostics {
    pub(super) fn of(ebpf: &mut Ebpf) -> Option<Self> {
        Self::read(EbpfLogger::init(ebpf))
    }

    pub(super) fn adopt(program: u32) -> Option<Self> {
        Self::read(EbpfLogger::init_from_id(program))
    }

    fn read(logger: Result<EbpfLogger<&'static dyn log::Log>, aya_log::Error>) -> Option<Self> {
        match logger {
            Ok(logger) => Some(Self(logger)),
            Err(error) => {
                tracing::debug!(%error, "the datapath's own diagnostics can not be read");
                None
            }
        }
    }

    /// Hands the programs' lines to the daemon's log, those of the next `timeout` included.
    ///
    /// # Errors
    ///
    /// When the ring can not be watched.
    pub fn pump(&mut self, timeout: Duration) -> Result<(), Errno> {
        wait(&[self.0.as_fd()], timeout)?;
        self.0.flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use agentguard_common::event::PATH_BYTES;
    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn records_are_told_apart_by_their_length() {
        assert!(matches!(decode(&[0; size_of::<Event>()]), Ok(KernelRecord::Request(_))));
        let mut bytes = vec![0; size_of::<PathEvent>()];
        bytes[size_of::<Event>()..][..5].copy_from_slice(b"\0tool");
        let Ok(KernelRecord::Path(record)) = decode(&bytes) else { panic!("not a path") };
        assert_eq!(record.path[..6], *b"\0tool\0");
        assert_eq!(record.path.len(), PATH_BYTES);
        assert_eq!(record.event.name_length, Event::new_zeroed().name_length);
        for length in [0, size_of::<Event>() - 1, size_of::<PathEvent>() + 1] {
            assert_eq!(decode(&vec![0; length]).unwrap_err(), UnknownRecord { length });
        }
    }
}
