//! N16: a network of one's own making, and traffic through it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::AsRawFd,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::{
    child::in_child,
    n7_family::udp_packet,
    outcome::{Attempt, Failure},
    sockets::{Protocol, number, reach},
};

/// `TUNSETIFF` of the kernel.
const SET_INTERFACE: libc::Ioctl = 0x4004_54ca;
/// `IFF_TUN | IFF_NO_PI`: packets without a link, and nothing before them.
const TUN_PACKETS: i16 = 0x0001 | 0x1000;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddrV4,
    /// A peer that is granted.
    #[arg(long)]
    granted: SocketAddrV4,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// A namespace of its own, joined to the old one by a pair of links.
    Namespace,
    /// Packets put into a TUN device, which the host hands on.
    Tun,
    /// A tunnel that wraps packets to a granted peer for another host.
    Tunnel,
    /// A rule that sends what goes to a granted peer by way of another host.
    Route,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let to = arguments.to;
    match arguments.how {
        How::Namespace => in_child(|| {
            own_namespace()?;
            reach(Protocol::Tcp, SocketAddr::V4(to))
        }),
        How::Tun => {
            let mut device = tun("agt-tun")?;
            ip(&["link set agt-tun up"])?;
            let packet = udp_packet(Ipv4Addr::new(192, 0, 2, 66), to, &number());
            // The first may find that the neighbour is not known yet.
            for _ in 0..3 {
                device.write_all(&packet).map_err(|error| Failure::at("the device", error))?;
                thread::sleep(Duration::from_millis(100));
            }
            Ok("handed to the device; the peer knows whether it arrived".to_owned())
        }
        How::Tunnel => {
            ip(&[
                &format!("tunnel add agt-wrap mode ipip remote {} local 192.0.2.1", to.ip()),
                "link set agt-wrap up",
                &format!("route add {}/32 dev agt-wrap src 192.0.2.1", arguments.granted.ip()),
                // The tunnel's own packets need another way than the one it takes.
                &format!("route replace {}/32 dev near src 192.0.2.1", to.ip()),
            ])?;
            send_away(arguments.granted)
        }
        How::Route => {
            ip(&[&format!(
                "route add {}/32 via {} dev near onlink src 192.0.2.1",
                arguments.granted.ip(),
                to.ip()
            )])?;
            send_away(arguments.granted)
        }
    }
}

/// A datagram whose answer would not find its way back.
fn send_away(to: SocketAddrV4) -> Attempt {
    let socket = Protocol::Udp.socket(SocketAddr::V4(to))?;
    for _ in 0..3 {
        socket
            .send_to(&number(), &SocketAddr::V4(to).into())
            .map_err(|error| Failure::at("send", error))?;
        thread::sleep(Duration::from_millis(100));
    }
    Ok("sent; the peer knows whether it arrived".to_owned())
}

/// A network namespace for this process, whose address the host answers for.
fn own_namespace() -> Result<(), Failure> {
    let network =
        || File::open("/proc/thread-self/ns/net").map_err(|error| Failure::setup("network", error));
    let old = network()?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Failure::at("unshare", errno))?;
    let new = network()?;
    let enter = |namespace: &File| {
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| Failure::setup("setns", errno))
    };
    enter(&old)?;
    let here = std::process::id();
    // The pair is made where both ends may be, and one end is given to the new namespace, which
    // goes by the number of a process that lives there.
    enter(&new)?;
    ip(&["link add inner type veth peer name outer"])?;
    // Moved by the descriptor's path, since this process has two.
    let path = format!("/proc/{here}/fd/{}", old.as_raw_fd());
    ip(&[&format!("link set outer netns {path}")])?;
    ip(&[
        "link set lo up",
        "addr add 192.0.2.77/32 dev inner",
        "link set inner up",
        "route add 169.254.1.1/32 dev inner",
        "route add default via 169.254.1.1 dev inner",
    ])?;
    enter(&old)?;
    ip(&[
        "link set outer up",
        "addr add 169.254.1.1/32 dev outer",
        "route add 192.0.2.77/32 dev outer",
    ])?;
    enter(&new)
}

/// Runs lines of `ip` in the namespace of the calling thread.
fn ip(lines: &[&str]) -> Result<(), Failure> {
    let setup = |error: io::Error| Failure::setup("ip", error);
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(setup)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.join("\n").as_bytes()).map_err(setup)?;
    }
    let output = child.wait_with_output().map_err(setup)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    // What the kernel refuses, `ip` says in these words.
    if said.contains("Operation not permitted") {
        return Err(Failure::at(said, io::Error::from_raw_os_error(libc::EPERM)));
    }
    Err(Failure::unfit(format!("ip: {said}")))
}

/// A TUN device of that name, which is there for as long as its file is open.
fn tun(name: &str) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| Failure::at("/dev/net/tun", error))?;
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&TUN_PACKETS.to_ne_bytes());
    // SAFETY: the request outlives the call and is as long as the kernel reads.
    if unsafe { libc::ioctl(file.as_raw_fd(), SET_INTERFACE, request.as_mut_ptr()) } < 0 {
        return Err(Failure::at("the device", io::Error::last_os_error()));
    }
    Ok(file)
}
