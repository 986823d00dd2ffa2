//! Unix sockets by every kind and name.

use std::{
    fs, mem,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use crate::{outcome::Failure, sockets::be_patient};

/// Where the name begins in an address.
const NAME: usize = mem::offset_of!(libc::sockaddr_un, sun_path);

/// Which type a unix socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    Stream,
    Datagram,
    Packets,
}

impl Kind {
    const fn number(self) -> Type {
        match self {
            Self::Stream => Type::STREAM,
            Self::Datagram => Type::DGRAM,
            Self::Packets => Type::SEQPACKET,
        }
    }

    pub(crate) fn socket(self) -> Result<Socket, Failure> {
        let socket = Socket::new(Domain::UNIX, self.number(), None)
            .map_err(|error| Failure::at("unix socket", error))?;
        be_patient(&socket)?;
        Ok(socket)
    }

    /// Two that are connected.
    pub(crate) fn pair(self) -> Result<(Socket, Socket), Failure> {
        let (one, other) = Socket::pair(Domain::UNIX, self.number(), None)
            .map_err(|error| Failure::at("socketpair", error))?;
        be_patient(&one)?;
        be_patient(&other)?;
        Ok((one, other))
    }

    pub(crate) const fn listens(self) -> bool {
        match self {
            Self::Stream | Self::Packets => true,
            Self::Datagram => false,
        }
    }
}

/// How a unix socket is called.
#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Name {
    #[arg(long)]
    path: Option<PathBuf>,
    /// The bytes of an abstract name behind its leading NUL, in hexadecimal digits.
    #[arg(long)]
    hex: Option<String>,
}

impl Name {
    pub(crate) fn address(&self) -> Result<SockAddr, Failure> {
        match (&self.path, &self.hex) {
            (Some(path), _) => at_path(path),
            (None, Some(hex)) => abstract_name(&bytes(hex)?),
            (None, None) => Err(Failure::unfit("no name")),
        }
    }

    /// The path, of a socket that has one.
    pub(crate) fn path(&self) -> Result<&Path, Failure> {
        self.path.as_deref().ok_or_else(|| Failure::unfit("an abstract name has no path"))
    }

    /// Removes the file, where there is one.
    pub(crate) fn remove(&self) -> Result<(), Failure> {
        match &self.path {
            Some(path) => {
                fs::remove_file(path).map_err(|error| Failure::setup(path.display(), error))
            }
            None => Ok(()),
        }
    }
}

/// The address of the socket at `path`.
pub(crate) fn at_path(path: &Path) -> Result<SockAddr, Failure> {
    address(&[path.as_os_str().as_bytes(), b"\0"].concat())
}

/// The address of an abstract name, given without its leading NUL.
pub(crate) fn abstract_name(name: &[u8]) -> Result<SockAddr, Failure> {
    address(&[b"\0", name].concat())
}

fn address(name: &[u8]) -> Result<SockAddr, Failure> {
    // SAFETY: all-zero is a valid `sockaddr_un`.
    let mut un: libc::sockaddr_un = unsafe { mem::zeroed() };
    un.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let room = un
        .sun_path
        .get_mut(..name.len())
        .ok_or_else(|| Failure::unfit("the name of the unix socket is too long"))?;
    for (to, from) in room.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: a `sockaddr_un` is one of the addresses that the storage is made for.
    unsafe { *storage.view_as::<libc::sockaddr_un>() = un };
    // SAFETY: that much of it is a unix address.
    Ok(unsafe { SockAddr::new(storage, (NAME + name.len()) as libc::socklen_t) })
}

fn bytes(hex: &str) -> Result<Vec<u8>, Failure> {
    (0..hex.len())
        .step_by(2)
        .map(|at| {
            hex.get(at..at + 2)
                .and_then(|digits| u8::from_str_radix(digits, 16).ok())
                .ok_or_else(|| Failure::unfit(format!("{hex} is not hexadecimal")))
        })
        .collect()
}
