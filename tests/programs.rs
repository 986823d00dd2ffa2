//! Real programs, unchanged and unaware: each does what its scope grants and is refused the rest.
//!
//! Every program is first seen to reach and run what will be refused, with no guard.

use std::{
    ffi::OsString,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use agentguard_tests::{
    Finished, Guard, Layer, Mode, Running, World,
    address::{API, DATABASE},
    requires, run, wait_until,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(30);
const IDENTITY: &str = "spiffe://agentguard.test/program";
const SCOPE: &str = "test:programs";
const WEB: u16 = 8080;
const SHELL: u16 = 2222;
/// What the web server serves as `page`.
const PAGE: &str = "a page of the API";

/// A world with a web server on the API and on the database, and a file that is granted to nobody.
struct Site {
    // Ended before the namespace they live in is deleted.
    _servers: Vec<Running>,
    world: World,
}

/// A command line.
type Line = Vec<OsString>;

fn line(words: &[&dyn AsRef<std::ffi::OsStr>]) -> Line {
    words.iter().map(|word| word.as_ref().to_owned()).collect()
}

impl Site {
    fn new() -> Self {
        requires(Layer::Portable);
        let world = World::new();
        let root = world.directory().join("site");
        fs::create_dir(&root).unwrap();
        fs::write(root.join("page"), PAGE).unwrap();
        fs::copy(which("touch"), world.directory().join("outsider")).unwrap();
        let mut site = Self { _servers: Vec::new(), world };
        let port = WEB.to_string();
        let server = line(&[&python(), &"-m", &"http.server", &port, &"--directory", &root]);
        site.serve(&server, WEB);
        site
    }

    /// Runs a server on the server side, and waits until it listens.
    fn serve(&mut self, command: &Line, port: u16) {
        let mut enter = Command::new(agentguard_tests::attack_binary());
        enter.arg("enter").arg("--network").arg(self.world.network().server_file());
        self._servers.push(Running::start(enter.arg("--").args(command)));
        let at = SocketAddr::new(API, port).to_string();
        wait_until(&format!("{command:?} listens"), || {
            let mut curl = self.world.enter();
            curl.args(["--", "curl", "-s", "-o", "/dev/null", "--http0.9", "-m", "2", &at]);
            // 7: nobody listens. Anything else was an answer.
            run(&mut curl, PATIENCE).status.code() != Some(7)
        });
    }

    fn url(&self, address: std::net::IpAddr, path: &str) -> String {
        format!("http://{address}:{WEB}/{path}")
    }

    /// The file that is granted to nobody; it makes the file it is given.
    fn outsider(&self) -> PathBuf {
        self.world.directory().join("outsider")
    }

    /// What is there once the outsider has run.
    fn token(&self) -> PathBuf {
        self.world.directory().join("token")
    }

    fn free(&self, command: &Line) -> Finished {
        let mut enter = self.world.enter();
        run(enter.arg("--").args(command), PATIENCE)
    }

    /// Runs the three command lines: the first is granted, the second reaches the database, the
    /// third runs the outsider. `helpers` are what the program itself runs.
    fn hold(&self, granted: &Line, reach: &Line, launch: &Line, helpers: &[PathBuf]) {
        for command in [granted, reach, launch] {
            let finished = self.free(command);
            assert!(finished.status.success(), "without the guard: {command:?}: {finished:?}");
        }
        assert!(self.token().exists(), "{launch:?} did not run the outsider");
        fs::remove_file(self.token()).unwrap();

        let guard = Guard::start(&self.world, &[]);
        let exec: Vec<_> = helpers.iter().map(|path| json!({"path": path})).collect();
        let mut spec = json!({"egress": [{
            "to": [{"ipBlock": {"cidr": format!("{API}/32")}}],
            "ports": [{"protocol": "TCP", "port": WEB}, {"protocol": "TCP", "port": SHELL}],
        }]});
        if !exec.is_empty() {
            spec["exec"] = exec.into();
        }
        guard.define(SCOPE, &spec);
        guard.grant("programs", IDENTITY, SCOPE, Duration::from_secs(3600));
        let held = |command: &Line| guard.exec(&self.world, IDENTITY, &[], Mode::Enforce, command);
        let finished = held(granted);
        assert!(finished.status.success(), "granted: {granted:?}: {finished:?}");
        let denied: Vec<_> = guard
            .audit_records()
            .into_iter()
            .filter(|record| record["verdict"] == "deny")
            .collect();
        assert!(denied.is_empty(), "{granted:?}: {denied:#?}");

        let finished = held(reach);
        assert!(!finished.status.success(), "it reached the database: {reach:?}: {finished:?}");
        guard.recorded("the connect", |record| {
            record["verdict"] == "deny"
                && record["refused"] == true
                && record["workload"]["identity"] == IDENTITY
                && record["request"]["action"] == "connect"
                && record["request"]["address"] == DATABASE.to_string()
        });
        let _ended_in_its_own_way = held(launch);
        guard.recorded("the exec", |record| {
            record["verdict"] == "deny"
                && record["refused"] == true
                && record["workload"]["identity"] == IDENTITY
                && record["request"]["action"] == "exec"
                && record["request"]["path"] == self.outsider().to_string_lossy().as_ref()
        });
        assert!(!self.token().exists(), "the outsider ran: {launch:?}");
        guard.assert_chain_is_whole();
    }
}

/// A program of this machine.
fn which(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").expect("PATH is set");
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    let found = found.unwrap_or_else(|| panic!("{name} is missing; install it"));
    fs::canonicalize(found).expect("a file that is there has a path")
}

/// The interpreter itself: what is called `python3` may be a script that looks for it.
fn python() -> PathBuf {
    let told = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    let told = told.expect("python3 is missing; install it").stdout;
    fs::canonicalize(String::from_utf8_lossy(&told).trim()).expect("python3 knows where it is")
}

#[test]
fn curl_is_held_to_its_scope() {
    let site = Site::new();
    let curl = which("curl");
    let get = |address| line(&[&curl, &"-sf", &"-m", &"5", &site.url(address, "page")]);
    // It runs nothing, so a shell does in its stead.
    let shell = which("sh");
    let launch = format!("{} {}; :", site.outsider().display(), site.token().display());
    site.hold(&get(API), &get(DATABASE), &line(&[&shell, &"-c", &launch]), &[]);
}

#[test]
fn python_is_held_to_its_scope() {
    let site = Site::new();
    let python = python();
    let get = |address| {
        let code = "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5).read()";
        line(&[&python, &"-c", &code, &site.url(address, "page")])
    };
    let launch = "import subprocess, sys; subprocess.check_call(sys.argv[1:])";
    let launch = line(&[&python, &"-c", &launch, &site.outsider(), &site.token()]);
    site.hold(&get(API), &get(DATABASE), &launch, &[]);
}

#[test]
fn node_is_held_to_its_scope() {
    let site = Site::new();
    let node = which("node");
    let get = |address| {
        let code = "require('http').get(process.argv[1], r => r.resume())\
                    .on('error', e => { console.error(e.code); process.exit(1) })";
        line(&[&node, &"-e", &code, &site.url(address, "page")])
    };
    let launch = "const r = require('child_process').spawnSync(process.argv[1], [process.argv[2]]);\
                  process.exit(r.status ?? 1)";
    let launch = line(&[&node, &"-e", &launch, &site.outsider(), &site.token()]);
    site.hold(&get(API), &get(DATABASE), &launch, &[]);
}

#[test]
fn git_is_held_to_its_scope() {
    let site = Site::new();
    let git = which("git");
    let repository = site.world.directory().join("site/repository.git");
    let made = format!(
        "set -e; git init -q --bare {0}; git -C {0} -c user.name=a -c user.email=a@example.org \
         commit-tree -m first $(git -C {0} mktree </dev/null) > {0}/refs/heads/first; \
         git -C {0} update-server-info",
        repository.display()
    );
    run(Command::new("sh").args(["-c", &made]), PATIENCE).expect_success("a repository");
    let list =
        |address| line(&[&git, &"ls-remote", &"--exit-code", &site.url(address, "repository.git")]);
    let alias = format!("alias.out=!{}", site.outsider().display());
    let launch = line(&[&git, &"-c", &alias, &"out", &site.token()]);
    let told = run(Command::new(&git).arg("--exec-path"), PATIENCE).expect_success("git");
    let core = Path::new(told.stdout.trim());
    // Git runs itself and its transport from there, and aliases by the shell.
    let helpers = ["git", "git-remote-http"].map(|name| core.join(name));
    let helpers = [&helpers[..], &[which("sh")]].concat();
    site.hold(&list(API), &list(DATABASE), &launch, &helpers);
}

#[test]
fn ssh_is_held_to_its_scope() {
    let mut site = Site::new();
    let directory = site.world.directory().to_owned();
    let [host_key, key] = ["host-key", "key"].map(|name| directory.join(name));
    for path in [&host_key, &key] {
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path);
        run(&mut keygen, PATIENCE).expect_success("ssh-keygen");
    }
    let authorized = directory.join("key.pub");
    let configuration = directory.join("sshd_config");
    let text = format!(
        "Port {SHELL}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\n\
         PermitRootLogin prohibit-password\nPidFile none\n",
        host_key.display(),
        authorized.display()
    );
    fs::write(&configuration, text).unwrap();
    // Where its service never ran, sshd's empty directory is missing.
    fs::create_dir_all("/run/sshd").unwrap();
    site.serve(&line(&[&which("sshd"), &"-D", &"-e", &"-f", &configuration]), SHELL);
    let ssh = which("ssh");
    let to = |address: std::net::IpAddr, more: &[&str]| {
        let port = SHELL.to_string();
        let mut words = line(&[&ssh, &"-F", &"none", &"-p", &port, &"-i", &key]);
        for option in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "BatchMode=yes",
            "ConnectTimeout=5",
        ] {
            words.extend(["-o".into(), option.into()]);
        }
        words.extend(more.iter().map(Into::into));
        words.extend([format!("root@{address}").into(), "true".into()]);
        words
    };
    let command = format!("LocalCommand={} {}", site.outsider().display(), site.token().display());
    let launch = to(API, &["-o", "PermitLocalCommand=yes", "-o", &command]);
    // Ssh runs local commands by the user's shell.
    let shell = std::env::var_os("SHELL").map_or_else(|| "/bin/sh".into(), PathBuf::from);
    site.hold(&to(API, &[]), &to(DATABASE, &[]), &launch, &[shell, which("sh")]);
}

/// Compiles a program of one file.
fn compiled(site: &Site, options: &[&str]) -> PathBuf {
    let source = site.world.directory().join("program.c");
    let program = site.world.directory().join("program");
    fs::write(&source, include_str!("programs/program.c")).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-Wall", "-Werror", "-pthread"]).args(options).arg("-o").arg(&program).arg(&source);
    run(&mut cc, PATIENCE).expect_success("cc");
    program
}

fn hold_compiled(options: &[&str], threads: &str) {
    let site = Site::new();
    let program = compiled(&site, options);
    let port = WEB.to_string();
    let reach = |address: std::net::IpAddr| {
        line(&[&program, &"reach", &threads, &address.to_string(), &port])
    };
    let launch = line(&[&program, &"launch", &threads, &site.outsider(), &site.token()]);
    site.hold(&reach(API), &reach(DATABASE), &launch, &[]);
}

#[test]
fn a_statically_linked_program_is_held_to_its_scope() {
    hold_compiled(&["-static"], "1");
}

#[test]
fn a_program_of_many_threads_is_held_to_its_scope() {
    hold_compiled(&[], "16");
}
