//! A server that takes everything and answers nothing, for as much traffic as there is.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsFd as _,
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
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    /// Opens one on the client side of a network.
    ///
    /// # Panics
    ///
    /// When loopback is down there.
    #[must_use]
    pub fn open(network: &Network) -> Self {
        let (listener, datagrams) = network.on_the_client_side(|| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let datagrams = UdpSocket::bind(listener.local_addr()?)?;
            listener.set_nonblocking(true)?;
            Ok::<_, io::Error>((listener, datagrams))
        });
        let address = listener.local_addr().expect("it is bound");
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || accept(&listener, &stop))
        };
        Self { address, _datagrams: datagrams, stop, thread: Some(thread) }
    }

    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

fn accept(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        let mut watched = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let _ready = poll(&mut watched, PollTimeout::from(TICK));
        while listener.accept().is_ok() {}
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it does not panic");
        }
    }
}
