//! Small real servers: they send back what they are sent, and remember who was reached.
//!
//! One thread serves all of them; it is the only one that enters the network namespace.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
};
use socket2::{Domain, Socket, Type};

/// How often the thread looks whether it shall end, in milliseconds.
const TICK: u16 = 20;

/// Which transport was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// The word the attacks use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// How far others got to one address and port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Accepted connections; zero for UDP.
    pub connections: u64,
    /// Bytes that arrived.
    pub bytes: u64,
}

type Reached = Arc<Mutex<BTreeMap<(Protocol, SocketAddr), Reach>>>;

/// Packets that came in, by the address that their header names.
type Arrived = Arc<Mutex<BTreeMap<IpAddr, u64>>>;

/// Servers on every pair of an address and a port, for TCP and UDP.
#[derive(Debug)]
pub struct Servers {
    namespace: PathBuf,
    reached: Reached,
    arrived: Arrived,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    /// Starts them in a network namespace.
    ///
    /// # Panics
    ///
    /// When one of the addresses cannot be served.
    #[must_use]
    pub fn start(namespace: &Path, addresses: &[IpAddr], ports: &[u16]) -> Self {
        let reached = Reached::default();
        let over = Arc::new(AtomicBool::new(false));
        let endpoints: Vec<SocketAddr> = addresses
            .iter()
            .flat_map(|address| ports.iter().map(|port| SocketAddr::new(*address, *port)))
            .collect();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::spawn({
            let (namespace, reached, over) =
                (namespace.to_owned(), Arc::clone(&reached), Arc::clone(&over));
            move || {
                let sockets = enter(&namespace).and_then(|()| Sockets::open(&endpoints));
                match sockets {
                    Ok(mut sockets) => {
                        ready.send(Ok(())).expect("the starter waits");
                        while !over.load(Ordering::Relaxed) {
                            sockets.serve(&reached);
                        }
                    }
                    Err(error) => ready.send(Err(error)).expect("the starter waits"),
                }
            }
        });
        is_ready
            .recv()
            .expect("the thread says whether it is ready")
            .unwrap_or_else(|error| panic!("servers in {}: {error}", namespace.display()));
        let arrived = Arrived::default();
        Self { namespace: namespace.to_owned(), reached, arrived, over, threads: vec![thread] }
    }

    /// How far others got to `endpoint`.
    #[must_use]
    pub fn reach(&self, protocol: Protocol, endpoint: SocketAddr) -> Reach {
        lock(&self.reached).get(&(protocol, endpoint)).copied().unwrap_or_default()
    }

    /// Counts every packet that comes in from now on, whatever becomes of it.
    ///
    /// # Panics
    ///
    /// When packets cannot be watched.
    pub fn watch(&mut self) {
        let namespace = self.namespace.clone();
        let watches = thread::spawn(move || enter(&namespace).and_then(|()| watches()))
            .join()
            .expect("the thread does not panic")
            .expect("packets can be watched");
        let (arrived, over) = (Arc::clone(&self.arrived), Arc::clone(&self.over));
        self.threads.push(thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                count(&watches, &arrived);
            }
        }));
    }

    /// How many packets for `address` came in since [`Self::watch`].
    #[must_use]
    pub fn arrived(&self, address: IpAddr) -> u64 {
        let arrived = self.arrived.lock().expect("nobody panics while counting");
        arrived.get(&address).copied().unwrap_or_default()
    }

    /// Has `from` call `to`, as soon as someone listens there, and send back what it hears. What
    /// it hears counts as having reached `from`.
    pub fn call(&mut self, from: SocketAddr, to: SocketAddr) {
        let (namespace, reached, over) =
            (self.namespace.clone(), Arc::clone(&self.reached), Arc::clone(&self.over));
        self.threads.push(thread::spawn(move || {
            // Without a call the attack waits in vain, and the test sees that.
            if let Err(error) = enter(&namespace).and_then(|()| answer(from, to, &reached, &over)) {
                eprintln!("the call from {from} to {to}: {error}");
            }
        }));
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a server panicked");
            }
        }
    }
}

/// Lets the calling thread live in another network namespace.
pub(crate) fn enter(namespace: &Path) -> io::Result<()> {
    Ok(setns(File::open(namespace)?, CloneFlags::CLONE_NEWNET)?)
}

/// Lets every listener take data with the first packet, with and without a cookie, and every
/// client send it. For the network namespace of the calling thread.
pub(crate) fn allow_fast_open() -> io::Result<()> {
    // Bits: client, server, client without cookie, server without cookie, all listeners.
    fs::write("/proc/sys/net/ipv4/tcp_fastopen", (0x1 | 0x2 | 0x4 | 0x200 | 0x400).to_string())
}

/// Lets hosts of the calling thread's network namespace hand on what is routed by its sender.
pub(crate) fn allow_source_routes() -> io::Result<()> {
    for link in ["all", "default", "lo", "far"] {
        fs::write(format!("/proc/sys/net/ipv4/conf/{link}/accept_source_route"), "1")?;
        fs::write(format!("/proc/sys/net/ipv6/conf/{link}/seg6_enabled"), "1")?;
        fs::write(format!("/proc/sys/net/ipv6/conf/{link}/forwarding"), "1")?;
    }
    Ok(())
}

/// Lets everyone in the calling thread's network namespace have ping sockets.
pub(crate) fn allow_ping() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
}

/// Leaves the kernel one port to choose.
pub(crate) fn choose_port(port: u16) -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", format!("{port} {port}"))
}

/// Lets the calling thread's network namespace hand packets on, and answer for what lies behind it.
pub(crate) fn allow_forwarding() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    fs::write("/proc/sys/net/ipv4/conf/near/proxy_arp", "1")
}

/// One packet socket for each family: they see what comes in and not what goes out, which those
/// for all families would.
fn watches() -> io::Result<[(Socket, u16); 2]> {
    let watch = |family: i32| {
        let family = family as u16;
        let protocol = socket2::Protocol::from(i32::from(family.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
        socket.set_nonblocking(true)?;
        Ok::<_, io::Error>((socket, family))
    };
    Ok([watch(libc::ETH_P_IP)?, watch(libc::ETH_P_IPV6)?])
}

/// Waits a little, then counts what is there.
fn count(watches: &[(Socket, u16); 2], arrived: &Arrived) {
    let mut watched =
        watches.each_ref().map(|(socket, _)| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
    // An interrupted wait is an empty round.
    let _ready = poll(&mut watched, PollTimeout::from(TICK));
    let mut header = [0; 40];
    for (mut socket, family) in watches.iter().map(|(socket, family)| (socket, family)) {
        while let Ok(length) = socket.read(&mut header) {
            let address = destination(i32::from(*family), &header[..length]);
            if let Some(address) = address {
                *arrived
                    .lock()
                    .expect("nobody panics while counting")
                    .entry(address)
                    .or_default() += 1;
            }
        }
    }
}

/// The address that a header names; none in a header that is cut short.
fn destination(family: i32, header: &[u8]) -> Option<IpAddr> {
    if family == libc::ETH_P_IP {
        let address: [u8; 4] = header.get(16..20)?.try_into().ok()?;
        Some(IpAddr::from(address))
    } else {
        let address: [u8; 16] = header.get(24..40)?.try_into().ok()?;
        Some(IpAddr::from(address))
    }
}

struct Sockets {
    listeners: Vec<(TcpListener, SocketAddr)>,
    datagrams: Vec<(UdpSocket, SocketAddr)>,
    streams: Vec<(TcpStream, SocketAddr)>,
}

impl Sockets {
    fn open(endpoints: &[SocketAddr]) -> io::Result<Self> {
        let mut sockets = Self { listeners: vec![], datagrams: vec![], streams: vec![] };
        for endpoint in endpoints {
            let name =
                |error: io::Error| io::Error::new(error.kind(), format!("{endpoint}: {error}"));
            let listener = TcpListener::bind(endpoint).map_err(name)?;
            listener.set_nonblocking(true)?;
            sockets.listeners.push((listener, *endpoint));
            let datagram = UdpSocket::bind(endpoint).map_err(name)?;
            datagram.set_nonblocking(true)?;
            sockets.datagrams.push((datagram, *endpoint));
        }
        Ok(sockets)
    }

    /// One round: waits a little, then serves whoever is there.
    fn serve(&mut self, reached: &Reached) {
        let ready: Vec<bool> = {
            let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut watched: Vec<PollFd<'_>> = self
                .listeners
                .iter()
                .map(|(socket, _)| watch(socket.as_fd()))
                .chain(self.datagrams.iter().map(|(socket, _)| watch(socket.as_fd())))
                .chain(self.streams.iter().map(|(socket, _)| watch(socket.as_fd())))
                .collect();
            // An interrupted wait is an empty round.
            if poll(&mut watched, PollTimeout::from(TICK)).unwrap_or(0) == 0 {
                return;
            }
            watched.iter().map(|watched| watched.any().unwrap_or(true)).collect()
        };
        let (listeners, rest) = ready.split_at(self.listeners.len());
        let (datagrams, streams) = rest.split_at(self.datagrams.len());

        let mut is_ready = streams.iter();
        self.streams.retain_mut(|(stream, endpoint)| {
            is_ready.next() != Some(&true) || echo(stream, Protocol::Tcp, *endpoint, reached)
        });
        for ((socket, endpoint), _) in self.datagrams.iter().zip(datagrams).filter(|(_, is)| **is) {
            send_back(socket, *endpoint, reached);
        }
        for ((listener, endpoint), _) in self.listeners.iter().zip(listeners).filter(|(_, is)| **is)
        {
            while let Ok((stream, _)) = listener.accept() {
                entry(reached, Protocol::Tcp, *endpoint, |reach| reach.connections += 1);
                if stream.set_nonblocking(true).is_ok() {
                    self.streams.push((stream, *endpoint));
                }
            }
        }
    }
}

/// Sends back what lies ready; whether the stream stays open.
fn echo(stream: &mut TcpStream, protocol: Protocol, at: SocketAddr, reached: &Reached) -> bool {
    let mut buffer = [0; 4096];
    match stream.read(&mut buffer) {
        Ok(0) => false,
        Ok(length) => {
            entry(reached, protocol, at, |reach| reach.bytes += length as u64);
            // Attacks send little, so it fits; one that does not read has itself to blame.
            stream.write(&buffer[..length]).is_ok()
        }
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

fn send_back(socket: &UdpSocket, at: SocketAddr, reached: &Reached) {
    let mut buffer = [0; 4096];
    // Bounded, so that a flood of one does not keep the others waiting.
    for _ in 0..256 {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                entry(reached, Protocol::Udp, at, |reach| reach.bytes += length as u64);
                // A datagram may get lost; the attack waits for its answer in vain then.
                let _lost = socket.send_to(&buffer[..length], from);
            }
            // Empty, or the echo of an earlier answer that nobody took.
            Err(_) => return,
        }
    }
}

/// One call from inside the network.
fn answer(
    from: SocketAddr,
    to: SocketAddr,
    reached: &Reached,
    over: &AtomicBool,
) -> io::Result<()> {
    // The attack begins once its guard is ready.
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut stream = loop {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        // The attempt before may hold the address for a moment.
        let called = socket
            .bind(&from.into())
            .and_then(|()| socket.connect_timeout(&to.into(), Duration::from_millis(200)));
        match called {
            Ok(()) => break TcpStream::from(socket),
            Err(error) if over.load(Ordering::Relaxed) || Instant::now() > deadline => {
                return Err(error);
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    while !over.load(Ordering::Relaxed) && echo(&mut stream, Protocol::Tcp, from, reached) {}
    Ok(())
}

fn entry(reached: &Reached, protocol: Protocol, at: SocketAddr, change: impl FnOnce(&mut Reach)) {
    change(lock(reached).entry((protocol, at)).or_default());
}

fn lock(reached: &Reached) -> MutexGuard<'_, BTreeMap<(Protocol, SocketAddr), Reach>> {
    reached.lock().expect("nobody panics while counting")
}
