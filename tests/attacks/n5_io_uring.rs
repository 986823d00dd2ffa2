//! N5: the calls are made by an `io_uring`, with `SQPOLL` by a thread of the kernel.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use io_uring::{
    IoUring, opcode, squeue,
    types::{Fd, Fixed},
};
use socket2::{Domain, SockAddr, Socket};

use crate::{
    outcome::{Attempt, Failure},
    sockets::{self, Protocol, await_return, number, patience},
};

/// Builds an entry on either form of a target.
macro_rules! with_target {
    ($target:expr, |$fd:ident| $build:expr) => {
        match $target {
            $crate::n5_io_uring::Target::Descriptor($fd) => $build,
            $crate::n5_io_uring::Target::Registered($fd) => $build,
        }
    };
}
pub(crate) use with_target;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    how: How,
    /// Let a kernel thread submit.
    #[arg(long)]
    sqpoll: bool,
    /// Have a worker make the call, also where it need not.
    #[arg(long)]
    worker: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// `IORING_OP_CONNECT` of a TCP socket.
    Connect,
    /// `IORING_OP_SEND` of a datagram, with the address.
    Send,
    /// `IORING_OP_SENDMSG` of a datagram.
    Sendmsg,
    /// `IORING_OP_SOCKET`, then `IORING_OP_CONNECT`: no system call names the socket.
    Socket,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let to = arguments.to;
    let address = SockAddr::from(to);
    let mut ring = Ring { ring: ring(arguments.sqpoll)?, worker: arguments.worker };
    let number = number();
    match arguments.how {
        How::Connect => {
            let socket = Protocol::Tcp.socket(to)?;
            ring.connect(&socket, &address)?;
            sockets::converse(Protocol::Tcp, socket)
        }
        How::Socket => {
            let entry = opcode::Socket::new(Domain::for_address(to).into(), libc::SOCK_STREAM, 0);
            let fd = submit(&mut ring.ring, "IORING_OP_SOCKET", &entry.build())?;
            // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
            let socket = Socket::from(unsafe { OwnedFd::from_raw_fd(fd) });
            ring.connect(&socket, &address)?;
            sockets::converse(Protocol::Tcp, socket)
        }
        How::Send => {
            let socket = Protocol::Udp.socket(to)?;
            ring.on(&socket, "IORING_OP_SEND", |target| {
                with_target!(target, |fd| opcode::Send::new(
                    fd,
                    number.as_ptr(),
                    number.len() as u32
                )
                .dest_addr(address.as_ptr().cast())
                .dest_addr_len(address.len())
                .build())
            })?;
            await_return(&socket, &number)
        }
        How::Sendmsg => {
            let socket = Protocol::Udp.socket(to)?;
            let mut part =
                libc::iovec { iov_base: number.as_ptr().cast_mut().cast(), iov_len: number.len() };
            // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_name = address.as_ptr().cast_mut().cast();
            message.msg_namelen = address.len();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            ring.on(&socket, "IORING_OP_SENDMSG", |target| {
                with_target!(target, |fd| opcode::SendMsg::new(fd, &raw const message).build())
            })?;
            await_return(&socket, &number)
        }
    }
}

/// A socket as an entry names it.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    Descriptor(Fd),
    /// Registered with the ring.
    Registered(Fixed),
}

/// A ring, and who makes its calls.
pub(crate) struct Ring {
    pub(crate) ring: IoUring,
    /// A worker makes them, also where it need not.
    pub(crate) worker: bool,
}

impl Ring {
    /// Makes a call on `socket`: `build` gives the entry.
    pub(crate) fn on(
        &mut self,
        socket: &Socket,
        step: &str,
        build: impl FnOnce(Target) -> squeue::Entry,
    ) -> Result<i32, Failure> {
        let params = self.ring.params();
        // Before 5.11 a kernel thread that submits knows no descriptors of the process.
        let target = if params.is_setup_sqpoll() && !params.is_feature_sqpoll_nonfixed() {
            // A ring has one table, and there may be one already.
            let _none = self.ring.submitter().unregister_files();
            self.ring
                .submitter()
                .register_files(&[socket.as_raw_fd()])
                .map_err(|error| Failure::setup("register the socket", error))?;
            Target::Registered(Fixed(0))
        } else {
            Target::Descriptor(Fd(socket.as_raw_fd()))
        };
        let mut entry = build(target);
        if self.worker {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        submit(&mut self.ring, step, &entry)
    }

    pub(crate) fn connect(&mut self, socket: &Socket, address: &SockAddr) -> Result<(), Failure> {
        self.on(socket, "IORING_OP_CONNECT", |target| {
            with_target!(target, |fd| opcode::Connect::new(
                fd,
                address.as_ptr().cast(),
                address.len()
            )
            .build())
        })
        .map(drop)
    }
}

pub(crate) fn ring(sqpoll: bool) -> Result<IoUring, Failure> {
    let mut builder = IoUring::builder();
    if sqpoll {
        builder.setup_sqpoll(100);
    }
    builder.build(4).map_err(|error| {
        let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
            .map_or_else(|error| error.to_string(), |value| value.trim().to_owned());
        Failure::setup(format!("io_uring_setup (kernel.io_uring_disabled: {disabled})"), error)
    })
}

/// Submits `entry`, whose memory outlives this call, and gives its result.
pub(crate) fn submit(
    ring: &mut IoUring,
    step: &str,
    entry: &squeue::Entry,
) -> Result<i32, Failure> {
    // SAFETY: callers keep what the entry points to alive until the ring is dropped, also when
    // the wait below gives up.
    unsafe { ring.submission().push(entry) }
        .map_err(|_| Failure::unfit("the submission queue is full"))?;
    // Before 5.11 the kernel takes no time limit for a wait.
    let deadline = Instant::now() + patience();
    let result = loop {
        ring.submit().map_err(|error| Failure::setup("io_uring_enter", error))?;
        if let Some(completion) = ring.completion().next() {
            break completion.result();
        }
        if Instant::now() > deadline {
            return Err(Failure::at(step, io::Error::from_raw_os_error(libc::ETIMEDOUT)));
        }
        thread::sleep(Duration::from_millis(1));
    };
    if result < 0 {
        Err(Failure::at(step, io::Error::from_raw_os_error(-result)))
    } else {
        Ok(result)
    }
}
