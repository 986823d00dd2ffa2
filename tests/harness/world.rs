//! A network of its own: a client side, in which workloads run, and a server side.
//!
//! The two are joined by one link, and no route leads anywhere else.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use tempfile::TempDir;

use crate::{
    Programs, attack_binary,
    cgroup::{self, Cgroup},
    containerd, docker, mounts,
    server::{self, Protocol, Servers},
    unique,
};

const NAMESPACES: &str = "/run/netns";
/// Where guards keep what outlives them.
pub(crate) const PINS: &str = "/sys/fs/bpf";

/// The addresses of the server side, and what they stand for.
pub mod address {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    /// The client's own.
    pub const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    /// An API that scopes grant.
    pub const API: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10));
    pub const API6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10));
    /// A database that no scope grants.
    pub const DATABASE: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20));
    pub const DATABASE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, 0, 0x20));
    /// The database by the well-known prefix of NAT64.
    pub const DATABASE_NAT64: IpAddr =
        IpAddr::V6(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0xc633, 0x6414));
    /// The database's 6to4 network.
    pub const DATABASE_6TO4: IpAddr =
        IpAddr::V6(Ipv6Addr::new(0x2002, 0xc633, 0x6414, 0, 0, 0, 0, 1));
    /// The database as an IPv4-compatible address.
    pub const DATABASE_COMPATIBLE: IpAddr =
        IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0xc633, 0x6414));
    /// The cloud's metadata service.
    pub const METADATA: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
    pub const METADATA6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254));

    /// All of the server side.
    pub const SERVERS: [IpAddr; 9] = [
        API,
        API6,
        DATABASE,
        DATABASE6,
        DATABASE_NAT64,
        DATABASE_6TO4,
        DATABASE_COMPATIBLE,
        METADATA,
        METADATA6,
    ];
    pub const CLIENT6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
    /// The client side itself: where `0.0.0.0` and `::` lead to, and the addresses of the node.
    pub const NODE: [IpAddr; 4] =
        [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST), CLIENT, CLIENT6];
    /// The port that scopes grant.
    pub const GRANTED_PORT: u16 = 443;
    /// A port that no scope grants.
    pub const OTHER_PORT: u16 = 5432;
    /// Served on every address.
    pub const PORTS: [u16; 2] = [GRANTED_PORT, OTHER_PORT];
}

/// Two network namespaces and the link between them.
#[derive(Debug)]
pub struct Network {
    client: String,
    server: String,
}

/// A network with its servers, cgroups and a directory, all of one test.
#[derive(Debug)]
pub struct World {
    // Dropped in this order: the servers hold the namespaces open.
    servers: Servers,
    local_servers: Servers,
    network: Network,
    cgroup: Cgroup,
    directory: TempDir,
    name: String,
}

impl World {
    /// Sets it up, after what killed runs left behind is gone.
    ///
    /// # Panics
    ///
    /// When a step fails; all of them need root.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a default does not make namespaces")]
    pub fn new() -> Self {
        remove_stale();
        let name = unique::name();
        let directory = tempfile::Builder::new()
            .prefix(&format!("{name}-"))
            .tempdir()
            .expect("a temporary directory");
        let network = Network::new(&name);
        let cgroup = Cgroup::new(&name);
        let servers = Servers::start(&network.server_file(), &address::SERVERS, &address::PORTS);
        let local_servers = Servers::start(&network.client_file(), &address::NODE, &address::PORTS);
        Self { servers, local_servers, network, cgroup, directory, name }
    }

    /// A name no other test uses.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The servers of the server side.
    #[must_use]
    pub const fn servers(&self) -> &Servers {
        &self.servers
    }

    /// The servers of the server side, to have one of them call.
    pub const fn servers_mut(&mut self) -> &mut Servers {
        &mut self.servers
    }

    /// The servers on the client side's own loopback.
    #[must_use]
    pub const fn local_servers(&self) -> &Servers {
        &self.local_servers
    }

    /// A directory of this test.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Programs of this test: one to be granted, one to be forbidden.
    #[must_use]
    pub fn programs(&self) -> Programs {
        Programs::new(self.directory())
    }

    /// A cgroup of this test.
    #[must_use]
    pub const fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The network of this test.
    #[must_use]
    pub const fn network(&self) -> &Network {
        &self.network
    }

    /// A command that runs on the client side, in the tests' own cgroup.
    #[must_use]
    pub fn enter(&self) -> Command {
        let mut command = Command::new(attack_binary());
        command.arg("enter").arg("--network").arg(self.network.client_file());
        command.stdin(Stdio::null());
        command
    }

    /// The same command, on the client side.
    #[must_use]
    pub fn inside(&self, command: &Command) -> Command {
        let mut enter = self.enter();
        enter.arg("--").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => enter.env(name, value),
                None => enter.env_remove(name),
            };
        }
        enter
    }
}

impl Network {
    fn new(name: &str) -> Self {
        let network = Self { client: format!("{name}-c"), server: format!("{name}-s") };
        let Self { client, server } = &network;
        ip(
            &[],
            &format!(
                "netns add {client}\n\
                 netns add {server}\n\
                 link add near netns {client} type veth peer name far netns {server}\n"
            ),
        );

        let mut far = "link set lo up\nlink set far up\n".to_owned();
        let mut near = "link set lo up\nlink set near up\n\
                        addr add 192.0.2.1/24 dev near\n\
                        addr add 2001:db8::1/64 dev near nodad\n"
            .to_owned();
        for server in address::SERVERS {
            let (length, nodad, via) = match server {
                IpAddr::V4(_) => (32, "", address::API),
                IpAddr::V6(_) => (128, "nodad", address::API6),
            };
            // The two APIs are on the link; all else lies behind them.
            let length = if server == address::API {
                24
            } else if server == address::API6 {
                64
            } else {
                writeln!(near, "route add {server}/{length} via {via}").expect("a string grows");
                length
            };
            writeln!(far, "addr add {server}/{length} dev far {nodad}").expect("a string grows");
        }
        ip(&["-n", server], &far);
        ip(&["-n", client], &near);

        for file in [network.client_file(), network.server_file()] {
            in_namespace(file, server::allow_fast_open).expect("TCP Fast Open can be allowed");
        }
        network
    }

    /// Has the server side hand on what is routed by its sender.
    ///
    /// # Panics
    ///
    /// When the kernel knows no source routes.
    pub fn allow_source_routes(&self) {
        in_namespace(self.server_file(), server::allow_source_routes)
            .expect("source routes can be allowed");
    }

    /// Lets everyone on the client side have ping sockets.
    ///
    /// # Panics
    ///
    /// When the kernel knows none.
    pub fn allow_ping(&self) {
        in_namespace(self.client_file(), server::allow_ping).expect("ping sockets can be allowed");
    }

    /// Leaves the kernel no choice when it chooses a port for a socket of the client side.
    ///
    /// # Panics
    ///
    /// When that cannot be set.
    pub fn choose_port(&self, port: u16) {
        in_namespace(self.client_file(), move || server::choose_port(port))
            .expect("the range of ports can be set");
    }

    /// Lets the client side hand packets on.
    ///
    /// # Panics
    ///
    /// When that cannot be set.
    pub fn allow_forwarding(&self) {
        in_namespace(self.client_file(), server::allow_forwarding)
            .expect("forwarding can be allowed");
    }

    /// Lets the client side hand on what pods of this network send to the server side, and back.
    ///
    /// # Panics
    ///
    /// When that cannot be set.
    pub fn lead_to_pods(&self, network: &str) {
        self.allow_forwarding();
        let near = address::CLIENT;
        ip(&["-n", &self.server], &format!("route add {network} via {near}\n"));
    }

    /// Has the server side offer `address` to whoever comes by multipath TCP, and the client side
    /// take such offers.
    ///
    /// # Panics
    ///
    /// When the kernel knows no multipath TCP.
    pub fn offer_another_path(&self, address: IpAddr) {
        let limits = "mptcp limits set subflow 2 add_addr_accepted 2\n";
        ip(&["-n", &self.client], limits);
        ip(
            &["-n", &self.server],
            &format!("{limits}mptcp endpoint add {address} dev far signal\n"),
        );
    }

    /// A socket of the client side, made outside every workload and connected to `peer`.
    ///
    /// # Panics
    ///
    /// When `peer` is not there.
    #[must_use]
    pub fn connect(&self, protocol: Protocol, peer: SocketAddr) -> OwnedFd {
        self.on_the_client_side(move || match protocol {
            Protocol::Tcp => {
                TcpStream::connect_timeout(&peer, Duration::from_secs(2)).map(OwnedFd::from)
            }
            Protocol::Udp => UdpSocket::bind((address::CLIENT, 0))
                .and_then(|socket| socket.connect(peer).map(|()| socket.into())),
        })
    }

    /// A listening socket of the client side, made outside every workload.
    ///
    /// # Panics
    ///
    /// When `here` is taken.
    #[must_use]
    pub fn listen(&self, here: SocketAddr) -> TcpListener {
        self.on_the_client_side(move || TcpListener::bind(here))
    }

    /// Runs `make` in a thread that lives there.
    pub(crate) fn on_the_client_side<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> T {
        in_namespace(self.client_file(), make).expect("a socket can be made")
    }

    /// The file of the client side's namespace.
    #[must_use]
    pub fn client_file(&self) -> PathBuf {
        Path::new(NAMESPACES).join(&self.client)
    }

    /// The file of the server side's namespace.
    #[must_use]
    pub fn server_file(&self) -> PathBuf {
        Path::new(NAMESPACES).join(&self.server)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [&self.client, &self.server] {
            delete(name);
        }
    }
}

/// Runs `task` in a thread that lives in a network namespace.
fn in_namespace<T: Send + 'static>(
    file: PathBuf,
    task: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    thread::spawn(move || server::enter(&file).and_then(|()| task()))
        .join()
        .expect("the thread does not panic")
}

/// Whether `command` succeeds in a network namespace of its own, which ends with it.
pub(crate) fn in_own_network(command: &[&str]) -> bool {
    let mut unshare = Command::new("unshare");
    unshare.arg("--net").args(command).stdin(Stdio::null());
    unshare.stdout(Stdio::null()).stderr(Stdio::null());
    unshare.status().is_ok_and(|status| status.success())
}

fn remove_stale() {
    for name in unique::stale(Path::new(NAMESPACES)) {
        delete(&name);
    }
    cgroup::remove_stale();
    for name in unique::stale(Path::new(PINS)) {
        // Another run may be removing them at the same time.
        let _gone = std::fs::remove_dir_all(Path::new(PINS).join(name));
    }
    let temporary = std::env::temp_dir();
    for name in unique::stale(&temporary) {
        containerd::remove_stale(&temporary.join(&name));
        docker::remove_stale(&temporary.join(&name));
        // First, or what is mounted there would be emptied.
        mounts::unmount_below(&temporary.join(&name));
        // Another run may be removing it at the same time.
        let _gone = std::fs::remove_dir_all(temporary.join(name));
    }
}

/// Deletes a network namespace; says so when it stays.
fn delete(name: &str) {
    let path = Path::new(NAMESPACES).join(name);
    let deleted = Command::new("ip").args(["netns", "delete", name]).stderr(Stdio::null()).status();
    if !deleted.is_ok_and(|status| status.success()) && path.exists() {
        eprintln!("network namespace {name} is left behind");
    }
}

/// Runs the lines of `script` as `ip` commands.
#[track_caller]
fn ip(options: &[&str], script: &str) {
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("`ip` starts; install iproute2");
    child
        .stdin
        .take()
        .expect("standard input is a pipe")
        .write_all(script.as_bytes())
        .expect("`ip` reads its commands");
    let output = child.wait_with_output().expect("`ip` ends");
    assert!(
        output.status.success(),
        "ip {options:?}: {}\n{script}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_run_left_goes_at_the_next_start() {
        let mut maker = Command::new("sleep").arg("60").spawn().unwrap();
        let name = unique::name_by(maker.id());
        let namespace = Path::new(NAMESPACES).join(format!("{name}-c"));
        let cgroup = cgroup::root().join(&name);
        let directory = std::env::temp_dir().join(&name);
        ip(&[], &format!("netns add {name}-c\n"));
        std::fs::create_dir_all(cgroup.join("work/nested")).unwrap();
        std::fs::create_dir(&directory).unwrap();

        // As long as its maker lives, nobody else touches it.
        drop(World::new());
        assert!([&namespace, &cgroup, &directory].iter().all(|path| path.exists()));

        maker.kill().unwrap();
        maker.wait().unwrap();
        drop(World::new());
        for path in [namespace, cgroup, directory] {
            assert!(!path.exists(), "{} is left", path.display());
        }
    }
}
