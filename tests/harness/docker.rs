//! A Docker Engine of a test's own, in the node that a [`World`] is.
//!
//! Its one job is to start it, to have it run containers in the node's network as `docker run` does,
//! and to take it away with all that it made, also when the test panics. It is never the machine's
//! own: its files and its socket lie in the world's directory, its processes and its containers in
//! the world's cgroup.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use agentguard_agent::{Ask, Report};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    Finished, Layer, World, cgroup,
    containerd::{PATH, PROGRAM, agent_binary, image, socket_of_shim},
    layer::is_promised,
    mounts,
    process::{Running, binary, run},
    promise::Promise,
    requires,
};

/// How long a start, a stop or a command may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// The image of every container: the program of the tests, which waits until it is told what to do.
const IMAGE: &str = "agent:1";
/// Of containers, and of the engine's own processes, in the world's cgroup.
const CONTAINERS: &str = "containers";
const ENGINE: &str = "engine";

/// A Docker Engine; dropped, it goes with everything it made.
#[derive(Debug)]
pub struct Docker {
    programs: PathBuf,
    running: Option<Running>,
    // Last, because it holds the network and the cgroups of the rest.
    world: World,
}

/// A container that is yet to run.
#[derive(Debug)]
pub struct DockerPlan<'a> {
    docker: &'a Docker,
    name: String,
    options: Vec<String>,
    words: Vec<String>,
}

impl Docker {
    /// Starts one, with the image of the tests.
    ///
    /// # Panics
    ///
    /// When the engine is missing or does not start.
    #[track_caller]
    #[must_use]
    pub fn started() -> Self {
        requires(Layer::Portable);
        is_promised(Promise::Containers);
        let program = binary("../docker/usr/sbin/dockerd", "AGENTGUARD_DOCKERD");
        let program = program.canonicalize().expect("it was just found");
        let programs = program.ancestors().nth(2).expect("it is below usr").to_owned();
        let world = World::new();
        // What containers are shown lies below, and not all of them are root's.
        fs::set_permissions(world.directory(), fs::Permissions::from_mode(0o755))
            .expect("the world's directory is ours");
        fs::create_dir(world.cgroup().path().join(ENGINE)).expect("the cgroup is ours");
        let mut docker = Self { programs, running: None, world };
        docker.start();
        docker.import_image();
        docker
    }

    /// The node it runs on.
    #[must_use]
    pub const fn world(&self) -> &World {
        &self.world
    }

    /// The socket it answers on.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("docker.sock")
    }

    /// Starts it and waits until it answers.
    ///
    /// # Panics
    ///
    /// When it ends instead.
    #[track_caller]
    pub fn start(&mut self) {
        let mut command = self.world.enter();
        command.arg("--cgroup").arg(self.world.cgroup().path().join(ENGINE)).arg("--");
        let path = format!("{0}/sbin:{0}/bin:{PATH}", self.programs.display());
        command.env("PATH", path).arg(self.programs.join("sbin/dockerd"));
        // Nothing but what is named here: no file of the machine's own engine.
        let config = self.path("docker.json");
        fs::write(&config, "{}").expect("the world's directory is ours");
        command.arg("--config-file").arg(config);
        command.arg("--host").arg(format!("unix://{}", self.socket().display()));
        command.arg("--data-root").arg(self.path("data"));
        command.arg("--exec-root").arg(self.path(STATE));
        command.arg("--pidfile").arg(self.path("docker.pid"));
        // Below the root of the cgroup tree.
        let parent = format!("/{}/{CONTAINERS}", self.world.name());
        command.args(["--cgroup-parent", &parent, "--exec-opt", "native.cgroupdriver=cgroupfs"]);
        command.args(["--iptables=false", "--ip6tables=false", "--bridge=none"]);
        command.args(["--storage-driver=vfs", "--oom-score-adjust=0", "--live-restore"]);
        let running = self.running.insert(Running::start(&mut command));
        let begin = Instant::now();
        loop {
            if let Some(ended) = running.wait(Duration::ZERO) {
                panic!("dockerd ended, is all of it there? `cargo xtask setup` has it: {ended:?}");
            }
            let mut version = client(&self.programs, &self.world);
            if run(version.arg("version"), PATIENCE).status.success() {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "dockerd is not ready: {}", running.stderr());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it as an upgrade does; containers run on.
    ///
    /// # Panics
    ///
    /// When it does not end.
    #[track_caller]
    pub fn stop(&mut self) {
        assert!(self.end(), "dockerd does not end within {PATIENCE:?}");
    }

    /// A container that is yet to run.
    #[must_use]
    pub fn container(&self, name: &str) -> DockerPlan<'_> {
        let options = ["run", "--detach", "--network=host", "--name", name].map(str::to_owned);
        DockerPlan { docker: self, name: name.to_owned(), options: options.into(), words: vec![] }
    }

    /// What `docker` does with these arguments.
    pub fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        run(client(&self.programs, &self.world).args(arguments), PATIENCE)
    }

    /// How a program ends in a container.
    #[must_use]
    pub fn exec(&self, container: &str, words: &[&str]) -> Finished {
        self.command([&["exec", container], words].concat())
    }

    /// Has a command in a container ask for each of `asks` so many times.
    ///
    /// # Panics
    ///
    /// When it does not report.
    #[track_caller]
    #[must_use]
    pub fn exec_attempts(&self, container: &str, times: u32, asks: &[Ask]) -> Report {
        let mut words = vec!["exec".to_owned(), container.to_owned()];
        words.extend([PROGRAM, "attempt", "--times"].map(str::to_owned));
        words.push(times.to_string());
        words.extend(asks.iter().map(Ask::to_string));
        let finished = self.command(words);
        serde_json::from_str(&finished.stdout)
            .unwrap_or_else(|error| panic!("{error}: {finished:?}"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.world.directory().join(name)
    }

    #[track_caller]
    fn import_image(&self) {
        let archive = self.path("image.tar");
        let layer = image::layer(&agent_binary()).expect("the program can be read");
        fs::write(&archive, layer).expect("the world's directory is ours");
        let entrypoint = format!("ENTRYPOINT [\"{PROGRAM}\"]");
        let mut import = vec!["import"];
        for change in [&entrypoint, "CMD [\"pause\"]", "ENV PATH=/bin"] {
            import.extend(["--change", change]);
        }
        let archive = archive.to_str().expect("a world's directory is text");
        import.extend([archive, IMAGE]);
        self.command(import).expect_success("the import of the image");
    }

    /// Asks it to end, and makes it; whether it ended by itself.
    fn end(&mut self) -> bool {
        let Some(mut running) = self.running.take() else { return true };
        let pid = Pid::from_raw(running.pid().cast_signed());
        // One that has ended already is waited for just as well.
        let _gone = kill(pid, Signal::SIGTERM);
        running.wait(PATIENCE).is_some()
    }
}

impl DockerPlan<'_> {
    /// Gives it a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.options.extend(["--label".to_owned(), format!("{key}={value}")]);
        self
    }

    /// Shows it a directory of the node.
    #[must_use]
    pub fn volume(mut self, host: &Path, inside: &str) -> Self {
        let volume = format!("{}:{inside}", host.display());
        self.options.extend(["--volume".to_owned(), volume]);
        self
    }

    /// Has it ask for each of `asks` so many times at once when it starts, then wait.
    #[must_use]
    pub fn attempts(mut self, times: u32, asks: &[Ask]) -> Self {
        let times = times.to_string();
        self.words = ["attempt", "--stay", "--times", &times].map(str::to_owned).into();
        self.words.extend(asks.iter().map(Ask::to_string));
        self
    }

    /// Makes and starts it.
    ///
    /// # Panics
    ///
    /// When the engine does not.
    #[track_caller]
    pub fn start(self) {
        let Self { docker, name, mut options, words } = self;
        options.push(IMAGE.to_owned());
        options.extend(words);
        docker.command(options).expect_success(&format!("the start of {name}"));
    }
}

/// `docker`, as a client of a world's engine.
fn client(programs: &Path, world: &World) -> Command {
    let mut client = Command::new(programs.join("bin/docker"));
    let socket = world.directory().join("docker.sock");
    // No file of whoever runs the tests.
    client.arg("--config").arg(world.directory().join("client"));
    client.arg("--host").arg(format!("unix://{}", socket.display()));
    client
}

/// The engine's directory for what runs.
const STATE: &str = "state";

/// The sockets of the processes that hold containers, which no configuration moves.
fn sockets_elsewhere(directory: &Path) -> Vec<PathBuf> {
    let tasks = directory.join(STATE).join("containerd/daemon/io.containerd.runtime.v2.task/moby");
    let tasks = fs::read_dir(tasks).into_iter().flatten().flatten();
    tasks.filter_map(|task| socket_of_shim(&task.path())).collect()
}

/// Takes away what a killed run left outside its cgroups, its network and `directory`, while that is
/// still there.
pub(crate) fn remove_stale(directory: &Path) {
    for socket in sockets_elsewhere(directory) {
        // Another run may be removing it at the same time.
        let _gone = fs::remove_file(socket);
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.show_if_panicking("dockerd");
        }
        let sockets = sockets_elsewhere(self.world.directory());
        if self.running.is_some() {
            let all = self.command(["ps", "--all", "--quiet"]).stdout;
            let all: Vec<&str> = all.split_whitespace().collect();
            if !all.is_empty() {
                let removed = self.command([&["rm", "--force"], &all[..]].concat());
                if !removed.status.success() {
                    eprintln!("containers of dockerd's stayed: {removed:?}");
                }
            }
        }
        if !self.end() {
            eprintln!("dockerd did not end when it was asked to, and was killed");
        }
        // In this order: what runs in containers, then what holds them.
        for name in [CONTAINERS, ENGINE] {
            cgroup::remove(&self.world.cgroup().path().join(name));
        }
        cgroup::remove_from_all(self.world.name());
        mounts::unmount_below(self.world.directory());
        for socket in sockets {
            // What ended in order took its own away.
            let _gone = fs::remove_file(socket);
        }
    }
}
