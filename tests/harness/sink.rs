//! Servers that take everything and answer nothing, for as much traffic as there is.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::{
        fd::AsFd,
        unix::net::{SocketAddr as UnixAddress, UnixDatagram, UnixListener},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Network;

/// How often the thread looks whether it shall end, in milliseconds.
const TICK: u16 = 20;

/// A port of loopback on the client side, TCP and UDP.
#[derive(Debug)]
pub struct Sink {
    address: SocketAddr,
    // Nobody reads it: what does not fit is dropped, and the sender does not notice.
    _datagrams: UdpSocket,
    _taker: Taker,
}

impl Sink {
    /// Opens one on the client side of a network.
    ///
    /// # Panics
    ///
    /// When loopback is down there.
    #[must_use]
    pub fn open(network: &Network) -> Self {
        Self::open_on(network, Ipv4Addr::LOCALHOST.into())
    }

    /// Opens one on an address of the client side.
    ///
    /// # Panics
    ///
    /// When there is no such address.
    #[must_use]
    pub fn open_on(network: &Network, address: IpAddr) -> Self {
        let (listener, datagrams) = network.on_the_client_side(move || {
            let listener = TcpListener::bind((address, 0))?;
            let datagrams = UdpSocket::bind(listener.local_addr()?)?;
            listener.set_nonblocking(true)?;
            Ok::<_, io::Error>((listener, datagrams))
        });
        let address = listener.local_addr().expect("it is bound");
        let taker = Taker::start(listener, |listener| listener.accept().is_ok());
        Self { address, _datagrams: datagrams, _taker: taker }
    }

    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

/// A stream socket and a datagram socket of the client side that are no network's.
#[derive(Debug)]
pub struct UnixSink {
    _streams: Taker,
    _datagrams: Taker,
}

impl UnixSink {
    /// Opens one; abstract names are those of the client side.
    ///
    /// # Panics
    ///
    /// When a name is taken.
    #[must_use]
    pub fn open(network: &Network, streams: UnixAddress, datagrams: UnixAddress) -> Self {
        let (listener, socket) = network.on_the_client_side(move || {
            let listener = UnixListener::bind_addr(&streams)?;
            let socket = UnixDatagram::bind_addr(&datagrams)?;
            listener.set_nonblocking(true)?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>((listener, socket))
        });
        Self {
            _streams: Taker::start(listener, |listener| listener.accept().is_ok()),
            _datagrams: Taker::start(socket, |socket| socket.recv(&mut [0; 64]).is_ok()),
        }
    }
}

/// A thread that takes what comes to a socket; dropped, it ends.
#[derive(Debug)]
struct Taker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Taker {
    /// `take` takes one thing, and says whether there was one.
    fn start<S: AsFd + Send + 'static>(socket: S, take: fn(&S) -> bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    let mut watched = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                    let _ready = poll(&mut watched, PollTimeout::from(TICK));
                    while take(&socket) {}
                }
            })
        };
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it does not panic");
        }
    }
}
