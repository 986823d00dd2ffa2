//! Named points at which a development build can be made to end at once, as `SIGKILL` ends it.
//!
//! Its one job is to let tests die in the middle of any step that changes what is in force. A test
//! sets [`VARIABLE`] to the name of a point, or to `name@3` for the third time it is passed. In a
//! release build a point is nothing. Knows nothing of what the steps do; safe on any thread.

/// The environment variable that names the point to end at.
pub const VARIABLE: &str = "AGENTGUARD_FAULT";

/// Every point, in the order in which a daemon passes them first.
///
/// The part before the dot says what has to happen for a point to be passed: `load` the kernel half
/// set up anew (or adopted), `takeover` replaced by another build's, `uninstall` taken away, `audit` the
/// audit log rotated.
pub const POINTS: &[&str] = &[
    "load.directories",
    "load.loaded",
    "load.gate",
    "load.pinned",
    "load.ready",
    "load.adopted",
    "start.opened",
    "start.restored",
    "manifests.begun",
    "manifests.written",
    "manifests.renamed",
    "flip.rows",
    "flip.tag",
    "flip.retired",
    "add.compiled",
    "hold.tag",
    "hold.captured",
    "give_way.added",
    "start.manifests",
    "start.resumed",
    "takeover.link",
    "takeover.gate",
    "takeover.done",
    "takeover.removed",
    "start.others",
    "save.begun",
    "save.written",
    "save.renamed",
    "start.saved",
    "start.listening",
    "witness.written",
    "sweep.dropped",
    "sweep.earlier",
    "confine.cgroup",
    "confine.held",
    "confine.moved",
    "remove.released",
    "remove.forgotten",
    "audit.renamed",
    "audit.told",
    "audit.removed",
    "uninstall.unready",
    "uninstall.links",
    "uninstall.pins",
    "uninstall.state",
];

/// Ends the process here if the environment says so: no destructor runs, nothing is flushed.
#[cfg(debug_assertions)]
pub fn point(name: &'static str) {
    armed::point(name);
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub const fn point(_name: &'static str) {}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use nix::sys::signal::{Signal, raise};

    /// Where to end.
    #[derive(Debug, PartialEq, Eq)]
    pub(super) struct Fault {
        pub(super) name: String,
        /// Which time it is passed, from 1.
        pub(super) time: u32,
    }

    impl Fault {
        pub(super) fn parse(text: &str) -> Self {
            let counted = text.split_once('@').and_then(|(name, time)| {
                let time = time.parse().ok().filter(|time| *time > 0)?;
                Some(Self { name: name.to_owned(), time })
            });
            counted.unwrap_or_else(|| Self { name: text.to_owned(), time: 1 })
        }
    }

    pub(super) fn point(name: &'static str) {
        static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
        static PASSED: AtomicU32 = AtomicU32::new(0);
        let fault = FAULT.get_or_init(|| Some(Fault::parse(&std::env::var(super::VARIABLE).ok()?)));
        if let Some(fault) = fault
            && fault.name == name
            && PASSED.fetch_add(1, Ordering::Relaxed) + 1 == fault.time
        {
            // No panic, which would unwind; and an abort may write a core file.
            let _ended = raise(Signal::SIGKILL);
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::armed::Fault;
    use super::*;

    #[test]
    fn a_point_is_named_with_or_without_a_count() {
        let fault = |name: &str, time| Fault { name: name.to_owned(), time };
        assert_eq!(Fault::parse("state.renamed"), fault("state.renamed", 1));
        assert_eq!(Fault::parse("state.renamed@3"), fault("state.renamed", 3));
        assert_eq!(Fault::parse("state.renamed@0"), fault("state.renamed@0", 1));
    }

    /// The names in calls of `point` below a directory, but for those of this file.
    fn passed(directory: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                passed(&path, found);
            } else if path.extension().is_some_and(|suffix| suffix == "rs")
                && !path.ends_with("src/fault.rs")
            {
                let text = fs::read_to_string(&path).unwrap();
                let calls = text.split("fault::point(\"").skip(1);
                found.extend(calls.filter_map(|call| Some(call.split_once('"')?.0.to_owned())));
            }
        }
    }

    #[test]
    fn every_point_is_listed_and_stands_in_one_place() {
        let mut found = Vec::new();
        passed(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        let places: BTreeSet<&str> = found.iter().map(String::as_str).collect();
        assert_eq!(places.len(), found.len(), "a point stands in two places: {found:?}");
        assert_eq!(places, POINTS.iter().copied().collect());
        assert_eq!(places.len(), POINTS.len(), "a point is listed twice");
    }
}
