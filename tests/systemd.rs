//! The unit that is shipped, under a real systemd: it says when it is ready, is started again when it
//! hangs or dies, and what it put in force stays there meanwhile, and after it was stopped.
//!
//! The tests install the unit on the machine they run on and kill its daemon, so that they run in a
//! machine of their own only: a row of the matrix promises one, this kernel's row does not.

mod systemd {
    mod package;

    use std::{
        fs,
        io::{self, Write as _},
        path::Path,
        process::Command,
        thread,
        time::{Duration, Instant},
    };

    use agentguard_tests::{
        Layer,
        daemon::{Reachable, grant, program, scope_of, workload},
        requires, run,
    };
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    use serde_json::{Value, json};

    const UNIT: &str = include_str!("../deploy/systemd/agentguard.service");
    const SERVICE: &str = "agentguard.service";
    /// The unit that is an agent.
    const AGENT: &str = "agent.service";
    const IDENTITY: &str = "spiffe://localhost/agent";
    const UNITS: &str = "/run/systemd/system";
    /// What the unit runs, which is at home in `/usr/bin`.
    const PROGRAM: &str = "/run/agentguard-program";
    /// What the agent writes, a line for each round: how the two ports answered.
    const LOG: &str = "/run/agent.log";
    /// How long systemd, or the daemon, may take on a machine that is emulated and busy.
    const PATIENCE: Duration = Duration::from_secs(300);
    /// In place of the unit's thirty seconds.
    const WATCHDOG: u64 = 10;

    /// The unit, its daemon, and what an agent is granted.
    struct Installed {
        granted: Reachable,
        denied: Reachable,
    }

    impl Installed {
        /// As an administrator does it, with what is granted before the first start.
        #[track_caller]
        fn started() -> Self {
            let installed = Self::with_nothing_started();
            if !Path::new(PROGRAM).exists() {
                fs::copy(program(), PROGRAM).unwrap();
            }
            assert!(
                UNIT.contains("ExecStart=/usr/bin/agentguard run\n"),
                "the unit runs the daemon"
            );
            let unit = UNIT.replace("/usr/bin/agentguard", PROGRAM);
            fs::write(format!("{UNITS}/{SERVICE}"), unit).unwrap();
            let drop_in = format!("{UNITS}/{SERVICE}.d");
            fs::create_dir_all(&drop_in).unwrap();
            fs::write(
                format!("{drop_in}/test.conf"),
                format!("[Service]\nWatchdogSec={WATCHDOG}\nTimeoutStartSec=300\n"),
            )
            .unwrap();
            systemctl(&["daemon-reload"]);
            systemctl(&["start", SERVICE]);
            installed
        }

        /// What an agent is and is granted, of which systemd is still to be told, and no daemon.
        #[track_caller]
        fn with_nothing_started() -> Self {
            requires(Layer::Portable);
            assert!(Path::new("/run/systemd/system").is_dir(), "systemd is not the first process");
            let installed = Self { granted: Reachable::start(), denied: Reachable::start() };
            let _not_there_yet = Command::new("systemctl").args(["stop", AGENT, SERVICE]).status();
            fs::create_dir_all("/etc/agentguard/manifests").unwrap();
            installed.write_manifests();
            // With `Requires=` systemd would start the agent anew with each daemon that dies.
            installed.write_agent("Wants");
            installed
        }

        fn write_manifests(&self) {
            let scope = scope_of(
                "agent:api",
                json!({
                    "egress": [{
                        "to": [{"ipBlock": {"cidr": "127.0.0.1/32"}}],
                        "ports": [{"protocol": "TCP", "port": self.granted.port()}],
                    }],
                    "exec": [{"path": "/usr/bin/bash"}],
                }),
            );
            let mut selected = workload("agent", "/", IDENTITY, "enforce");
            selected["spec"]["select"] = json!({"systemdUnit": AGENT});
            let documents = [
                ("scope", scope),
                ("grant", grant("agent", IDENTITY, "agent:api")),
                ("agent", selected),
            ];
            for (name, document) in documents {
                let path = format!("/etc/agentguard/manifests/{name}.yaml");
                fs::write(path, format!("{document:#}\n")).unwrap();
            }
        }

        /// A unit that asks both ports from its first line on, and needs no other program and no other
        /// process for it: those would be most of what an emulated machine does. What fails otherwise
        /// than a guard has it fail is written in its own words, and is nothing that a test expects.
        fn write_agent(&self, needs: &str) {
            let script = format!(
                "LC_ALL=C\nask() {{\n    if {{ :; }} 3<>/dev/tcp/127.0.0.1/$1; then said=open; return; fi\n    \
                 read -r said </run/agent.said\n    \
                 case $said in *': Operation not permitted') said=refused; esac\n\
                 }} 2>/run/agent.said\n\
                 exec 9<>/run/agent.wait\n\
                 while :; do\n    ask {}; first=$said; ask {}\n    \
                 echo \"$first $said\" >>{LOG}\n    \
                 read -r -t 0.1 -u 9\ndone\n",
                self.denied.port(),
                self.granted.port()
            );
            fs::write("/run/agent.sh", script).unwrap();
            if !Path::new("/run/agent.wait").exists() {
                nix::unistd::mkfifo("/run/agent.wait", nix::sys::stat::Mode::S_IRWXU).unwrap();
            }
            let unit = format!(
                "[Unit]\nAfter={SERVICE}\n{needs}={SERVICE}\n\
                 [Service]\n{start}\nStandardOutput=null\nStandardError=null\n",
                start = "ExecStart=/bin/bash --norc /run/agent.sh"
            );
            fs::write(format!("{UNITS}/{AGENT}"), unit).unwrap();
        }

        /// Starts the agent and gives the first thing it met.
        #[track_caller]
        fn first_round(&self) -> String {
            let _none_yet = fs::remove_file(LOG);
            systemctl(&["start", AGENT]);
            rounds_after(0, 1).remove(0)
        }
    }

    impl Drop for Installed {
        fn drop(&mut self) {
            if thread::panicking() {
                let _shown = Command::new("systemctl")
                    .args(["--no-pager", "status", SERVICE, AGENT])
                    .status();
                let _shown = Command::new("journalctl").args(["--no-pager", "-n", "60"]).status();
            }
            let _stopped = Command::new("systemctl").args(["stop", AGENT, SERVICE]).status();
            // What is pinned stays for the next test's daemon, which need not have it verified again.
        }
    }

    /// Says a figure also where the test passes.
    fn tell(text: &str) {
        writeln!(io::stderr(), "{text}").expect("standard error is open");
    }

    #[track_caller]
    fn systemctl(arguments: &[&str]) -> String {
        let mut command = Command::new("systemctl");
        command.args(arguments);
        run(&mut command, PATIENCE).expect_success(&arguments.join(" ")).stdout
    }

    #[track_caller]
    fn property(unit: &str, name: &str) -> String {
        systemctl(&["show", "--value", "--property", name, unit]).trim().to_owned()
    }

    #[track_caller]
    fn daemon() -> Pid {
        Pid::from_raw(property(SERVICE, "MainPID").parse().unwrap())
    }

    /// What the agent has met so far.
    fn rounds() -> Vec<String> {
        let log = fs::read_to_string(LOG).unwrap_or_default();
        log.split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'))
            .map(str::to_owned)
            .collect()
    }

    /// At least `number` rounds that came after the first `skipped`.
    #[track_caller]
    fn rounds_after(skipped: usize, number: usize) -> Vec<String> {
        within("the agent's rounds", || {
            let rounds = rounds();
            (rounds.len() >= skipped + number).then(|| rounds[skipped..].to_vec())
        })
    }

    #[track_caller]
    fn within<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(value) = condition() {
                return value;
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!("in vain: {what}");
    }

    /// That the agent went on, met the granted port open and the other refused, in each round.
    #[track_caller]
    fn assert_held_since(skipped: usize) {
        let since = rounds_after(skipped, 5);
        let wrong: Vec<_> = since.iter().filter(|round| *round != "refused open").collect();
        assert!(wrong.is_empty(), "{} of {} rounds: {wrong:?}", wrong.len(), since.len());
    }

    /// Waits for a daemon other than `old` that says it is ready.
    #[track_caller]
    fn next_daemon(old: Pid) -> Pid {
        // A question to systemd takes an emulated machine as long as ten of these.
        let process = format!("/proc/{old}");
        within("the end of the old one", || (!Path::new(&process).exists()).then_some(()));
        within("a new daemon", || {
            let new = daemon();
            (new != old && new.as_raw() != 0 && property(SERVICE, "ActiveState") == "active")
                .then_some(new)
        })
    }

    #[test]
    fn the_unit_is_started_once_what_is_granted_is_in_force() {
        let _installed = Installed::started();
        // `systemctl start` came back, so that this is no matter of time.
        assert_eq!(property(SERVICE, "ActiveState"), "active");
        assert_eq!(property(SERVICE, "NRestarts"), "0");
        let mut status = Command::new(PROGRAM);
        status.args(["status", "--output", "json"]);
        let status = run(&mut status, PATIENCE).expect_success("status").stdout;
        let status: Value = serde_json::from_str(&status).unwrap();
        assert_ne!(status["protection"]["level"], "none", "{status:#}");
        // What hardening takes from the daemon shows as a gap of its own.
        let gaps = status["gaps"].to_string();
        assert!(!gaps.contains("can not be looked up"), "{gaps}");
    }

    #[test]
    fn a_daemon_that_hangs_is_replaced_and_nothing_opens_meanwhile() {
        let installed = Installed::started();
        installed.first_round();
        let settled = rounds().len() + 5;
        rounds_after(settled, 1);
        let hangs = daemon();
        kill(hangs, Signal::SIGSTOP).unwrap();
        let begin = Instant::now();
        next_daemon(hangs);
        tell(&format!("replaced after {:?}, with WatchdogSec={WATCHDOG}", begin.elapsed()));
        assert_held_since(settled);
        assert_ne!(property(SERVICE, "NRestarts"), "0");
    }

    #[test]
    fn a_daemon_that_is_killed_is_replaced_and_nothing_opens_meanwhile() {
        let installed = Installed::started();
        installed.first_round();
        let settled = rounds().len() + 5;
        rounds_after(settled, 1);
        let (mut old, agent) = (daemon(), property(AGENT, "MainPID"));
        for _ in 0..3 {
            kill(old, Signal::SIGKILL).unwrap();
            old = next_daemon(old);
        }
        assert_held_since(settled);
        assert_eq!(property(AGENT, "MainPID"), agent, "the agent was started anew");
    }

    #[test]
    fn a_service_that_is_stopped_leaves_protection_in_force() {
        let installed = Installed::started();
        installed.first_round();
        let settled = rounds().len() + 5;
        rounds_after(settled, 1);
        systemctl(&["stop", SERVICE]);
        assert_eq!(property(SERVICE, "ActiveState"), "inactive");
        let stopped = rounds().len();
        assert_held_since(stopped);
        systemctl(&["start", SERVICE]);
        assert_held_since(settled);
    }

    /// Selecting by unit works on a cgroup that is there: who is quick has begun by then. This is
    /// told, and no more is promised.
    #[test]
    fn an_agent_that_is_selected_by_its_unit_is_held_once_it_is_found() {
        let installed = Installed::started();
        let mut before = 0;
        for _ in 0..5 {
            let _none_yet = fs::remove_file(LOG);
            systemctl(&["start", AGENT]);
            let rounds = rounds_after(0, 5);
            before += rounds.iter().take_while(|round| *round != "refused open").count();
            assert_eq!(rounds[4], "refused open", "{rounds:?}");
            systemctl(&["stop", AGENT]);
        }
        tell(&format!("5 starts, {before} rounds before the agent was found"));
        drop(installed);
    }

    #[test]
    fn an_agent_that_is_started_by_exec_is_held_from_its_first_instruction_on() {
        let installed = Installed::started();
        let unit = fs::read_to_string(format!("{UNITS}/{AGENT}")).unwrap();
        let by_exec = format!("ExecStart={PROGRAM} exec --scope agent:api --ttl 1h -- /bin/bash");
        let unit = unit.replace("ExecStart=/bin/bash", &by_exec);
        fs::write(format!("{UNITS}/agent-by-exec.service"), unit).unwrap();
        systemctl(&["daemon-reload"]);
        for _ in 0..5 {
            let _none_yet = fs::remove_file(LOG);
            systemctl(&["start", "agent-by-exec.service"]);
            assert_eq!(rounds_after(0, 1)[0], "refused open");
            systemctl(&["stop", "agent-by-exec.service"]);
        }
        drop(installed);
    }

    /// A unit in a slice that is held is born held: what is not granted does not even begin.
    #[test]
    fn an_agent_in_a_slice_that_is_held_is_held_before_its_first_instruction() {
        let installed = Installed::started();
        let mut slice = workload("slice", "/agents.slice", IDENTITY, "enforce");
        slice["metadata"]["name"] = json!("slice");
        fs::write("/etc/agentguard/manifests/slice.yaml", format!("{slice:#}\n")).unwrap();
        fs::write(
            format!("{UNITS}/in-slice.service"),
            format!(
                "[Unit]\nAfter={SERVICE}\nWants={SERVICE}\n[Service]\nType=oneshot\n\
                 Slice=agents.slice\nExecStart=/usr/bin/touch /run/in-slice.ran\n\
                 StandardOutput=null\nStandardError=null\n"
            ),
        )
        .unwrap();
        systemctl(&["daemon-reload"]);
        systemctl(&["start", "agents.slice"]);
        within("the slice is held", || {
            let mut workloads = Command::new(PROGRAM);
            workloads.args(["workloads", "--output", "json"]);
            let said = run(&mut workloads, PATIENCE).stdout;
            said.contains("\"/agents.slice\"").then_some(())
        });
        for _ in 0..5 {
            let mut start = Command::new("systemctl");
            start.args(["start", "in-slice.service"]);
            assert!(!run(&mut start, PATIENCE).status.success(), "what is not granted ended well");
        }
        assert!(!Path::new("/run/in-slice.ran").exists(), "what is not granted ran");
        drop(installed);
    }

    #[test]
    fn an_agent_does_not_start_where_the_service_can_not() {
        let installed = Installed::started();
        installed.write_agent("Requires");
        systemctl(&["stop", SERVICE]);
        let broken = UNIT.replace("/usr/bin/agentguard run", "/bin/false");
        fs::write(format!("{UNITS}/{SERVICE}"), broken.replace("Restart=always", "Restart=no"))
            .unwrap();
        systemctl(&["daemon-reload"]);
        let _none_yet = fs::remove_file(LOG);
        let mut start = Command::new("systemctl");
        start.args(["start", AGENT]);
        assert!(!run(&mut start, PATIENCE).status.success(), "it was started");
        assert_eq!(rounds(), Vec::<String>::new());
        drop(installed);
    }

    #[test]
    fn the_exposure_of_the_unit_is_known() {
        requires(Layer::Portable);
        let directory = tempfile::tempdir().unwrap();
        let unit = directory.path().join(SERVICE);
        fs::write(&unit, UNIT).unwrap();
        let mut analyze = Command::new("systemd-analyze");
        analyze.args(["--no-pager", "security", "--offline=yes"]).arg(unit);
        let said = run(&mut analyze, PATIENCE).expect_success("systemd-analyze").stdout;
        let figure = said.lines().find(|line| line.contains("Overall exposure level"));
        tell(figure.expect("a figure"));
    }
}
