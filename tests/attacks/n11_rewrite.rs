//! N11: between the check and the use, another thread rewrites the address.

use std::{
    io, mem,
    net::{SocketAddr, SocketAddrV4},
    os::fd::AsRawFd,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use socket2::Socket;

use crate::{
    n3_datagram::dissolve,
    outcome::{Attempt, Failure},
    sockets::{Protocol, converse, patience},
};

/// How long a busy machine may take until both threads run and a call meets the other's address.
const BEGIN: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    granted: SocketAddrV4,
    #[arg(long)]
    forbidden: SocketAddrV4,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// `connect` of a datagram socket, again and again.
    Connect,
    /// `connect` of stream sockets.
    TcpConnect,
    Sendto,
}

/// A `sockaddr_in` of which family, port and address change in one store.
#[repr(C)]
struct Shared {
    first: AtomicU64,
    _padding: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let shared = Shared { first: AtomicU64::new(first(arguments.granted)), _padding: 0 };
    let over = AtomicBool::new(false);
    let rewritten = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let values = [arguments.forbidden, arguments.granted].map(first);
            for turn in 0_u64.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                shared.first.store(values[usize::from(turn % 2 == 1)], Ordering::Relaxed);
                rewritten.store(turn, Ordering::Relaxed);
                // Long enough for a call to begin, so that both values are met as often.
                for _ in 0..50 {
                    std::hint::spin_loop();
                }
            }
        });
        let attempt = began(&rewritten).and_then(|()| race(arguments, &shared));
        over.store(true, Ordering::Relaxed);
        attempt
    })
}

/// Waits for the other thread, which a busy machine may start late.
fn began(rewritten: &AtomicU64) -> Result<(), Failure> {
    let start = Instant::now();
    while rewritten.load(Ordering::Relaxed) < 2 {
        if start.elapsed() > BEGIN {
            return Err(Failure::unfit("the rewriting thread did not start"));
        }
        thread::yield_now();
    }
    Ok(())
}

fn race(arguments: &Arguments, shared: &Shared) -> Attempt {
    let granted = SocketAddr::V4(arguments.granted);
    let forbidden = SocketAddr::V4(arguments.forbidden);
    let datagram = Protocol::Udp.socket(granted)?;
    datagram.set_nonblocking(true).map_err(|error| Failure::setup("setsockopt", error))?;
    let start = Instant::now();
    let mut rounds = 0_u64;
    let mut refused = 0_u64;
    let mut first_refused = None;
    // Once it is refused, as long as it takes to see that it always is.
    while first_refused
        .map_or_else(|| start.elapsed() < BEGIN, |at: Instant| at.elapsed() < patience())
    {
        rounds += 1;
        // Where there is one CPU only, the other thread gets its turn between two calls.
        thread::yield_now();
        let (socket, result) = match arguments.how {
            How::Connect => {
                dissolve(&datagram)?;
                let result = connect(&datagram, shared);
                (datagram.try_clone(), result)
            }
            How::TcpConnect => {
                let socket = Protocol::Tcp.socket(granted)?;
                let result = connect(&socket, shared);
                (Ok(socket), result)
            }
            How::Sendto => (datagram.try_clone(), send(&datagram, shared)),
        };
        match result {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                refused += 1;
                first_refused.get_or_insert_with(Instant::now);
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(Failure::at("the racing call", error)),
        }
        let socket = socket.map_err(|error| Failure::setup("dup", error))?;
        let proof = match arguments.how {
            How::Sendto => heard_from(&datagram, forbidden),
            How::Connect | How::TcpConnect if peer(&socket) != Some(forbidden) => None,
            How::Connect => {
                socket.set_nonblocking(false).map_err(|error| Failure::setup("fcntl", error))?;
                Some(converse(Protocol::Udp, socket)?)
            }
            How::TcpConnect => Some(converse(Protocol::Tcp, socket)?),
        };
        if let Some(proof) = proof {
            return Ok(format!("after {rounds} rounds, {refused} of them refused: {proof}"));
        }
    }
    if refused == 0 {
        return Err(Failure::unfit(format!("no race in {rounds} rounds")));
    }
    Err(Failure {
        kind: crate::outcome::Kind::Refused,
        errno: Some(libc::EPERM),
        detail: format!("{refused} of {rounds} rounds refused, the forbidden peer never reached"),
    })
}

/// Whether one of the answers that lie ready comes from `forbidden`.
fn heard_from(socket: &Socket, forbidden: SocketAddr) -> Option<String> {
    let mut buffer = [mem::MaybeUninit::uninit(); 512];
    for _ in 0..64 {
        let (_, from) = socket.recv_from(&mut buffer).ok()?;
        if from.as_socket() == Some(forbidden) {
            return Some(format!("an answer from {forbidden}"));
        }
    }
    None
}

fn peer(socket: &Socket) -> Option<SocketAddr> {
    socket.peer_addr().ok().and_then(|address| address.as_socket())
}

fn connect(socket: &Socket, shared: &Shared) -> io::Result<()> {
    // SAFETY: the 16 bytes outlive the call; the kernel copies them, and that another thread
    // changes them meanwhile is the point.
    let result = unsafe { libc::connect(socket.as_raw_fd(), shared.address(), LENGTH) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn send(socket: &Socket, shared: &Shared) -> io::Result<()> {
    let text = b"race";
    // SAFETY: as above; the text outlives the call too.
    let result = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            text.as_ptr().cast(),
            text.len(),
            0,
            shared.address(),
            LENGTH,
        )
    };
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_in>() as libc::socklen_t;

impl Shared {
    fn address(&self) -> *const libc::sockaddr {
        const { assert!(size_of::<Self>() == size_of::<libc::sockaddr_in>()) };
        (&raw const *self).cast()
    }
}

/// The first eight bytes of a `sockaddr_in`.
fn first(address: SocketAddrV4) -> u64 {
    let [a, b, c, d] = address.ip().octets();
    let [port_high, port_low] = address.port().to_be_bytes();
    let [family_first, family_second] = (libc::AF_INET as u16).to_ne_bytes();
    u64::from_ne_bytes([family_first, family_second, port_high, port_low, a, b, c, d])
}
