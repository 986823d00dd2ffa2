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

/// Runs `granted` as a workload that is granted the API and `helpers`; nothing of it may be denied.
fn lives_with_the_guard(command: &Line, helpers: &[PathBuf]) {
    let site = Site::new();
    let finished = site.free(command);
    assert!(finished.status.success(), "without the guard: {command:?}: {finished:?}");
    let guard = Guard::start(&site.world, helpers);
    let finished = guard.exec(&site.world, IDENTITY, &["test:base"], Mode::Enforce, command);
    assert!(finished.status.success(), "{command:?}: {finished:?}");
    let denied: Vec<_> =
        guard.audit_records().into_iter().filter(|record| record["verdict"] == "deny").collect();
    assert!(denied.is_empty(), "{command:?}: {denied:#?}");
}

fn python_lives(code: &str, helpers: &[PathBuf]) {
    let python = python();
    lives_with_the_guard(&line(&[&python, &"-c", &code]), helpers);
}

#[test]
fn python_shares_objects_among_its_processes() {
    let code = "import multiprocessing as m
def add(shared): shared.append(m.current_process().name)
if __name__ == '__main__':
    m.set_start_method('fork')
    with m.Manager() as manager:
        shared = manager.list()
        all = [m.Process(target=add, args=(shared,)) for _ in range(3)]
        [p.start() for p in all]; [p.join() for p in all]
        assert len(shared) == 3, shared
    queue = m.Queue()
    p = m.Process(target=queue.put, args=(1,)); p.start()
    assert queue.get(timeout=5) == 1; p.join()
    here, there = m.Pipe(); there.send(2); assert here.recv() == 2
";
    python_lives(code, &[]);
}

#[test]
fn python_runs_pools_and_servers_of_its_own() {
    let code = "import asyncio, concurrent.futures as f, os, socket, tempfile, threading
with f.ProcessPoolExecutor(2) as pool: assert list(pool.map(abs, [-1, -2])) == [1, 2]
async def main():
    directory = tempfile.TemporaryDirectory()
    path = os.path.join(directory.name, 's')
    async def serve(r, w): w.write(await r.readline()); await w.drain(); w.close()
    server = await asyncio.start_unix_server(serve, path)
    r, w = await asyncio.open_unix_connection(path)
    w.write(b'x\\n'); assert await r.readline() == b'x\\n'
    p = await asyncio.create_subprocess_exec('cat', stdin=-1, stdout=-1)
    assert (await p.communicate(b'y'))[0] == b'y'
asyncio.run(main())
a = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); a.bind('\\0agt-%d' % os.getpid())
b = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); b.sendto(b'z', a.getsockname())
assert a.recv(9) == b'z'
assert socket.if_nameindex()
socket.getaddrinfo('localhost', 80)
try: socket.getaddrinfo('127.0.0.1', 80, flags=socket.AI_ADDRCONFIG)
except socket.gaierror: pass
";
    python_lives(code, &[which("cat")]);
}

#[test]
fn node_talks_to_its_children_and_itself() {
    let code = "const fs = require('fs'), net = require('net'), os = require('os'), path = require('path');
const { fork, execFileSync } = require('child_process'), { Worker } = require('worker_threads');
if (process.argv[2] === 'child') { process.on('message', m => { process.send(m + 1);
  process.disconnect() }) } else {
  os.networkInterfaces();
  if (execFileSync('cat', { input: 'x' }).toString() !== 'x') process.exit(3);
  const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'agt-')), at = path.join(directory, 's');
  process.on('exit', () => fs.rmSync(directory, { recursive: true }));
  const server = net.createServer(s => s.pipe(s)).listen(at, () => {
    const c = net.connect(at, () => c.write('y'));
    c.on('data', () => { c.end(); server.close(); });
  });
  const child = fork(__filename, ['child']);
  child.on('message', m => { if (m !== 2) process.exit(4) }); child.send(1);
  new Worker('require(\"worker_threads\").parentPort.postMessage(1)', { eval: true })
    .on('message', m => { if (m !== 1) process.exit(5) });
}
";
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("program.js");
    fs::write(&file, code).unwrap();
    let node = which("node");
    lives_with_the_guard(&line(&[&node, &file]), &[node.clone(), which("cat")]);
}

#[test]
fn shells_run_pipelines_and_substitutions() {
    let bash = which("bash");
    let code = "set -e -o pipefail; x=$(printf 'b\\na\\n' | sort | head -1); test \"$x\" = a;
        diff <(echo 1) <(echo 1); coproc cat; echo hi >&${COPROC[1]}; read -r y <&${COPROC[0]};
        test \"$y\" = hi; (sleep 0 & wait); printf x | xargs -n1 env true";
    let helpers: Vec<PathBuf> =
        ["sort", "head", "diff", "cat", "sleep", "xargs", "env", "true"].map(which).into();
    lives_with_the_guard(&line(&[&bash, &"-c", &code]), &helpers);
}

#[test]
fn git_works_on_a_repository_of_its_own() {
    let git = which("git");
    let directory = tempfile::tempdir().unwrap();
    let code = format!(
        "set -e; cd {0}; rm -rf f .git; git init -q .; echo x > f; git add f; \
         git -c user.name=a -c user.email=a@example.org commit -qm first; \
         git clone -q . clone; git -C clone log --oneline; git gc -q; rm -rf clone",
        directory.path().display()
    );
    let told = run(Command::new(&git).arg("--exec-path"), PATIENCE).expect_success("git");
    let core = Path::new(told.stdout.trim()).to_owned();
    let mut helpers: Vec<PathBuf> = ["git", "rm", "sh", "cat"].map(which).into();
    helpers.push(core.join("git"));
    // The files it calls itself by may be the same, or links to it.
    helpers.dedup();
    lives_with_the_guard(&line(&[&which("bash"), &"-c", &code]), &helpers);
}

#[test]
fn names_are_looked_up_and_addresses_listed() {
    let ip = which("ip");
    let code = format!(
        "set -e; {0} addr; {0} route; {0} -6 route; getent passwd root; \
                        id; hostname",
        ip.display()
    );
    let helpers: Vec<PathBuf> = ["ip", "getent", "id", "hostname"].map(which).into();
    lives_with_the_guard(&line(&[&which("bash"), &"-c", &code]), &helpers);
}
