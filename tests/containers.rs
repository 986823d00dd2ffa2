//! Containers and pods of a real runtime, as an orchestrator runs them.

/// What needs a container runtime.
mod containers {
    mod held;

    use std::{
        collections::BTreeSet,
        fs, io,
        net::{IpAddr, SocketAddr},
        os::unix::net::UnixStream,
        panic::{AssertUnwindSafe, catch_unwind},
        path::{Path, PathBuf},
    };

    use agentguard_agent::{Ask, Ended};
    use agentguard_tests::{
        Containerd, Protocol,
        address::{API, CLIENT, GRANTED_PORT, OTHER_PORT},
        containerd::{PROGRAM, TOOL},
        tell,
    };

    const API_PORT: SocketAddr = SocketAddr::new(API, GRANTED_PORT);
    /// No world has it.
    const ELSEWHERE: SocketAddr =
        SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1)), 443);

    /// Everything below a directory that is called so, to a few levels.
    fn named(directory: &Path, name: &str, levels: u32) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(name) {
                found.push(entry.path());
            } else if levels > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.extend(named(&entry.path(), name, levels - 1));
            }
        }
        found
    }

    /// What of this name is on the machine: processes, mounts, cgroups, namespaces, files.
    fn traces(name: &str) -> Vec<String> {
        let mut traces = Vec::new();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            // What has ended is here until its parent, the first process, takes note of it.
            let stat = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
            if stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('Z')) {
                continue;
            }
            for what in ["cmdline", "cgroup"] {
                let text = fs::read(process.path().join(what)).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let own = process.file_name().to_string_lossy() == std::process::id().to_string();
                if text.contains(name) && !own {
                    traces.push(format!("{}: {text}", process.path().join(what).display()));
                }
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        traces.extend(mounts.lines().filter(|line| line.contains(name)).map(str::to_owned));
        let places = [
            ("/sys/fs/cgroup", 1),
            ("/run/netns", 0),
            ("/run/containerd", 2),
            ("/var/lib/cni", 1),
            ("/tmp", 0),
        ];
        for (directory, levels) in places {
            let found = named(Path::new(directory), name, levels);
            traces.extend(found.iter().map(|path| path.display().to_string()));
        }
        traces
    }

    /// Sockets by which a runtime speaks to what holds its containers, and behind which nothing is any
    /// more. They are not called after a world, and others' tests make theirs at the same time.
    fn abandoned() -> BTreeSet<PathBuf> {
        let entries = fs::read_dir("/run/containerd/s").into_iter().flatten().flatten();
        let is_abandoned = |path: &PathBuf| {
            UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        };
        entries.map(|entry| entry.path()).filter(is_abandoned).collect()
    }

    #[test]
    fn the_runtime_speaks_both_versions_of_its_api() {
        let containerd = Containerd::started();
        let spoken = containerd.api_versions();
        assert_eq!(spoken.map(Option::unwrap_or_default), ["v1", "v1alpha2"]);
    }

    #[test]
    fn each_container_is_in_a_cgroup_of_its_own_below_its_pods() {
        let containerd = Containerd::started();
        let pods = ["one", "other"].map(|name| containerd.pod(name).run());
        let mut seen = BTreeSet::new();
        for pod in &pods {
            for name in ["first", "second"] {
                let container = pod.container(name).start();
                let cgroup = container.cgroup();
                tell!("{name} of {}: {}", pod.uid(), cgroup.display());
                assert_eq!(cgroup.parent(), Some(pod.cgroup().as_path()));
                assert!(cgroup.ends_with(container.id()));
                let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
                assert!(members.lines().any(|pid| pid == container.pid().to_string()));
                assert!(seen.insert(cgroup), "two containers share a cgroup");
            }
        }
    }

    #[test]
    fn a_pod_reaches_the_servers_through_its_node_and_nothing_else() {
        let containerd = Containerd::started();
        let pod = containerd.pod("agent").run();
        let address = pod.address().expect("a pod has an address");
        assert!(address.to_string().starts_with("10.244.0."), "{address}");
        let container = pod.container("agent").start();
        let before = containerd.world().servers().reach(Protocol::Tcp, API_PORT).connections;
        let report = container.exec_attempts(
            3,
            &[
                Ask::Tcp(API_PORT),
                Ask::Udp(API_PORT),
                Ask::SendTo(SocketAddr::new(API, OTHER_PORT)),
                Ask::Tcp(ELSEWHERE),
            ],
        );
        for tally in &report.tallies[..3] {
            assert_eq!((tally.allowed, tally.attempts()), (3, 3), "{tally:?}");
        }
        assert_eq!(report.tallies[3].first, Ended::Errno(libc::ENETUNREACH), "{report:?}");
        let reach = containerd.world().servers().reach(Protocol::Tcp, API_PORT);
        assert_eq!(reach.connections, before + 3);
    }

    #[test]
    fn a_pod_of_the_nodes_network_has_no_address_of_its_own() {
        let containerd = Containerd::started();
        let pod = containerd.pod("node-agent").host_network().run();
        let container = pod.container("agent").start();
        let namespace = |path: &Path| fs::metadata(path).map(|data| (data.st_dev(), data.st_ino()));
        use std::os::linux::fs::MetadataExt as _;
        assert_eq!(
            namespace(Path::new(&format!("/proc/{}/ns/net", container.pid()))).unwrap(),
            namespace(&containerd.world().network().client_file()).unwrap()
        );
        assert_eq!(pod.address().filter(|address| *address != CLIENT), None);
        let report = container.exec_attempts(1, &[Ask::Tcp(SocketAddr::new(CLIENT, OTHER_PORT))]);
        assert_eq!(report.tallies[0].first, Ended::Allowed, "{report:?}");
    }

    #[test]
    fn a_command_runs_in_a_container_and_tells_how_it_ended() {
        let containerd = Containerd::started();
        let pod = containerd.pod("agent").run();
        let container = pod.container("agent").start();
        let executed = container.exec([PROGRAM, "end"]);
        assert_eq!((executed.exit_code, executed.stdout.as_str()), (0, ""), "{executed:?}");
        let executed = container.exec([PROGRAM, "unheard-of"]);
        assert_eq!(executed.exit_code, 2, "{executed:?}");
        assert!(executed.stderr.contains("unheard-of"), "{executed:?}");
        let report =
            container.exec_attempts(2, &[TOOL, "/bin/none"].map(|path| Ask::Exec(path.into())));
        assert_eq!(report.tallies[0].allowed, 2, "{report:?}");
        assert_eq!(report.tallies[1].first, Ended::Errno(libc::ENOENT), "{report:?}");
    }

    #[test]
    fn a_container_reports_what_it_did_when_it_started() {
        let containerd = Containerd::started();
        let pod = containerd
            .pod("agent")
            .label("agentguard.dev/agent", "true")
            .annotation("example.org/note", "first")
            .run();
        let container = pod
            .container("agent")
            .attempts(50, &[Ask::Tcp(API_PORT), Ask::Exec(TOOL.into())])
            .start();
        let report = container.report();
        for tally in &report.tallies {
            assert_eq!((tally.first, tally.allowed), (Ended::Allowed, 50), "{tally:?}");
        }
        assert!(container.is_running(), "it was to stay");
        container.stop();
        assert!(!container.is_running());
        container.remove();
        pod.remove();
    }

    #[test]
    fn a_privileged_container_has_every_right() {
        let containerd = Containerd::started();
        let pod = containerd.pod("agent").privileged().run();
        let rights = |privileged| {
            let plan = pod.container(if privileged { "privileged" } else { "ordinary" });
            let container = if privileged { plan.privileged() } else { plan }.start();
            let status = fs::read_to_string(format!("/proc/{}/status", container.pid())).unwrap();
            let rights = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
            u64::from_str_radix(rights, 16).unwrap()
        };
        let (ordinary, all) = (rights(false), rights(true));
        assert!(
            ordinary != 0 && all & ordinary == ordinary && all != ordinary,
            "{ordinary:x} {all:x}"
        );
    }

    #[test]
    fn containers_live_on_while_the_runtime_is_restarted() {
        let mut containerd = Containerd::started();
        let (id, pid, cgroup, started) = {
            let pod = containerd.pod("agent").run();
            let container = pod.container("agent").start();
            (
                container.id().to_owned(),
                container.pid(),
                container.cgroup(),
                started(container.pid()),
            )
        };
        containerd.stop();
        let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
        assert!(members.lines().any(|member| member == pid.to_string()), "{members}");
        containerd.start();
        let container = containerd.container(&id);
        assert_eq!((container.pid(), self::started(pid)), (pid, started), "it was started anew");
        let executed = container.exec([PROGRAM, "end"]);
        assert_eq!(executed.exit_code, 0, "{executed:?}");
    }

    /// When a process started, by which it is known from a later one with its pid.
    fn started(pid: u32) -> String {
        let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let (_, fields) = status.rsplit_once(')').unwrap();
        fields.split_whitespace().nth(19).unwrap().to_owned()
    }

    #[test]
    fn a_runtime_leaves_nothing_behind() {
        let before = abandoned();
        let containerd = Containerd::started();
        let name = containerd.world().name().to_owned();
        let removed = containerd.pod("removed").run();
        let _ended = removed.container("agent").start();
        removed.remove();
        let running = containerd.pod("running").run();
        let _runs = running.container("agent").start();
        assert!(traces(&name).len() > 10, "{:?}", traces(&name));
        drop(containerd);
        assert_eq!(traces(&name), [""; 0]);
        assert_eq!(abandoned().difference(&before).next(), None);
    }

    #[test]
    fn a_runtime_leaves_nothing_behind_after_a_panic_that_finds_it_dead() {
        let before = abandoned();
        let mut seen = None;
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut containerd = Containerd::started();
            seen = Some(containerd.world().name().to_owned());
            let pod = containerd.pod("agent").run();
            let _runs = pod.container("agent").start();
            drop(pod);
            containerd.stop();
            panic!("on purpose");
        }));
        assert!(result.is_err());
        assert_eq!(traces(&seen.unwrap()), [""; 0]);
        assert_eq!(abandoned().difference(&before).next(), None);
    }
}
