//! T4 and T5: reach what listens outside by a unix socket, and have it act.

use std::{
    fs, io, mem,
    os::{
        fd::AsRawFd,
        unix::{fs::symlink, net::UnixStream},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use io_uring::opcode;
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::{ForkResult, fork},
};
use socket2::{SockAddr, Socket};

use crate::{
    n5_io_uring::{Ring, ring, with_target},
    outcome::{Attempt, Failure},
    own_mounts::{bind, unshare_mounts},
    passing,
    serve::echo,
    sockets::{await_return, be_patient, number, patience},
    unix::{Kind, Name, at_path},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    kind: Kind,
    #[command(flatten)]
    name: Name,
    /// How to get at the socket.
    #[arg(long, default_value = "name")]
    by: By,
    /// How to speak to it.
    #[arg(long)]
    how: How,
    /// A socket that is granted, or could be: its path is put in the place of the other's.
    #[arg(long)]
    granted: Option<PathBuf>,
    /// A directory that the attack may write to.
    #[arg(long)]
    scratch: PathBuf,
    /// Serve there first, in a child.
    #[arg(long)]
    serve: bool,
    /// Wait so many milliseconds first.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=5000))]
    wait: u64,
}

/// The ways to name a socket.
#[derive(Clone, Copy, clap::ValueEnum)]
enum By {
    Name,
    Relative,
    ProcRoot,
    /// The path of a descriptor that is open for nothing.
    Descriptor,
    Symlink,
    /// A symlink where the granted socket was.
    SymlinkInPlace,
    HardLink,
    /// A hard link where the granted socket was.
    HardLinkInPlace,
    /// The socket's file, put where the granted socket was.
    RenameInPlace,
    /// The socket's directory, mounted over the granted one's.
    MountInPlace,
    /// The socket's file, mounted over the granted socket's.
    FileMountInPlace,
    /// A hard link where the granted socket was, and the first name removed.
    MoveByLink,
}

/// The calls.
#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// Connect, then send.
    Connect,
    Sendto,
    Sendmsg,
    /// One call, to the granted socket first.
    Sendmmsg,
    /// A ring connects.
    Ring,
    /// A worker of a ring connects.
    RingWorker,
    /// A kernel thread submits to the ring.
    RingThread,
    /// A ring sends.
    RingSend,
    /// A worker of a ring sends.
    RingSendWorker,
    /// Take a connected socket from a helper outside, whose socket is at the name.
    Received,
    /// Talk over a pair.
    Pair,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    thread::sleep(Duration::from_millis(arguments.wait));
    if let How::Pair = arguments.how {
        return pair(arguments.kind);
    }
    if arguments.serve {
        return beside_a_server(arguments, || talk(arguments));
    }
    talk(arguments)
}

/// A number goes round: through one end to the other, in a child, and back.
fn pair(kind: Kind) -> Attempt {
    let (here, there) = kind.pair()?;
    let number = number();
    with_echo(&there, false, || {
        here.send(&number).map_err(|error| Failure::at("send", error))?;
        await_return(&here, &number)
    })
}

/// Runs `talk` while a child serves at the name.
fn beside_a_server(arguments: &Arguments, talk: impl FnOnce() -> Attempt) -> Attempt {
    let Arguments { kind, name, .. } = arguments;
    let server = kind.socket()?;
    server.bind(&name.address()?).map_err(|error| Failure::at("bind", error))?;
    if kind.listens() {
        server.listen(1).map_err(|error| Failure::at("listen", error))?;
    }
    let attempt = with_echo(&server, kind.listens(), talk);
    name.remove()?;
    attempt
}

/// Runs `talk` while a child sends back what comes to `socket`, once.
fn with_echo(socket: &Socket, listens: bool, talk: impl FnOnce() -> Attempt) -> Attempt {
    // SAFETY: this process has one thread, so the child may do what this one may.
    match unsafe { fork() }.map_err(|errno| Failure::setup("fork", errno))? {
        ForkResult::Child => {
            let served = if listens {
                socket.accept().is_ok_and(|(stream, _)| echo(&stream))
            } else {
                echo(socket)
            };
            // SAFETY: `_exit` takes any number and only ends the process.
            unsafe { libc::_exit(i32::from(!served)) }
        }
        ForkResult::Parent { child } => {
            let attempt = talk();
            // It waits no longer than a socket does; ended here, it is surely gone.
            kill(child, Signal::SIGKILL).map_err(|errno| Failure::setup("kill", errno))?;
            waitpid(child, None).map_err(|errno| Failure::setup("waitpid", errno))?;
            attempt
        }
    }
}

fn talk(arguments: &Arguments) -> Attempt {
    let address = address(arguments)?;
    let Arguments { kind, how, .. } = *arguments;
    let number = number();
    if let How::Received = how {
        let stream = UnixStream::connect(arguments.name.path()?)
            .map_err(|error| Failure::setup("the helper", error))?;
        stream
            .set_read_timeout(Some(patience()))
            .map_err(|error| Failure::setup("setsockopt", error))?;
        let socket = Socket::from(passing::receive(&stream)?);
        be_patient(&socket)?;
        socket.send(&number).map_err(|error| Failure::at("send", error))?;
        return await_return(&socket, &number);
    }
    let socket = kind.socket()?;
    if kind == Kind::Datagram {
        // For the answer.
        let own = arguments.scratch.join("own");
        socket.bind(&at_path(&own)?).map_err(|error| Failure::at("bind", error))?;
    }
    match how {
        How::Connect => {
            connected(socket.connect(&address))?;
            socket.send(&number).map_err(|error| Failure::at("send", error))?;
        }
        How::Sendto => {
            socket.send_to(&number, &address).map_err(|error| Failure::at("sendto", error))?;
        }
        How::Sendmsg => send_messages(&socket, &[&address], &number)?,
        How::Sendmmsg => {
            let granted = at_path(granted(arguments)?)?;
            send_messages(&socket, &[&granted, &address], &number)?;
        }
        How::Ring | How::RingWorker | How::RingThread => {
            let mut ring = Ring {
                ring: ring(matches!(how, How::RingThread))?,
                worker: matches!(how, How::RingWorker),
            };
            ring.connect(&socket, &address)?;
            socket.send(&number).map_err(|error| Failure::at("send", error))?;
        }
        How::RingSend | How::RingSendWorker => {
            let mut ring = Ring { ring: ring(false)?, worker: matches!(how, How::RingSendWorker) };
            let mut part =
                libc::iovec { iov_base: number.as_ptr().cast_mut().cast(), iov_len: number.len() };
            let message = message(&address, &mut part);
            ring.on(&socket, "IORING_OP_SENDMSG", |target| {
                with_target!(target, |fd| opcode::SendMsg::new(fd, &raw const message).build())
            })?;
        }
        How::Received | How::Pair => {}
    }
    await_return(&socket, &number)
}

/// A blocking connect ends at once, or waits for room in the queue, which there is.
fn connected(result: io::Result<()>) -> Result<(), Failure> {
    result.map_err(|error| Failure::at("connect", error))
}

fn granted(arguments: &Arguments) -> Result<&Path, Failure> {
    arguments.granted.as_deref().ok_or_else(|| Failure::unfit("no granted socket"))
}

fn message(address: &SockAddr, part: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_namelen = address.len();
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message
}

/// One `sendmmsg` with a message for each address, asked again for what it left out.
fn send_messages(socket: &Socket, addresses: &[&SockAddr], number: &[u8]) -> Result<(), Failure> {
    let mut part =
        libc::iovec { iov_base: number.as_ptr().cast_mut().cast(), iov_len: number.len() };
    let mut messages: Vec<libc::mmsghdr> = addresses
        .iter()
        .map(|address| libc::mmsghdr { msg_hdr: message(address, &mut part), msg_len: 0 })
        .collect();
    let mut rest = messages.as_mut_slice();
    while !rest.is_empty() {
        // SAFETY: every header points to an address and a buffer that outlive the call.
        let sent =
            unsafe { libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, 0) };
        let Ok(sent) = usize::try_from(sent) else {
            return Err(Failure::at("sendmmsg", io::Error::last_os_error()));
        };
        rest = &mut rest[sent.max(1)..];
    }
    Ok(())
}

/// The address by which the socket is reached.
fn address(arguments: &Arguments) -> Result<SockAddr, Failure> {
    let Arguments { name, by, scratch, .. } = arguments;
    if let By::Name = by {
        return name.address();
    }
    let path = name.path()?;
    let (directory, file) = path
        .parent()
        .zip(path.file_name())
        .ok_or_else(|| Failure::unfit(format!("{} is no file in a directory", path.display())))?;
    match by {
        By::Name => name.address(),
        By::Relative => {
            std::env::set_current_dir(directory)
                .map_err(|error| Failure::setup(directory.display(), error))?;
            at_path(Path::new(file))
        }
        By::ProcRoot => {
            let mut below = std::ffi::OsString::from("/proc/self/root");
            below.push(path);
            at_path(Path::new(&below))
        }
        By::Descriptor => {
            use nix::{
                fcntl::{OFlag, open},
                sys::stat::Mode,
            };
            // Left open on purpose: the path names it.
            let fd = open(path, OFlag::O_PATH, Mode::empty())
                .map_err(|errno| Failure::setup(path.display(), errno))?;
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            mem::forget(fd);
            at_path(Path::new(&path))
        }
        By::Symlink => {
            let link = scratch.join("link");
            symlink(path, &link).map_err(|error| Failure::setup(link.display(), error))?;
            at_path(&link)
        }
        By::SymlinkInPlace => {
            let granted = granted(arguments)?;
            remove(granted)?;
            symlink(path, granted).map_err(|error| Failure::setup(granted.display(), error))?;
            at_path(granted)
        }
        By::HardLink => {
            let link = scratch.join("link");
            fs::hard_link(path, &link).map_err(|error| Failure::at(link.display(), error))?;
            at_path(&link)
        }
        By::HardLinkInPlace | By::MoveByLink => {
            let granted = granted(arguments)?;
            remove(granted)?;
            fs::hard_link(path, granted).map_err(|error| Failure::at(granted.display(), error))?;
            if let By::MoveByLink = by {
                remove(path)?;
            }
            at_path(granted)
        }
        By::RenameInPlace => {
            let granted = granted(arguments)?;
            fs::rename(path, granted).map_err(|error| Failure::at(granted.display(), error))?;
            at_path(granted)
        }
        By::MountInPlace => {
            let granted = granted(arguments)?;
            let over = granted.parent().ok_or_else(|| Failure::unfit("no directory"))?;
            unshare_mounts()?;
            bind(directory, over)?;
            at_path(&over.join(file))
        }
        By::FileMountInPlace => {
            let granted = granted(arguments)?;
            unshare_mounts()?;
            bind(path, granted)?;
            at_path(granted)
        }
    }
}

fn remove(path: &Path) -> Result<(), Failure> {
    fs::remove_file(path).map_err(|error| Failure::at(path.display(), error))
}
