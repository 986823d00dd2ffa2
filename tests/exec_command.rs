//! `agentguard exec` as a shell's user sees it, beside a daemon and without one.

use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use agentguard_tests::{
    Finished, Running,
    daemon::{Daemon, Prober, Reachable, program, scope_of},
    run, wait_until,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(30);

/// With a daemon, and without one.
fn both(test: impl Fn(&Daemon)) {
    let daemon = Daemon::started();
    test(&daemon);
    drop(daemon);
    let alone = Daemon::installed();
    test(&alone);
    assert_eq!(pins_of_supervisors(&alone), Vec::<PathBuf>::new(), "pins stay");
}

fn pins_of_supervisors(daemon: &Daemon) -> Vec<PathBuf> {
    let prefix = format!("{}-exec-", daemon.pins().display());
    let found = fs::read_dir("/sys/fs/bpf").into_iter().flatten().flatten();
    found
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().starts_with(&prefix))
        .collect()
}

fn exec(daemon: &Daemon, command: &[&str]) -> Finished {
    daemon.run(["exec", "--"].iter().chain(command))
}

#[test]
fn a_command_ends_as_it_would_by_itself() {
    both(|daemon| {
        assert_eq!(exec(daemon, &["bash", "-c", "exit 7"]).status.code(), Some(7));
        let killed = exec(daemon, &["bash", "-c", "kill -TERM $$"]).status;
        let by_shell = Command::new("bash")
            .args(["-c", "\"$@\"; exit $?", "bash"])
            .arg(program())
            .args(["exec", "--", "bash", "-c", "kill -TERM $$"])
            .env("AGENTGUARD_CONFIG", daemon.config())
            .status()
            .unwrap();
        assert_eq!(by_shell.code(), Some(143), "{killed}");
        let missing = exec(daemon, &["no-such-command-anywhere"]);
        assert_eq!(missing.status.code(), Some(127), "{missing:?}");
        let quiet = exec(daemon, &["true"]);
        assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""), "nothing of its own");
        let data = exec(daemon, &["/etc/passwd"]);
        assert_eq!(data.status.code(), Some(126), "{data:?}");
    });
}

#[test]
fn a_signal_that_is_sent_to_it_reaches_the_command() {
    both(|daemon| {
        let script =
            "trap 'echo told; exit 9' TERM; echo ready; while :; do read -t 1 <> <(:); done";
        let mut command = daemon.command(["exec", "--", "bash", "-c", script]);
        let mut running = Running::start(&mut command);
        running.said("ready", PATIENCE);
        kill(Pid::from_raw(running.pid().cast_signed()), Signal::SIGTERM).unwrap();
        let ended = running.wait(PATIENCE).expect("it ends");
        assert_eq!(ended.status.code(), Some(9), "{ended:?}");
        assert!(ended.stdout.contains("told"), "{ended:?}");
    });
}

#[test]
fn input_and_output_pass_through() {
    both(|daemon| {
        let mut command = daemon.command(["exec", "--", "cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let sent: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let mut stdin = child.stdin.take().unwrap();
        let expected = sent.clone();
        let writer = thread::spawn(move || stdin.write_all(&sent).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success());
        assert!(output.stdout == expected, "{} bytes came back", output.stdout.len());
    });
}

/// A terminal with a shell in it, to type into.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    typescript: PathBuf,
}

impl Terminal {
    fn open(daemon: &Daemon) -> Self {
        let typescript = daemon.path("typescript");
        let mut command = Command::new("script");
        command.args(["-qfec", "bash --norc --noprofile -i"]).arg(&typescript);
        let path = program();
        let path = format!("{}:/usr/bin:/bin", path.parent().unwrap().display());
        command.env("AGENTGUARD_CONFIG", daemon.config()).env("PATH", path).env("PS1", "$ ");
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().expect("script is installed (package bsdutils)");
        let keys = child.stdin.take().unwrap();
        Self { child, keys, typescript }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    fn screen(&self) -> String {
        let bytes = fs::read(&self.typescript).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[track_caller]
    fn shows(&self, text: &str) {
        let start = Instant::now();
        while !self.screen().contains(text) {
            assert!(start.elapsed() < PATIENCE, "no {text:?} on the screen: {}", self.screen());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

#[test]
fn a_terminal_works_as_without_it() {
    both(|daemon| {
        let script = daemon.path("job.py");
        // Not a shell's: bash lost an interrupt now and then, in a bare terminal too when it came while
        // bash made a process.
        fs::write(
            &script,
            "import os, signal, sys, time\n\
             def interrupted(*_):\n    os.write(1, b'interrupted\\n')\n    sys.exit(5)\n\
             signal.signal(signal.SIGWINCH, lambda *_: os.write(1, b'size-changed\\n'))\n\
             signal.signal(signal.SIGINT, interrupted)\n\
             os.write(1, b'job-is-running\\n')\n\
             n = 0\n\
             while True:\n    time.sleep(0.2)\n    n += 1\n    \
             open(sys.argv[1], 'w').write(f'tick-{n}')\n",
        )
        .unwrap();
        let ticks = daemon.path("ticks");
        let tick = || fs::read_to_string(&ticks).unwrap_or_default();
        let mut terminal = Terminal::open(daemon);
        terminal.press("tty\n");
        terminal.press(&format!(
            "agentguard exec -- python3 {} {}\n",
            script.display(),
            ticks.display()
        ));
        terminal.shows("job-is-running\r");
        wait_until("it runs", || !tick().is_empty());
        terminal.press("\x1a");
        terminal.shows("Stopped");
        thread::sleep(Duration::from_millis(500));
        let stopped = tick();
        thread::sleep(Duration::from_millis(700));
        assert_eq!(tick(), stopped, "it stands still");
        terminal.press("fg\n");
        wait_until("it goes on", || tick() != stopped);
        let screen = terminal.screen();
        let (_, rest) = screen.split_once("/dev/pts/").expect("tty says it");
        let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let device = &format!("/dev/pts/{number}");
        let mut stty = Command::new("stty");
        run(stty.args(["-F", device, "rows", "51", "cols", "123"]), PATIENCE)
            .expect_success("stty");
        terminal.shows("size-changed\r");
        terminal.press("\x03");
        terminal.shows("interrupted");
        terminal.press("echo status-$?\n");
        terminal.shows("status-5");
    });
}

#[test]
fn what_it_costs_to_start() {
    let measure = |daemon: &Daemon| {
        let mut times: Vec<Duration> = (0..20)
            .map(|_| {
                let start = Instant::now();
                let status = daemon.command(["exec", "--", "/bin/true"]).status().unwrap();
                assert!(status.success());
                start.elapsed()
            })
            .collect();
        times.sort();
        (times[10], times[19])
    };
    let daemon = Daemon::started();
    println!("exec -- /bin/true beside a daemon, median and slowest: {:?}", measure(&daemon));
    drop(daemon);
    let alone = Daemon::installed();
    println!("exec -- /bin/true standalone, median and slowest: {:?}", measure(&alone));
}

#[test]
fn one_user_can_run_the_same_command_many_times_at_once() {
    let daemon = Daemon::started();
    let mut probers: Vec<Prober> =
        (0..6).map(|_| Prober::start_by(daemon.command_of_user(["exec"]))).collect();
    let server = Reachable::start();
    for prober in &mut probers {
        assert!(!prober.reaches(server.port()));
    }
    assert_eq!(daemon.workloads().len(), 6);
    let taken = daemon.run_as_user(["exec", "--name", "bash", "--", "true"]);
    assert!(!taken.status.success(), "a name that was chosen is taken: {taken:?}");
}

#[test]
fn two_supervisors_do_not_share_a_cgroup() {
    let daemon = Daemon::installed();
    let server = Reachable::start();
    let mut first = Prober::start_by(daemon.command(["exec"]));
    let second = Prober::start_by(daemon.command(["exec"]));
    drop(second);
    wait_until("the second's pins are gone or its command is held", || {
        pins_of_supervisors(&daemon).len() <= 2
    });
    assert!(!first.reaches(server.port()), "the first is still there and held");
}

#[test]
fn without_a_daemon_scopes_come_from_the_manifests_and_denials_are_told() {
    let daemon = Daemon::installed();
    let server = Reachable::start();
    daemon.write(
        "scope",
        &[scope_of(
            "test:server",
            json!({"egress": [{
                "to": [{"ipBlock": {"cidr": "127.0.0.1/32"}}],
                "ports": [{"protocol": "TCP", "port": server.port()}],
            }]}),
        )],
    );
    let connect = |port: u16| format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
    let granted = ["exec", "--scope", "test:server", "--", "bash", "-c", &connect(server.port())];
    daemon.run(granted).expect_success("what is granted");
    let denied = daemon.run(["exec", "--", "bash", "-c", &connect(server.port())]);
    assert!(!denied.status.success());
    assert!(denied.stderr.contains("agentguard: denied: "), "{denied:?}");
    let unknown = daemon.run(["exec", "--scope", "no:such", "--", "true"]);
    assert!(unknown.stderr.contains("no:such"), "{unknown:?}");
    assert_eq!(pins_of_supervisors(&daemon), Vec::<PathBuf>::new());
}

#[test]
fn a_command_whose_supervisor_was_killed_stays_held_until_the_next_run_clears_up() {
    let daemon = Daemon::installed();
    let server = Reachable::start();
    let done = daemon.path("done");
    let script = format!(
        "echo ready; while [ ! -e {go} ]; do read -t 0.05 <> <(:); done; \
         (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null && echo yes > {done} || echo no > {done}; \
         while [ -e {go} ]; do read -t 0.05 <> <(:); done",
        go = daemon.path("go").display(),
        done = done.display(),
        port = server.port()
    );
    let mut command = daemon.command(["exec", "--name", "orphan", "--", "bash", "-c", &script]);
    let mut supervisor = Running::start(&mut command);
    supervisor.said("ready", PATIENCE);
    supervisor.kill();
    let left = pins_of_supervisors(&daemon);
    assert_eq!(left.len(), 1, "{left:?}");
    fs::write(daemon.path("go"), "").unwrap();
    wait_until("the command tried", || {
        fs::read_to_string(&done).is_ok_and(|text| text.ends_with('\n'))
    });
    assert_eq!(fs::read_to_string(&done).unwrap().trim(), "no", "it is held");
    daemon.run(["exec", "--", "true"]).expect_success("exec");
    assert_eq!(pins_of_supervisors(&daemon), left, "as long as the command runs");
    fs::remove_file(daemon.path("go")).unwrap();
    wait_until("the next run clears up", || {
        daemon.run(["exec", "--", "true"]).expect_success("exec");
        pins_of_supervisors(&daemon).is_empty()
    });
    assert!(!daemon.exec_cgroups().join("orphan").exists());
}
