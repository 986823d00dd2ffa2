//! Programs that are attached to cgroups, one by one to each.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use aya::programs::links::FdLink;
use aya::programs::{
    CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSock, CgroupSockAddr,
    CgroupSockAddrAttachType, CgroupSockAttachType, ProgramError,
};
use nix::errno::Errno;

use super::load::{LoadError, causes};

/// A program for cgroups, from its pin.
pub(super) struct AttachedProgram {
    pub(super) name: &'static str,
    pub(super) kind: CgroupProgram,
    /// Whether the kernel lets this process attach it anywhere.
    pub(super) may_attach: bool,
}

pub(super) enum CgroupProgram {
    SockAddr(CgroupSockAddr, CgroupSockAddrAttachType),
    Sock(CgroupSock, CgroupSockAttachType),
    Skb(CgroupSkb, CgroupSkbAttachType),
}

impl AttachedProgram {
    /// The program that is pinned at `path`.
    ///
    /// # Errors
    ///
    /// When it can not be opened, or `name` is that of no program for cgroups.
    pub(super) fn open(name: &'static str, path: &Path) -> Result<Self, LoadError> {
        let kind = CgroupProgram::open(name, path)?;
        Ok(Self { name, kind, may_attach: true })
    }

    /// Finds out whether the kernel lets this process attach it.
    ///
    /// # Errors
    ///
    /// Why not, in one line.
    pub(super) fn probe(&mut self) -> Result<(), String> {
        let probed = self.kind.probe();
        self.may_attach = probed.is_ok();
        probed
    }
}

impl CgroupProgram {
    fn open(name: &str, path: &Path) -> Result<Self, LoadError> {
        use CgroupSockAddrAttachType as Address;
        let error = |error| LoadError::part(name, error);
        let address = match name {
            "connect4" => Address::Connect4,
            "connect6" => Address::Connect6,
            "sendmsg4" => Address::UDPSendMsg4,
            "sendmsg6" => Address::UDPSendMsg6,
            "bind4" => Address::Bind4,
            "bind6" => Address::Bind6,
            "sock_create" => {
                let kind = CgroupSockAttachType::SockCreate;
                let program = CgroupSock::from_pin(path, kind).map_err(error)?;
                return Ok(Self::Sock(program, kind));
            }
            "egress" => {
                let kind = CgroupSkbAttachType::Egress;
                let program = CgroupSkb::from_pin(path, kind).map_err(error)?;
                return Ok(Self::Skb(program, kind));
            }
            _ => return Err(LoadError::part(name, "is of an unknown kind")),
        };
        let program = CgroupSockAddr::from_pin(path, address).map_err(error)?;
        Ok(Self::SockAddr(program, address))
    }

    /// The kernel's number of the program.
    pub(super) fn id(&self) -> Option<u32> {
        let info = match self {
            Self::SockAddr(program, _) => program.info(),
            Self::Sock(program, _) => program.info(),
            Self::Skb(program, _) => program.info(),
        };
        info.ok().map(|info| info.id())
    }

    /// Attaches to a cgroup; the pin keeps it there.
    pub(super) fn attach(&mut self, cgroup: &File, pin: &Path) -> Result<(), String> {
        let text = |error: ProgramError| causes(&error);
        let link: FdLink = match self {
            Self::SockAddr(program, _) => {
                let id = program.attach(cgroup, MODE).map_err(text)?;
                fd_link(program.take_link(id).map_err(text)?)?
            }
            Self::Sock(program, _) => {
                let id = program.attach(cgroup, MODE).map_err(text)?;
                fd_link(program.take_link(id).map_err(text)?)?
            }
            Self::Skb(program, kind) => {
                let id = program.attach(cgroup, *kind, MODE).map_err(text)?;
                fd_link(program.take_link(id).map_err(text)?)?
            }
        };
        link.pin(pin).map_err(|error| causes(&error))?;
        Ok(())
    }

    /// Has the kernel attach it to what is no cgroup. The kernel looks at program and process first
    /// (`bpf_prog_attach_check_attach_type`, kernel/bpf/syscall.c), and only then for the cgroup, which
    /// it says is none (`EBADF` of `cgroup_get_from_fd`, kernel/cgroup/cgroup.c): nothing is attached, and
    /// all is known but for what the cgroup itself may have against it.
    fn probe(&mut self) -> Result<(), String> {
        let nowhere = File::open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
        let attached = match self {
            Self::SockAddr(program, _) => program.attach(nowhere.as_fd(), MODE).map(drop),
            Self::Sock(program, _) => program.attach(nowhere.as_fd(), MODE).map(drop),
            Self::Skb(program, kind) => program.attach(nowhere.as_fd(), *kind, MODE).map(drop),
        };
        let Err(error) = attached else {
            return Err("the kernel attaches it to what is no cgroup".to_owned());
        };
        let errno = if let ProgramError::SyscallError(error) = &error {
            error.io_error.raw_os_error()
        } else {
            None
        };
        match errno.map(Errno::from_raw) {
            Some(Errno::EBADF) => Ok(()),
            Some(Errno::EPERM) => Err(format!(
                "this process may not attach it: {}; give the daemon CAP_NET_ADMIN, which older kernels \
                 ask for beside CAP_SYS_ADMIN",
                causes(&error)
            )),
            _ => Err(format!("it can not be attached: {}", causes(&error))),
        }
    }

    /// The kernel's number of the attach type (`enum bpf_attach_type`), which keys the storage.
    pub(super) const fn attach_type(&self) -> u32 {
        match self {
            Self::SockAddr(_, CgroupSockAddrAttachType::Bind4) => 8,
            Self::SockAddr(_, CgroupSockAddrAttachType::Bind6) => 9,
            Self::SockAddr(_, CgroupSockAddrAttachType::Connect4) => 10,
            Self::SockAddr(_, CgroupSockAddrAttachType::Connect6) => 11,
            Self::SockAddr(_, CgroupSockAddrAttachType::UDPSendMsg4) => 14,
            Self::SockAddr(_, CgroupSockAddrAttachType::UDPSendMsg6) => 15,
            Self::SockAddr(_, _) => u32::MAX,
            Self::Sock(_, CgroupSockAttachType::SockCreate) => 2,
            Self::Sock(_, _) => u32::MAX,
            Self::Skb(_, CgroupSkbAttachType::Egress) => 1,
            Self::Skb(_, CgroupSkbAttachType::Ingress) => 0,
        }
    }
}

/// With links this mode is the one that lets others attach beside and below.
const MODE: CgroupAttachMode = CgroupAttachMode::Single;

/// The descriptor of a link, which is what can be pinned.
pub(super) fn fd_link<L>(link: L) -> Result<FdLink, String>
where
    FdLink: TryFrom<L>,
    <FdLink as TryFrom<L>>::Error: std::fmt::Display,
{
    FdLink::try_from(link).map_err(|error| error.to_string())
}
