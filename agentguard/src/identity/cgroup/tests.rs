use agentguard_common::Mode;
use tempfile::TempDir;

use super::*;

fn workload(name: &str, selector: Selector) -> WorkloadDocument {
    WorkloadDocument {
        name: name.parse().unwrap(),
        selector,
        spiffe_id: format!("spiffe://example.org/{name}").parse().unwrap(),
        mode: Mode::Enforce,
    }
}

fn at(name: &str, pattern: &str) -> WorkloadDocument {
    workload(name, Selector::Cgroup(pattern.parse().unwrap()))
}

fn unit(name: &str, unit: &str) -> WorkloadDocument {
    workload(name, Selector::SystemdUnit(unit.parse().unwrap()))
}

fn tree(cgroups: &[&str]) -> TempDir {
    let tree = TempDir::new().unwrap();
    for cgroup in cgroups {
        fs::create_dir_all(tree.path().join(cgroup)).unwrap();
    }
    tree
}

fn source(tree: &TempDir, documents: Vec<WorkloadDocument>) -> CgroupSource {
    let mut source = CgroupSource::new(tree.path().to_owned());
    source.set_selectors(documents);
    source
}

/// `+ cgroup name` for what came, `- cgroup` for what went.
fn lines(scan: &Scan) -> Vec<String> {
    let line = |event: &IdentityEvent| match event {
        IdentityEvent::Appeared(found) => format!("+ {} {}", found.cgroup.display(), found.name),
        IdentityEvent::Gone { cgroup } => format!("- {}", cgroup.display()),
    };
    scan.events.iter().map(line).collect()
}

#[test]
fn every_cgroup_that_matches_is_reported_once() {
    let tree = tree(&["agents.slice/r-1.service/child", "agents.slice/r-2.service", "other"]);
    fs::write(tree.path().join("agents.slice/r-3.service"), "a file").unwrap();
    let mut source = source(&tree, vec![at("r", "/agents.slice/r-*.service")]);
    let scan = source.scan().unwrap();
    assert_eq!(lines(&scan), ["+ /agents.slice/r-1.service r", "+ /agents.slice/r-2.service r"]);
    assert_eq!(scan.problems, []);
    let IdentityEvent::Appeared(found) = &scan.events[0] else { panic!("{scan:?}") };
    let status = fs::metadata(tree.path().join("agents.slice/r-1.service")).unwrap();
    assert_eq!(found.id, CgroupId(status.ino()));
    assert_eq!((found.source, found.owner_uid, found.mode), ("cgroup", None, Mode::Enforce));
    assert_eq!(source.scan().unwrap(), Scan::default());
}

#[test]
fn what_goes_and_what_takes_its_place_is_reported() {
    let tree = tree(&["a", "b"]);
    let mut source = source(&tree, vec![at("x", "/*")]);
    source.scan().unwrap();
    fs::remove_dir(tree.path().join("b")).unwrap();
    assert_eq!(lines(&source.scan().unwrap()), ["- /b"]);
    // The new directory is made first, so that it can not get the inode number of the old one.
    fs::create_dir(tree.path().join("new")).unwrap();
    fs::remove_dir(tree.path().join("a")).unwrap();
    fs::rename(tree.path().join("new"), tree.path().join("a")).unwrap();
    assert_eq!(lines(&source.scan().unwrap()), ["- /a", "+ /a x"]);
    source.set_selectors(vec![at("y", "/a")]);
    assert_eq!(lines(&source.scan().unwrap()), ["- /a", "+ /a y"]);
    source.set_selectors(vec![]);
    assert_eq!(lines(&source.scan().unwrap()), ["- /a"]);
}

#[test]
fn a_unit_is_found_in_slices_and_nowhere_else() {
    let tree = tree(&[
        "system.slice/system-r.slice/r.service",
        "user.slice/user-1000.slice/user@1000.service/app.slice/r.service",
        "docker/0123/system.slice/r.service",
        "top.scope",
    ]);
    let mut source = source(&tree, vec![unit("r", "r.service"), unit("t", "top.scope")]);
    let found = lines(&source.scan().unwrap());
    assert_eq!(found, ["+ /system.slice/system-r.slice/r.service r", "+ /top.scope t"]);
}

#[test]
fn of_two_declarations_for_one_cgroup_the_one_in_force_stays() {
    let tree = tree(&["a"]);
    let mut source = source(&tree, vec![at("m", "/a")]);
    source.scan().unwrap();
    source.set_selectors(vec![at("b", "/*"), at("m", "/a")]);
    let scan = source.scan().unwrap();
    assert_eq!(scan.events, []);
    let (kept, refused) = ("m".to_owned(), "b".to_owned());
    let cgroup = PathBuf::from("/a");
    assert_eq!(scan.problems, [SourceProblem::Duplicate { cgroup, kept, refused }]);
    let same = WorkloadDocument { name: "z".parse().unwrap(), ..at("m", "/*") };
    source.set_selectors(vec![same, at("m", "/a")]);
    assert_eq!(source.scan().unwrap(), Scan::default());
}

#[test]
fn a_workload_inside_of_another_is_refused() {
    let tree = tree(&["a/b/c", "a.b"]);
    let mut source = source(&tree, vec![at("inner", "/a/b/c"), at("outer", "/a")]);
    let scan = source.scan().unwrap();
    assert_eq!(lines(&scan), ["+ /a outer"]);
    let problem = SourceProblem::Nested {
        cgroup: PathBuf::from("/a/b/c"),
        outer: PathBuf::from("/a"),
        kept: "outer".to_owned(),
        refused: "inner".to_owned(),
    };
    assert_eq!(scan.problems, [problem]);
}

#[test]
fn a_root_that_is_not_there_is_an_error_and_nothing_is_gone() {
    let tree = tree(&["root/a"]);
    let mut source = CgroupSource::new(tree.path().join("root"));
    source.set_selectors(vec![at("a", "/a")]);
    source.scan().unwrap();
    fs::rename(tree.path().join("root"), tree.path().join("moved")).unwrap();
    let error = source.scan().unwrap_err();
    assert!(matches!(error, SourceError::CgroupRoot { .. }), "{error}");
    fs::rename(tree.path().join("moved"), tree.path().join("root")).unwrap();
    assert_eq!(source.scan().unwrap(), Scan::default());
}

#[tokio::test]
async fn a_cgroup_that_comes_is_announced_before_the_rescan() {
    let tree = tree(&["agents.slice", "other"]);
    let mut source = source(&tree, vec![at("r", "/agents.slice/r-*/x")]);
    let watch = source.watch().unwrap();
    let watched: Vec<_> = watch.watched().collect();
    assert_eq!(watched, [tree.path().join("agents.slice")]);
    // A scan reads what is watched, which must not announce itself.
    source.scan().unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(200), watch.changed()).await;
    assert!(quiet.is_err(), "announced without a change");
    fs::create_dir(tree.path().join("agents.slice/r-1")).unwrap();
    tokio::time::timeout(Duration::from_millis(900), watch.changed()).await.unwrap();
    // Nothing more happens, so that this is the rescan.
    watch.changed().await;
}

#[test]
fn the_watch_follows_the_directories_that_come_and_go() {
    let tree = tree(&[]);
    let source = source(&tree, vec![at("r", "/a/b/r"), unit("u", "u.service")]);
    let mut watch = source.watch().unwrap();
    assert_eq!(watch.watched().count(), 0);
    fs::create_dir_all(tree.path().join("a/b")).unwrap();
    fs::create_dir_all(tree.path().join("s.slice")).unwrap();
    watch.follow(&source);
    assert_eq!(watch.watched().count(), 3);
    fs::remove_dir_all(tree.path().join("a/b")).unwrap();
    watch.follow(&source);
    assert_eq!(watch.watched().count(), 2);
}

/// A cgroup of this test alone, gone at its end.
struct OwnCgroup(PathBuf);

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        for path in [self.0.join("agent/child"), self.0.join("agent"), self.0.clone()] {
            // What the test removed itself is gone already.
            drop(fs::remove_dir(path));
        }
    }
}

#[tokio::test]
async fn workloads_come_and_go_in_the_real_cgroup_tree() {
    let mounts = procfs::process::Process::myself().unwrap().mountinfo().unwrap();
    let mount = mounts.0.iter().find(|mount| mount.fs_type == "cgroup2");
    let root = &mount.expect("cgroup v2 is not mounted; mount it to run this test").mount_point;
    let name = format!("agentguard-test-{}", std::process::id());
    let own = OwnCgroup(root.join(&name));
    fs::create_dir(&own.0).expect("run as root: this makes a cgroup");

    let mut source = CgroupSource::new(root.clone());
    source.set_selectors(vec![at("agent", &format!("/{name}/ag*"))]);
    let watch = source.watch().unwrap();
    assert_eq!(source.scan().unwrap(), Scan::default());
    fs::create_dir_all(own.0.join("agent/child")).unwrap();
    tokio::time::timeout(Duration::from_millis(900), watch.changed()).await.unwrap();
    assert_eq!(lines(&source.scan().unwrap()), [format!("+ /{name}/agent agent")]);
    fs::remove_dir(own.0.join("agent/child")).unwrap();
    fs::remove_dir(own.0.join("agent")).unwrap();
    assert_eq!(lines(&source.scan().unwrap()), [format!("- /{name}/agent")]);
}
