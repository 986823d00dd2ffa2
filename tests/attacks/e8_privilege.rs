//! E8: what gives a file more than others must not make it granted.

use std::{
    ffi::CString,
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::Path,
};

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::{
    outcome::{Attempt, Failure},
    payload::{Forbidden, execute, text},
};

/// The user that owns nothing.
const NOBODY: u32 = 65_534;
/// `struct vfs_cap_data`, revision 2 with the effective bit, and `CAP_NET_RAW` permitted.
const CAPABILITIES: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    forbidden: Forbidden,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum How {
    /// A file that runs as root, started by nobody.
    SetUserId,
    /// The same for its group.
    SetGroupId,
    /// A file with capabilities, started by nobody.
    Capabilities,
    /// A process that gives up to gain privileges.
    NoNewPrivileges,
    /// The same with a file that would give some.
    NoNewPrivilegesSetUserId,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let forbidden = &arguments.forbidden;
    forbidden.run(|line| match exec(forbidden, arguments.how, line) {
        Ok(never) => match never {},
        Err(failure) => failure,
    })
}

fn exec(
    forbidden: &Forbidden,
    how: How,
    line: &[CString],
) -> Result<std::convert::Infallible, Failure> {
    let program = &forbidden.program;
    let mode = match how {
        How::SetUserId | How::NoNewPrivilegesSetUserId => 0o4755,
        How::SetGroupId => 0o2755,
        How::Capabilities | How::NoNewPrivileges => 0o755,
    };
    set_mode(program, mode)?;
    if how == How::Capabilities {
        give_capabilities(program)?;
    }
    // Whoever it runs as, it can reach the file and leave its mark.
    for path in [program.parent(), forbidden.token.parent()].into_iter().flatten() {
        set_mode(path, 0o777)?;
    }
    become_nobody()?;
    if matches!(how, How::NoNewPrivileges | How::NoNewPrivilegesSetUserId) {
        // SAFETY: takes numbers.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
            return Err(Failure::setup("prctl", io::Error::last_os_error()));
        }
    }
    Err(execute(program, line))
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Failure> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(|error| Failure::setup(path.display(), error))
}

fn give_capabilities(path: &Path) -> Result<(), Failure> {
    let path = text(path)?;
    // SAFETY: the texts and the value outlive the call, with the value's length.
    let result = unsafe {
        libc::setxattr(
            path.as_ptr(),
            c"security.capability".as_ptr(),
            CAPABILITIES.as_ptr().cast(),
            CAPABILITIES.len(),
            0,
        )
    };
    if result < 0 {
        return Err(Failure::setup("capabilities", io::Error::last_os_error()));
    }
    Ok(())
}

fn become_nobody() -> Result<(), Failure> {
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setgroups(&[])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(|errno| Failure::setup("become nobody", errno))
}
