//! What is mounted below a directory, and taking it away.

use std::{
    fs,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};

/// Mount points in `directory`, in the order in which they were mounted.
pub(crate) fn below(directory: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("procfs is mounted on /proc");
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescaped);
    points.filter(|point| point != directory && point.starts_with(directory)).collect()
}

/// Unmounts all of them; says which stay.
pub(crate) fn unmount_below(directory: &Path) {
    // What was mounted last may lie on what was mounted before.
    for point in below(directory).into_iter().rev() {
        // Also where a process that is about to end still has a file open there.
        if let Err(errno) = umount2(&point, MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {errno}", point.display());
        }
    }
}

/// Blanks, tabulators, line ends and backslashes are written as three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let code = more.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = code.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (first, code) {
            (b'\\', Some(code)) => {
                bytes.push(code);
                rest = &more[3..];
            }
            (byte, _) => {
                bytes.push(*byte);
                rest = more;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_a_blank_is_read() {
        assert_eq!(unescaped(r"/a\040b\134"), Path::new(r"/a b\"));
        assert_eq!(unescaped(r"/a\x"), Path::new(r"/a\x"));
    }
}
