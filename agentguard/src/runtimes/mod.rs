//! Container runtimes: what each says of this node's pods and containers.
//!
//! An edge: turns what a runtime answers into the plain values of [`crate::identity::container`].
//! Knows no workload, grant or tag.

mod changes;
pub mod cri;
pub mod docker;
pub mod nri;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};

use crate::identity::container::{Command, Container, Sandbox};

/// Where a container's command is looked for when it says nothing.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a runtime says there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// By their ids.
    pub sandboxes: BTreeMap<String, Sandbox>,
    /// Those that have a process, by their ids.
    pub containers: BTreeMap<String, Container>,
    /// Why it can not be told what something is, the first where there are several: what it may be is not
    /// gone.
    pub untold: Option<RuntimeError>,
}

/// Why a runtime did not answer. What it said before stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the container runtime at {endpoint} {what}; {remedy}")]
pub struct RuntimeError {
    pub endpoint: String,
    pub what: String,
    pub remedy: &'static str,
}

/// A container runtime.
pub trait Runtime: Send + 'static {
    /// Where it is asked, as logs and `status` name it.
    fn endpoint(&self) -> &str;

    /// All that there is at this moment.
    fn list(&mut self) -> impl Future<Output = Result<Listing, RuntimeError>> + Send;

    /// Waits until something may have changed. Returns at once where that is not known, after a
    /// short while where the runtime does not tell.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}

/// The cgroup of a container that one of its processes is in or below: a container may make cgroups
/// of its own, and systemd in one does. Runtimes name a container's by its id.
pub fn container_cgroup(cgroup: &Path, id: &str) -> PathBuf {
    let names = |path: &&Path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.contains(id))
    };
    // The outermost: what a container makes can have any name.
    cgroup.ancestors().filter(names).last().unwrap_or(cgroup).to_owned()
}

/// What a container with these arguments and this environment runs.
fn command(arguments: Vec<String>, environment: &[String]) -> Option<Command> {
    let path = environment.iter().rev().find_map(|variable| variable.strip_prefix("PATH="));
    Some(Command {
        executable: arguments.into_iter().next()?,
        search_path: path.unwrap_or(SEARCH_PATH).to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_of_a_container_is_the_outermost_of_its_name() {
        for (cgroup, of_container) in [
            ("/kubepods/podx/abc", "/kubepods/podx/abc"),
            ("/kubepods/podx/abc/init.scope", "/kubepods/podx/abc"),
            ("/a.slice/docker-abc.scope/abc/below", "/a.slice/docker-abc.scope"),
            ("/elsewhere", "/elsewhere"),
        ] {
            assert_eq!(container_cgroup(Path::new(cgroup), "abc"), Path::new(of_container));
        }
    }
}
