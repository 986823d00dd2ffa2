use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
};

use tempfile::TempDir;

use super::*;

struct Tree(TempDir);

impl Tree {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    fn directory(&self, path: &str) -> &Self {
        fs::create_dir_all(self.at(path)).unwrap();
        self
    }

    fn file(&self, path: &str, mode: u32) -> &Self {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), "#!/bin/sh\n").unwrap();
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode)).unwrap();
        self
    }

    fn link(&self, path: &str, target: &str) -> &Self {
        symlink(target, self.at(path)).unwrap();
        self
    }

    fn resolver(&self) -> Resolver {
        Resolver::new(self.0.path().to_owned())
    }

    fn resolve(&self, text: &str) -> Resolution {
        self.resolver().resolve(&pattern(text)).unwrap()
    }

    fn inode(&self, path: &str) -> u64 {
        fs::metadata(self.at(path)).unwrap().ino()
    }
}

fn pattern(text: &str) -> ExecutablePattern {
    text.parse().unwrap()
}

fn paths(resolution: &Resolution) -> Vec<&str> {
    resolution.files.iter().map(|file| file.path.to_str().unwrap()).collect()
}

fn pinned(pins: &mut Pinned, tree: &Tree, texts: &[&str]) -> Resolution {
    let patterns: Vec<_> = texts.iter().map(|text| pattern(text)).collect();
    pins.resolve(&tree.resolver(), &patterns, Admission::OnRefresh).unwrap()
}

#[test]
fn an_exact_path_is_its_file_as_the_kernel_numbers_it() {
    let tree = Tree::new();
    tree.file("/bin/tool", 0o755);
    let resolution = tree.resolve("/bin/tool");
    assert_eq!(paths(&resolution), ["/bin/tool"]);
    assert_eq!(resolution.problems, []);
    let FileId { inode, device, generation } = resolution.files[0].id;
    assert_eq!((inode, generation), (tree.inode("/bin/tool"), 0));
    // The device is the one that the list of mounts has for it, in the kernel's own encoding.
    let infos = File::open("/proc/self/mountinfo").unwrap();
    let infos = MountInfos::from_buf_read(BufReader::new(infos)).unwrap();
    let known =
        infos.0.iter().any(|info| info.majmin == format!("{}:{}", device >> 20, device & 0xf_ffff));
    assert!(known, "no mount has device {device:#x}");
}

#[test]
fn links_are_followed_within_the_workloads_root() {
    let tree = Tree::new();
    tree.file("/usr/bin/tool-1", 0o755)
        .directory("/etc")
        .link("/etc/tool", "/usr/bin/tool-1")
        .link("/usr/bin/tool", "/etc/tool")
        .link("/usr/bin/out", "../../../../../../../../../bin/sh")
        .link("/bin", "usr/bin");
    let resolution = tree.resolve("/bin/tool");
    assert_eq!(resolution.files[0].id.inode, tree.inode("/usr/bin/tool-1"));
    assert_eq!(tree.resolve("/bin/tool-1").files[0].id, resolution.files[0].id);
    // Above the root there is only the root, which has no `sh`.
    assert_eq!(
        tree.resolve("/bin/out").problems,
        [ResolveProblem::Missing { pattern: pattern("/bin/out") }]
    );
}

#[test]
fn what_can_not_run_is_named() {
    let tree = Tree::new();
    tree.file("/bin/data", 0o644).directory("/bin/directory").link("/bin/loop", "loop");
    let problem = |text| tree.resolve(text).problems;
    let path = PathBuf::from("/bin/data");
    assert_eq!(problem("/bin/data"), [ResolveProblem::NotExecutable { path }]);
    let path = PathBuf::from("/bin/directory");
    assert_eq!(problem("/bin/directory"), [ResolveProblem::NotAFile { path }]);
    for text in ["/bin/none", "/none/none", "/bin/data/none", "/bin/loop", "/no*", "/none/**"] {
        let pattern = pattern(text);
        assert_eq!(problem(text), [ResolveProblem::Missing { pattern }], "{text}");
    }
}

#[test]
fn a_glob_is_the_programs_of_one_level() {
    let tree = Tree::new();
    tree.file("/bin/py3", 0o755)
        .file("/bin/py3.12", 0o700)
        .file("/bin/py.txt", 0o644)
        .file("/bin/py-dir/py", 0o755)
        .file("/bin/sh", 0o755);
    assert_eq!(paths(&tree.resolve("/bin/py*")), ["/bin/py3", "/bin/py3.12"]);
    assert_eq!(paths(&tree.resolve("/*/py*/py")), ["/bin/py-dir/py"]);
}

#[test]
fn a_tree_is_every_program_that_lies_in_it() {
    let tree = Tree::new();
    tree.file("/lib/git/a", 0o755)
        .file("/lib/git/sub/deep/b", 0o711)
        .file("/lib/git/sub/data", 0o644)
        .file("/elsewhere/c", 0o755)
        .link("/lib/git/linked-file", "/elsewhere/c")
        .link("/lib/git/linked-directory", "/elsewhere")
        .link("/lib64", "lib");
    let expected = ["/lib/git/a", "/lib/git/sub/deep/b"];
    assert_eq!(paths(&tree.resolve("/lib/git/**")), expected);
    assert_eq!(paths(&tree.resolve("/lib/*/**")), expected);
    // The tree's own path may lead through a link: its author wrote it.
    assert_eq!(paths(&tree.resolve("/lib64/git/**")), ["/lib64/git/a", "/lib64/git/sub/deep/b"]);
    assert_eq!(paths(&tree.resolve("/**")).len(), 3);
}

#[test]
fn a_file_with_two_names_is_one_file() {
    let tree = Tree::new();
    tree.file("/bin/a", 0o755);
    fs::hard_link(tree.at("/bin/a"), tree.at("/bin/b")).unwrap();
    assert_eq!(paths(&tree.resolve("/bin/**")), ["/bin/a"]);
    let both = pinned(&mut Pinned::default(), &tree, &["/bin/b", "/bin/*"]);
    assert_eq!(paths(&both), ["/bin/b"]);
}

#[test]
fn a_set_user_id_program_is_a_program() {
    let tree = Tree::new();
    tree.file("/bin/su", 0o4755);
    assert_eq!(paths(&tree.resolve("/bin/su")), ["/bin/su"]);
}

#[test]
fn a_tree_is_searched_to_its_limits_and_no_further() {
    let tree = Tree::new();
    let deepest = format!("/t{}", "/d".repeat(MAX_DEPTH));
    let below = format!("{deepest}/d");
    tree.file(&format!("{deepest}/in"), 0o755).file(&format!("{below}/out"), 0o755);
    let resolution = tree.resolve("/t/**");
    assert_eq!(paths(&resolution), [format!("{deepest}/in")]);
    let directory = PathBuf::from(below);
    assert_eq!(
        resolution.problems,
        [ResolveProblem::TooDeep { pattern: pattern("/t/**"), directory }]
    );
}

#[test]
fn a_tree_of_too_many_programs_is_reported() {
    let tree = Tree::new();
    tree.file("/t/0", 0o755);
    // One file of many names is as good: names are counted, and it saves the inodes. A file
    // system may bound its links, so that another one is begun from time to time.
    let mut first = tree.at("/t/0");
    for number in 1..=MAX_FILES {
        let name = tree.at(&format!("/t/{number}"));
        if fs::hard_link(&first, &name).is_err() {
            tree.file(&format!("/t/{number}"), 0o755);
            first = name;
        }
    }
    let resolution = tree.resolve("/t/**");
    assert!(!resolution.files.is_empty());
    assert_eq!(resolution.problems, [ResolveProblem::TooMany { pattern: pattern("/t/**") }]);
}

#[test]
fn the_programs_of_this_host_are_found_in_its_own_root() {
    let own = Resolver::new(PathBuf::from("/proc/self/root"));
    let host = Resolver::new(PathBuf::from("/"));
    let shell = own.resolve(&pattern("/bin/sh")).unwrap();
    assert_eq!(paths(&shell), ["/bin/sh"]);
    assert_eq!(host.resolve(&pattern("/bin/sh")).unwrap(), shell);
    // Nothing the kernel makes up is a program.
    assert!(host.resolve(&pattern("/proc/**")).unwrap().files.is_empty());
}

#[test]
fn a_root_that_is_gone_is_an_error() {
    let gone = Resolver::new(PathBuf::from("/proc/0/root"));
    let error = gone.resolve(&pattern("/bin/sh")).unwrap_err();
    assert!(matches!(error, ResolveError::Root { .. }), "{error}");
}

#[test]
fn a_replaced_file_is_reported_and_neither_file_is_granted() {
    let tree = Tree::new();
    tree.file("/bin/tool", 0o755);
    let mut pins = Pinned::default();
    let first = pinned(&mut pins, &tree, &["/bin/tool"]);
    assert_eq!(pinned(&mut pins, &tree, &["/bin/tool"]), first);

    tree.file("/bin/new", 0o755);
    fs::rename(tree.at("/bin/new"), tree.at("/bin/tool")).unwrap();
    let second = pinned(&mut pins, &tree, &["/bin/tool", "/bin/*"]);
    let (was, now) = (first.files[0].id, tree.resolve("/bin/tool").files[0].id);
    let path = PathBuf::from("/bin/tool");
    assert_eq!(second.files, []);
    assert_eq!(second.problems, [ResolveProblem::Changed { path, was, now }]);

    pins.refresh();
    assert_eq!(pinned(&mut pins, &tree, &["/bin/tool"]).files[0].id, now);
}

#[test]
fn a_new_file_with_the_inode_number_of_the_old_one_is_another_file() {
    let born = |second| Some((second, 0));
    let id = FileId { inode: 7, device: 1, generation: 0 };
    let tree = Tree::new();
    let root = tree.resolver().open().unwrap();
    let (pin, now) = (Pin { id, born: born(1) }, Pin { id, born: born(2) });
    let path = PathBuf::from("/bin/tool");
    assert_eq!(root.compare(&path, pin, Some(pin)), Ok(id));
    let changed = ResolveProblem::Changed { path: path.clone(), was: id, now: id };
    assert_eq!(root.compare(&path, pin, Some(now)), Err(changed));
}

#[test]
fn a_file_that_is_written_in_place_stays_the_same_file() {
    let tree = Tree::new();
    tree.file("/bin/tool", 0o755);
    let mut pins = Pinned::default();
    let first = pinned(&mut pins, &tree, &["/bin/tool"]);
    fs::write(tree.at("/bin/tool"), "other").unwrap();
    assert_eq!(pinned(&mut pins, &tree, &["/bin/tool"]), first);
}

#[test]
fn a_file_that_is_gone_is_not_granted_until_it_is_back() {
    let tree = Tree::new();
    tree.file("/bin/tool", 0o755);
    let mut pins = Pinned::default();
    let first = pinned(&mut pins, &tree, &["/bin/*"]);
    fs::rename(tree.at("/bin/tool"), tree.at("/kept")).unwrap();
    let gone = pinned(&mut pins, &tree, &["/bin/*"]);
    assert_eq!(gone.files, []);
    let path = PathBuf::from("/bin/tool");
    let vanished = ResolveProblem::Vanished { path, was: first.files[0].id };
    assert!(gone.problems.contains(&vanished), "{:?}", gone.problems);
    fs::rename(tree.at("/kept"), tree.at("/bin/tool")).unwrap();
    assert_eq!(pinned(&mut pins, &tree, &["/bin/*"]), first);
}

#[test]
fn a_file_that_appears_in_a_tree_waits_for_a_refresh() {
    let tree = Tree::new();
    tree.file("/t/a", 0o755);
    let mut pins = Pinned::default();
    let first = pinned(&mut pins, &tree, &["/t/**"]);
    tree.file("/t/b", 0o755);
    let second = pinned(&mut pins, &tree, &["/t/**"]);
    assert_eq!(second.files, first.files);
    let id = tree.resolve("/t/b").files[0].id;
    let path = PathBuf::from("/t/b");
    assert_eq!(second.problems, [ResolveProblem::Appeared { path, id }]);
    pins.refresh();
    assert_eq!(paths(&pinned(&mut pins, &tree, &["/t/**"])), ["/t/a", "/t/b"]);
}

#[test]
fn a_pattern_that_is_granted_later_is_pinned_when_it_is_first_resolved() {
    let tree = Tree::new();
    tree.file("/t/a", 0o755);
    let mut pins = Pinned::default();
    pinned(&mut pins, &tree, &["/t/a"]);
    tree.file("/t/b", 0o755);
    assert_eq!(paths(&pinned(&mut pins, &tree, &["/t/a", "/t/b"])), ["/t/a", "/t/b"]);
}

#[test]
fn a_file_that_was_missing_is_granted_only_if_root_alone_can_have_made_it() {
    assert!(nix::unistd::geteuid().is_root(), "run as root: this makes files of root");
    let cases = [
        (0o755, 0o755, Admission::RootOwned, true),
        (0o775, 0o755, Admission::RootOwned, false),
        (0o755, 0o757, Admission::RootOwned, false),
        (0o755, 0o755, Admission::OnRefresh, false),
    ];
    for (file_mode, directory_mode, admission, granted) in cases {
        let tree = Tree::new();
        let mut pins = Pinned::default();
        let patterns = [pattern("/bin/tool")];
        let first = pins.resolve(&tree.resolver(), &patterns, admission).unwrap();
        let missing = ResolveProblem::Missing { pattern: patterns[0].clone() };
        assert_eq!(first, Resolution { files: vec![], problems: vec![missing] });
        tree.file("/bin/tool", file_mode);
        fs::set_permissions(tree.at("/bin"), fs::Permissions::from_mode(directory_mode)).unwrap();
        let second = pins.resolve(&tree.resolver(), &patterns, admission).unwrap();
        let case = (file_mode, directory_mode, admission);
        assert_eq!(second.files.len(), usize::from(granted), "{case:?}");
        let refused = matches!(second.problems.as_slice(), [ResolveProblem::Appeared { .. }]);
        assert_eq!(refused, !granted, "{case:?}");
    }
}

#[test]
fn mounts_without_workloads_are_forgotten() {
    let tree = Tree::new();
    tree.file("/bin/tool", 0o755);
    let mut pins = Pinned::default();
    pinned(&mut pins, &tree, &["/bin/tool"]);
    let own = tree.resolver().root_id().unwrap();
    pins.retain(|root| *root == own);
    assert_eq!(pins.roots().collect::<Vec<_>>(), [&own]);
    pins.retain(|_| false);
    assert_eq!(pins.roots().count(), 0);
}
