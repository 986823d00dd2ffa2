//! Replacing the program of a link in place (`BPF_LINK_UPDATE`, kernel 5.7), which aya offers for
//! its own kinds of interfaces only.
//!
//! The kernel swaps one pointer: a call that is under way meets the old program or the new one
//! (`__cgroup_bpf_replace`, kernel/bpf/cgroup.c). What the attachment keeps in cgroup storage stays.
#![expect(unsafe_code, reason = "no safe crate makes this system call")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// `enum bpf_cmd` of the kernel's ABI.
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// The part of `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
#[derive(Default)]
struct ObjectGet {
    path_name: u64,
    descriptor: u32,
    file_flags: u32,
}

/// The part of `union bpf_attr` for `BPF_LINK_UPDATE`.
#[repr(C)]
#[derive(Default)]
struct LinkUpdate {
    link: u32,
    new_program: u32,
    flags: u32,
    old_program: u32,
}

/// Has the link that is pinned at `path` call `program` from now on.
///
/// # Errors
///
/// The kernel's: `ENOLINK` where what it was attached to is gone.
pub(super) fn replace(path: &Path, program: impl AsFd) -> io::Result<()> {
    let link = open(path)?;
    let update = LinkUpdate {
        link: link.as_raw_fd().unsigned_abs(),
        new_program: program.as_fd().as_raw_fd().unsigned_abs(),
        ..LinkUpdate::default()
    };
    // SAFETY: the record is laid out as the kernel's, and lives until the call returns.
    unsafe { bpf(BPF_LINK_UPDATE, &update) }.map(drop)
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let get = ObjectGet { path_name: path.as_ptr() as u64, ..ObjectGet::default() };
    // SAFETY: as above; the path lives until the call returns.
    let descriptor = unsafe { bpf(BPF_OBJ_GET, &get) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// # Safety
///
/// `attributes` is the part of `union bpf_attr` for `command`, and every address in it is valid.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}
