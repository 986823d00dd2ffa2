//! Descriptors passed from process to process.

use std::{
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::outcome::Failure;

/// Sends `fd` by `SCM_RIGHTS`.
pub(crate) fn send(stream: &UnixStream, fd: &impl AsRawFd) -> Result<(), Failure> {
    let fds = [fd.as_raw_fd()];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(b"!")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )
    .map(drop)
    .map_err(|errno| Failure::setup("send the descriptor", errno))
}

/// Receives a descriptor. A guard may refuse that.
pub(crate) fn receive(stream: &UnixStream) -> Result<OwnedFd, Failure> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(|errno| Failure::at("receive the descriptor", errno))?;
    // The kernel leaves out a descriptor that the receiver may not have, and says so only by the mark of
    // a message that was cut short. There was room for one.
    let messages = message
        .cmsgs()
        .map_err(|errno| Failure::refused(format!("the message was cut short: {errno}")))?;
    for message in messages {
        if let ControlMessageOwned::ScmRights(fds) = message
            && let [fd] = fds[..]
        {
            // SAFETY: the kernel has just put this descriptor into our table.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(Failure::refused("the message came without its descriptor"))
}
