//! Names that no other test uses, and from which a later run sees that their maker is gone.

use std::{
    fs,
    path::Path,
    process,
    sync::atomic::{AtomicU32, Ordering},
};

const PREFIX: &str = "agt";

/// A name that this process has not used before.
pub(crate) fn name() -> String {
    name_by(process::id())
}

/// `agt-<pid>-<start time>-<n>`, as process `pid` would make it: with its start time, because pids
/// come again.
pub(crate) fn name_by(pid: u32) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = start_time(pid).expect("procfs is mounted on /proc");
    format!("{PREFIX}-{pid}-{start}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Names in `directory` whose maker is gone.
pub(crate) fn stale(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        // No such directory: nobody has left anything in it.
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| maker(name).is_some_and(|(pid, start)| start_time(pid) != Some(start)))
        .collect()
}

fn maker(name: &str) -> Option<(u32, u64)> {
    let mut parts = name.split('-');
    (parts.next()? == PREFIX).then_some(())?;
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// When a process started, in clock ticks since boot; `None` where there is no such process.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold spaces and parentheses; the fields begin after the last.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_stale_only_when_its_maker_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let mine = name();
        // No process has pid 0, and this one did not start at boot.
        let reused = format!("agt-{}-0-1-s", process::id());
        for name in [&mine, "agt-0-5-1-c", &reused, "agt-", "other"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        let mut stale = stale(directory.path());
        stale.sort();
        assert_eq!(stale, ["agt-0-5-1-c".to_owned(), reused]);
    }
}
