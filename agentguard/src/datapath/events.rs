//! Records on their way from the kernel: decoded, nothing joined yet.

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
    denied: RingBuf<MapData>,
    allowed: RingBuf<MapData>,
}

impl Rings {
    pub(super) const fn new(denied: RingBuf<MapData>, allowed: RingBuf<MapData>) -> Self {
        Self { denied, allowed }
    }

    /// Takes what is there, denials first, at most `limit` records. Returns how many were taken.
    pub fn drain(
        &mut self,
        limit: usize,
        mut take: impl FnMut(Result<KernelRecord, UnknownRecord>),
    ) -> usize {
        let mut taken = 0;
        for ring in [&mut self.denied, &mut self.allowed] {
            while taken < limit
                && let Some(item) = ring.next()
            {
                take(decode(&item));
                taken += 1;
            }
        }
        taken
    }

    /// Sleeps until a ring has something, or `timeout` is over.
    ///
    /// # Errors
    ///
    /// When the rings can not be watched.
    pub fn wait(&self, timeout: Duration) -> Result<(), Errno> {
        wait(&[self.denied.as_fd(), self.allowed.as_fd()], timeout)
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
