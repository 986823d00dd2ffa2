//! What is measured: loops of one operation each.
//!
//! Their one job is to do the operation many times and to say how long one took. They know
//! nothing of guards. The measured loop and the other side of its connections are pinned to
//! different processors, so that neither takes time from the other.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    process::Command,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::socket::{setsockopt, sockopt},
    unistd::Pid,
};

/// The port of both other sides.
pub(super) const PORT: u16 = 7007;

/// The destination that every loop but the cold one uses.
const WARM: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORT);

/// One operation, many times.
#[derive(Clone, Copy, Debug)]
pub(super) enum Loop {
    /// `connect` of a UDP socket to one destination, again and again.
    UdpConnectWarm,
    /// `connect` of a UDP socket to each destination of the allow-list in turn.
    UdpConnectCold,
    /// `send` on a connected UDP socket.
    ConnectedSend,
    /// `sendto` on a UDP socket that is not connected.
    UnconnectedSend,
    /// `connect` and `close` of a TCP connection, with the other side's `accept`.
    TcpCycle,
    /// A process that runs `/usr/bin/true`, from its start to its end.
    Exec,
}

impl Loop {
    pub(super) const ALL: &[Self] = &[
        Self::UdpConnectWarm,
        Self::UdpConnectCold,
        Self::ConnectedSend,
        Self::UnconnectedSend,
        Self::TcpCycle,
        Self::Exec,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::UdpConnectWarm => "UDP connect, warm",
            Self::UdpConnectCold => "UDP connect, cold",
            Self::ConnectedSend => "UDP send, connected",
            Self::UnconnectedSend => "UDP sendto",
            Self::TcpCycle => "TCP connect and close",
            Self::Exec => "exec",
        }
    }

    /// How many operations one run of the loop has.
    fn count(self, entries: u16) -> u32 {
        match self {
            Self::UdpConnectWarm => 40_000,
            Self::UdpConnectCold => 4 * u32::from(entries),
            Self::ConnectedSend | Self::UnconnectedSend => 20_000,
            Self::TcpCycle => 1_000,
            Self::Exec => 60,
        }
    }

    /// Runs the loop; gives nanoseconds for one operation.
    pub(super) fn run(self, entries: u16) -> Result<f64> {
        pin(0)?;
        let count = self.count(entries);
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let message = [0_u8; 64];
        let begin = match self {
            Self::UdpConnectWarm => {
                let begin = Instant::now();
                for _ in 0..count {
                    socket.connect(WARM)?;
                }
                begin
            }
            Self::UdpConnectCold => {
                let destinations: Vec<_> =
                    (0..entries).map(|index| SocketAddrV4::new(cold(index), PORT)).collect();
                let begin = Instant::now();
                for destination in destinations.iter().cycle().take(count as usize) {
                    socket.connect(destination)?;
                }
                begin
            }
            Self::ConnectedSend => {
                socket.connect(WARM)?;
                let begin = Instant::now();
                for _ in 0..count {
                    socket.send(&message)?;
                }
                begin
            }
            Self::UnconnectedSend => {
                let begin = Instant::now();
                for _ in 0..count {
                    socket.send_to(&message, WARM)?;
                }
                begin
            }
            Self::TcpCycle => {
                let begin = Instant::now();
                for _ in 0..count {
                    tcp_cycle()?;
                }
                begin
            }
            Self::Exec => {
                let begin = Instant::now();
                for _ in 0..count {
                    let status = Command::new("/usr/bin/true").status()?;
                    ensure!(status.success(), "/usr/bin/true: {status}");
                }
                begin
            }
        };
        Ok(begin.elapsed().as_secs_f64() * 1e9 / f64::from(count))
    }
}

/// The destination with this number, from 127.16.0.0 on: all of them are this machine.
pub(super) fn cold(index: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x7f10_0000 + u32::from(index))
}

/// The other side: takes datagrams, accepts connections, and ends when its input does.
pub(super) fn serve() -> Result<()> {
    pin(1)?;
    let datagrams = UdpSocket::bind(WARM)?;
    let connections = TcpListener::bind(WARM)?;
    thread::spawn(move || {
        let mut buffer = [0_u8; 2048];
        while datagrams.recv(&mut buffer).is_ok() {}
    });
    thread::spawn(move || {
        for connection in connections.incoming() {
            drop(connection);
        }
    });
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// One connection, closed with a reset: thousands of them would else use up the ports.
fn tcp_cycle() -> Result<()> {
    let connection = TcpStream::connect(WARM)?;
    setsockopt(&connection, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })
        .context("SO_LINGER")
}

/// Keeps this thread, and those it starts, on one processor; there may be only one.
fn pin(wanted: usize) -> Result<()> {
    let processors = thread::available_parallelism()?.get();
    let mut set = CpuSet::new();
    set.set(wanted % processors)?;
    sched_setaffinity(Pid::from_raw(0), &set).context("cannot be pinned to a processor")
}
