//! Records on their way from the kernel: decoded, nothing joined yet.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};

use agentguard_common::event::{Event, ExecEvent};
use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;
use zerocopy::FromBytes as _;

/// A record of the kernel.
#[derive(Clone, Copy, Debug)]
pub enum KernelRecord {
    /// Of anything but an exec.
    Request(Event),
    /// Of an exec, with the path as the caller named it.
    Exec(Box<ExecEvent>),
}

impl KernelRecord {
    /// What all records have.
    #[must_use]
    pub const fn event(&self) -> &Event {
        match self {
            Self::Request(event) => event,
            Self::Exec(exec) => &exec.event,
        }
    }
}

/// Bytes in a ring that are no record of this ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record of {length} bytes is none of this version's; the kernel half is another build's")]
pub struct UnknownRecord {
    pub length: usize,
}

/// Reads a record; exec records are known by their length.
///
/// # Errors
///
/// When the length fits no record.
pub fn decode(bytes: &[u8]) -> Result<KernelRecord, UnknownRecord> {
    let unknown = || UnknownRecord { length: bytes.len() };
    if bytes.len() == size_of::<Event>() {
        Event::read_from_bytes(bytes).map(KernelRecord::Request).map_err(|_size| unknown())
    } else if bytes.len() == size_of::<ExecEvent>() {
        ExecEvent::read_from_bytes(bytes)
            .map(|exec| KernelRecord::Exec(Box::new(exec)))
            .map_err(|_size| unknown())
    } else {
        Err(unknown())
    }
}

/// Both rings of records.
pub struct Rings {
    denied: RingBuf<MapData>,
    allowed: RingBuf<MapData>,
    denied_ready: AsyncRing,
    allowed_ready: AsyncRing,
}

/// A ring's descriptor, registered with the runtime when it is first waited for.
struct AsyncRing(Option<AsyncFd<RawFd>>);

impl Rings {
    pub(super) const fn new(denied: RingBuf<MapData>, allowed: RingBuf<MapData>) -> Self {
        Self { denied, allowed, denied_ready: AsyncRing(None), allowed_ready: AsyncRing(None) }
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

    /// Waits until a ring has something.
    ///
    /// # Errors
    ///
    /// When the runtime can not watch a ring.
    pub async fn ready(&mut self) -> io::Result<()> {
        let denied = self.denied_ready.wait(self.denied.as_raw_fd());
        let allowed = self.allowed_ready.wait(self.allowed.as_raw_fd());
        tokio::select! {
            ready = denied => ready,
            ready = allowed => ready,
        }
    }
}

impl AsyncRing {
    async fn wait(&mut self, descriptor: RawFd) -> io::Result<()> {
        let ring = match &mut self.0 {
            Some(ring) => ring,
            empty => empty.insert(AsyncFd::new(descriptor)?),
        };
        ring.readable().await?.clear_ready();
        Ok(())
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

    /// Hands the programs' lines to the daemon's log until the daemon ends.
    ///
    /// # Errors
    ///
    /// When the runtime can not watch the ring.
    pub async fn run(mut self) -> io::Result<()> {
        let ring = AsyncFd::new(self.0.as_raw_fd())?;
        loop {
            ring.readable().await?.clear_ready();
            self.0.flush();
        }
    }
}
