//! Unix sockets that are granted: their rows and names in the kernel's tables, and what a workload
//! then reaches.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{fs::MetadataExt as _, net::UnixListener},
    path::{Path, PathBuf},
    process,
};

use agentguard::allowlist::Permit;
use agentguard_common::{
    AllowlistId, Mode, RuleSetId, UnixNameId, UnixSocket, allowlist::UnixName, event::Hook,
};
use agentguard_tests::{Layer, requires};

use crate::fixture::{Fixture, standing};

const NAME: UnixNameId = UnixNameId(1);

/// A directory of one test's own.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("agentguard-unix-{}-{name}", process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A grant of one name here.
    fn permit(&self, name: UnixNameId) -> Permit {
        let metadata = fs::metadata(&self.0).unwrap();
        let (major, minor) =
            (nix::sys::stat::major(metadata.dev()), nix::sys::stat::minor(metadata.dev()));
        let device = u32::try_from(major << 20 | minor).unwrap();
        let socket = UnixSocket { directory: metadata.ino(), device, name };
        Permit { unix_sockets: vec![socket], ..standing() }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _gone_already = fs::remove_dir_all(&self.0);
    }
}

fn stream(path: &Path) -> String {
    format!("unix-stream {}", path.display())
}

#[test]
fn rows_and_names_come_and_go() {
    let mut fixture = Fixture::new();
    let directory = Directory::new("rows");
    let name = UnixName::path(b"tool.sock").unwrap();
    fixture.datapath.name_unix_socket(&name, NAME).unwrap();
    assert_eq!(fixture.datapath.unix_names(), [(name, NAME)]);
    let first = fixture.permit(Mode::Enforce, &[directory.permit(NAME)]);
    let second = fixture.permit(Mode::Enforce, &[directory.permit(UnixNameId(7))]);
    assert_eq!(fixture.entries("unix_sockets"), 2);
    assert_eq!(fixture.entries("unix_names"), 1);
    assert_eq!(fixture.datapath.highest_unix_name(), UnixNameId(7));
    fixture.datapath.drop_allowlist(&first).unwrap();
    assert_eq!(fixture.entries("unix_sockets"), 1);
    fixture.datapath.forget_unix_name(&name).unwrap();
    fixture.datapath.forget_unix_name(&name).unwrap();
    assert_eq!(fixture.datapath.unix_names(), []);
    let next = AllowlistId(second.allowlist.0 + 1);
    assert_eq!(fixture.datapath.sweep(next, RuleSetId(u32::MAX), &BTreeSet::new()).unwrap(), 1);
    assert_eq!(fixture.entries("unix_sockets"), 0);
}

mod lsm {
    use super::*;

    #[test]
    fn a_granted_socket_is_reached_each_time_its_server_makes_it_anew_and_its_neighbour_is_not() {
        requires(Layer::Lsm);
        let mut fixture = Fixture::new();
        let directory = Directory::new("granted");
        let mut worker = fixture.worker();
        let name = UnixName::path(b"tool.sock").unwrap();
        fixture.datapath.name_unix_socket(&name, NAME).unwrap();
        fixture.attach(Mode::Enforce, &[directory.permit(NAME)]);
        let (tool, other) = (directory.socket("tool.sock"), directory.socket("other.sock"));
        let _other = UnixListener::bind(&other).unwrap();
        for _ in 0..2 {
            let server = UnixListener::bind(&tool).unwrap();
            assert_eq!(worker.told(&stream(&tool)), "ok");
            assert_eq!(worker.told(&stream(&other)), "EPERM");
            drop(server);
            fs::remove_file(&tool).unwrap();
        }
        // The same name in another directory is another socket.
        let elsewhere = Directory::new("elsewhere");
        let _elsewhere = UnixListener::bind(elsewhere.socket("tool.sock")).unwrap();
        assert_eq!(worker.told(&stream(&elsewhere.socket("tool.sock"))), "EPERM");
        let denied: u64 = fixture
            .counters()
            .iter()
            .filter(|(hook, ..)| *hook == Hook::UnixStreamConnect)
            .filter(|(_, _, verdict, _)| verdict.reason().is_some())
            .map(|(.., count)| count)
            .sum();
        assert_eq!(denied, 3);
    }
}
