//! A container runtime of a test's own: containerd with runc, in the node that a [`World`] is.
//!
//! Its one job is to start it, to have it run pods, and to take it away with all that it made, also
//! when the test panics. It is never the machine's own: root, state and socket lie in the world's
//! directory, its processes and its pods in the world's cgroup, and the node's network is the
//! world's client side. So pods reach the world's servers through the node, and nothing else.

mod cri;
pub(crate) mod image;
mod pod;

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use self::cri::{Cri, Version};
pub use self::{
    image::{PROGRAM, TOOL},
    pod::{Container, ContainerPlan, Executed, Pod, PodPlan},
};
use crate::{
    Layer, World, cgroup,
    layer::is_promised,
    mounts,
    process::{Running, binary, child_of, run},
    promise::Promise,
    requires,
};

/// How long a start or a stop may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What containerd starts, it finds here.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where Debian, and where everyone else, puts network plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
/// Where plugins' callers note what they set up; no configuration moves it.
const NETWORK_RESULTS: &str = "/var/lib/cni/results";
/// The network of pods.
const PODS: &str = "10.244.0.0/24";
/// The namespace in which containerd keeps what it runs for orchestrators.
const NAMESPACE: &str = "k8s.io";

/// A release of the runtime that the runner keeps beside the build products: no supported Debian has
/// all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// 1.4, which speaks no other version of the API than v1alpha2.
    OneFour,
    /// The last of version 1, which offers NRI.
    One,
    /// Of version 2, which offers NRI and speaks no other version of the API than v1.
    Two,
}

/// Who makes the cgroups of containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Driver {
    /// The runtime itself.
    #[default]
    Cgroupfs,
    /// The machine's systemd, as units in slices.
    Systemd,
}

/// What is to be different from the machine's own runtime.
#[derive(Debug, Default)]
struct Making {
    release: Option<Release>,
    driver: Driver,
    /// More of its configuration; `{directory}` in it is where its files are.
    more: String,
    inside: Option<Inside>,
}

/// A node that is a container itself, as a runtime is started in it.
#[derive(Clone, Debug)]
pub struct Inside {
    /// Its first process, whose PID, mount and cgroup namespaces are the node's.
    pub init: u32,
    /// A cgroup of the node's, for the runtime's own processes.
    pub cgroup: PathBuf,
}

/// A container runtime; dropped, it goes with everything it made.
#[derive(Debug)]
pub struct Containerd {
    cri: Cri,
    /// `None`: the machine's own.
    release: Option<Release>,
    driver: Driver,
    /// The node that it runs in, where that is a container itself.
    inside: Option<Inside>,
    running: Option<Running>,
    uids: AtomicU32,
    // Last, because it holds the network and the cgroups of the rest.
    world: World,
}

impl Containerd {
    /// Starts one, with the images of the tests.
    ///
    /// # Panics
    ///
    /// When the runtime is missing or does not start.
    #[track_caller]
    #[must_use]
    pub fn started() -> Self {
        Self::started_with("")
    }

    /// The same, with more in its configuration; `{directory}` in it is where its files are.
    ///
    /// # Panics
    ///
    /// When the runtime is missing or does not start.
    #[track_caller]
    #[must_use]
    pub fn started_with(more: &str) -> Self {
        Self::made(World::new(), Making { more: more.to_owned(), ..Making::default() })
    }

    /// One in a node that is a container itself, which has to outlive it.
    ///
    /// # Panics
    ///
    /// When the runtime is missing or does not start.
    #[track_caller]
    #[must_use]
    pub fn started_inside(world: World, node: Inside) -> Self {
        Self::made(world, Making { inside: Some(node), ..Making::default() })
    }

    /// The socket that a runtime on this node will answer on.
    #[must_use]
    pub fn socket_on(world: &World) -> PathBuf {
        world.directory().join(SOCKET)
    }

    /// One that has the machine's systemd make the cgroups of its containers, with more in its
    /// configuration. Only for a machine of the tests' own: the slices are the system's.
    ///
    /// # Panics
    ///
    /// When the runtime is missing or does not start.
    #[track_caller]
    #[must_use]
    pub fn started_under_systemd(more: &str) -> Self {
        is_promised(Promise::Systemd);
        let making = Making { driver: Driver::Systemd, more: more.to_owned(), ..Making::default() };
        Self::made(World::new(), making)
    }

    /// One of a release.
    ///
    /// # Panics
    ///
    /// When the runtime is missing or does not start.
    #[track_caller]
    #[must_use]
    pub fn started_of(release: Release, more: &str) -> Self {
        let making = Making { release: Some(release), more: more.to_owned(), ..Making::default() };
        Self::made(World::new(), making)
    }

    /// One of a release that offers NRI at [`Self::nri`].
    ///
    /// # Panics
    ///
    /// When the runtime is missing or does not start.
    #[track_caller]
    #[must_use]
    pub fn started_with_nri(release: Release) -> Self {
        let nri = format!(
            r#"[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "{{directory}}/{NRI}"
  plugin_path = "{{directory}}/nri-plugins"
  plugin_config_path = "{{directory}}/nri-configuration"
"#
        );
        Self::started_of(release, &nri)
    }

    #[track_caller]
    fn made(world: World, making: Making) -> Self {
        requires(Layer::Portable);
        is_promised(Promise::Containers);
        world.network().lead_to_pods(PODS);
        let Making { release, driver, more, inside } = making;
        let cri = Cri::new(&Self::socket_on(&world), spoken_by(release));
        let uids = AtomicU32::new(0);
        let mut containerd = Self { cri, release, driver, inside, running: None, uids, world };
        containerd.configure(&more).expect("the world's directory is ours");
        fs::create_dir(containerd.world.cgroup().path().join(NODE)).expect("the cgroup is ours");
        containerd.start();
        containerd.import_images();
        containerd
    }

    /// The node it runs on.
    #[must_use]
    pub const fn world(&self) -> &World {
        &self.world
    }

    /// The socket it answers on.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        Self::socket_on(&self.world)
    }

    /// The socket at which it offers NRI, if it was told to.
    #[must_use]
    pub fn nri(&self) -> PathBuf {
        self.path(NRI)
    }

    /// A pod that is yet to run.
    pub fn pod(&self, name: &str) -> PodPlan<'_> {
        PodPlan::new(self, name)
    }

    /// A container that was made before, by what the runtime calls it.
    #[must_use]
    pub fn container(&self, id: &str) -> Container<'_> {
        Container::found(self, id)
    }

    /// Which versions of the API it says that it speaks: asked by the present one, and by the one
    /// before; `None` where it does not know the one that it is asked by.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    #[track_caller]
    #[must_use]
    pub fn api_versions(&self) -> [Option<String>; 2] {
        self.cri.versions().expect("it answers")
    }

    /// Stops and removes every pod.
    pub fn remove_all(&self) {
        self.cri.remove_all();
    }

    /// Ends it as an upgrade does, and starts it again; containers run on.
    ///
    /// # Panics
    ///
    /// When it does not end or does not start.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Ends it, and starts another release with all that it left; containers run on.
    ///
    /// # Panics
    ///
    /// When one does not end or the other does not start.
    #[track_caller]
    pub fn replace_by(&mut self, release: Release) {
        self.stop();
        self.release = Some(release);
        self.cri = Cri::new(&self.socket(), spoken_by(self.release));
        self.start();
    }

    /// Ends it; containers run on.
    ///
    /// # Panics
    ///
    /// When it does not end.
    #[track_caller]
    pub fn stop(&mut self) {
        assert!(self.end(), "containerd does not end within {PATIENCE:?}");
    }

    /// Starts it and waits until it can run containers.
    ///
    /// # Panics
    ///
    /// When it ends instead.
    #[track_caller]
    pub fn start(&mut self) {
        let mut command = self.world.enter();
        let own = self.world.cgroup().path().join(NODE);
        let cgroup = self.inside.as_ref().map_or(&own, |node| &node.cgroup);
        command.arg("--cgroup").arg(cgroup).arg("--");
        if let Some(Inside { init, .. }) = &self.inside {
            command.args([
                "nsenter",
                "--target",
                &init.to_string(),
                "--pid",
                "--mount",
                "--cgroup",
            ]);
            command.arg("--");
        }
        command.env("PATH", self.search_path());
        // The one of its own release, where that is not the machine's.
        command.args(["env", "containerd", "--config"]).arg(self.path(CONFIG));
        let running = self.running.insert(Running::start(&mut command));
        let begin = Instant::now();
        while let Err(missing) = self.cri.is_ready() {
            if let Some(ended) = running.wait(Duration::ZERO) {
                panic!("containerd ended, is it installed? `cargo xtask setup` does it: {ended:?}");
            }
            let said = || running.stderr();
            assert!(begin.elapsed() < PATIENCE, "containerd is not ready: {missing}: {}", said());
            thread::sleep(Duration::from_millis(20));
        }
    }

    const fn cri(&self) -> &Cri {
        &self.cri
    }

    fn path(&self, name: &str) -> PathBuf {
        self.world.directory().join(name)
    }

    fn logs(&self) -> PathBuf {
        self.path("logs")
    }

    /// Where its programs are looked for: those of its own release first.
    fn search_path(&self) -> String {
        match self.release {
            Some(release) => format!("{}:{PATH}", release.programs().display()),
            None => PATH.to_owned(),
        }
    }

    /// The cgroup of a pod, as kubelet tells the runtime: with the systemd driver, of the class to which
    /// most pods belong.
    fn pod_cgroup(&self, uid: &str) -> String {
        match self.driver {
            Driver::Cgroupfs => format!("/{}/pods/pod{uid}", self.world.name()),
            Driver::Systemd => slice("kubepods", uid),
        }
    }

    fn next_uid(&self) -> String {
        let number = self.uids.fetch_add(1, Ordering::Relaxed);
        format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id())
    }

    fn configure(&self, more: &str) -> io::Result<()> {
        // What containers are shown lies below, and not all of them are root's.
        fs::set_permissions(self.world.directory(), fs::Permissions::from_mode(0o755))?;
        let plugins = PLUGINS.into_iter().find(|directory| Path::new(directory).is_dir());
        let plugins = plugins.unwrap_or_else(|| {
            panic!("no network plugins in {PLUGINS:?}; `cargo xtask setup` installs them")
        });
        fs::create_dir(self.path("cni"))?;
        let network = json!({
            "cniVersion": "0.4.0",
            "name": self.world.name(),
            "plugins": [{
                "type": "ptp",
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "dataDir": self.path("addresses"),
                    "ranges": [[{"subnet": PODS}]],
                    // To the servers of the world, and nowhere else.
                    "routes": [
                        {"dst": "192.0.2.0/24"},
                        {"dst": "198.51.100.0/24"},
                        {"dst": "169.254.169.254/32"},
                    ],
                },
            }],
        });
        fs::write(self.path("cni/10-pods.conflist"), network.to_string())?;
        let directory = self.world.directory().display();
        let more = more.replace("{directory}", &directory.to_string());
        let config = format!(
            r#"version = 2
root = "{directory}/root"
state = "{directory}/state"
oom_score = 0
# Each looks for what is not there, and takes its time.
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]
[grpc]
  address = "{directory}/{SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{directory}/runc"
        SystemdCgroup = {by_systemd}
{more}
"#,
            pause = image::PAUSE,
            by_systemd = self.driver == Driver::Systemd,
        );
        fs::write(self.path(CONFIG), config)
    }

    #[track_caller]
    fn import_images(&self) {
        let archive = self.path("images.tar");
        image::write(&agent_binary(), &archive).expect("an archive can be written");
        let mut import = Command::new("ctr");
        import
            .env("PATH", self.search_path())
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", NAMESPACE]);
        import.args(["images", "import"]).arg(&archive);
        run(&mut import, PATIENCE).expect_success("the import of the images");
        fs::remove_file(archive).expect("it was just written");
        // The part of containerd that answers orchestrators hears of them a moment later.
        let begin = Instant::now();
        while !(self.cri.has_image(image::PAUSE) && self.cri.has_image(image::AGENT)) {
            assert!(begin.elapsed() < PATIENCE, "the images are not seen");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks it to end, and makes it; whether it ended by itself.
    fn end(&mut self) -> bool {
        let Some(mut running) = self.running.take() else { return true };
        // What enters a node waits outside of it, and ends with what it started there.
        let inside = self.inside.as_ref().and_then(|_| child_of(running.pid()));
        let pid = Pid::from_raw(inside.unwrap_or(running.pid()).cast_signed());
        // One that has ended already is waited for just as well.
        let _gone = kill(pid, Signal::SIGTERM);
        running.wait(PATIENCE).is_some()
    }
}

/// The version of the API by which a release is spoken to.
const fn spoken_by(release: Option<Release>) -> Version {
    match release {
        Some(Release::OneFour) => Version::V1Alpha2,
        Some(Release::One | Release::Two) | None => Version::V1,
    }
}

/// The cgroup of a pod where kubelet has systemd make them (`pkg/kubelet/cm`): a slice lies in the one
/// whose name is its own up to the last dash, so that a pod's number has none.
fn slice(root: &str, uid: &str) -> String {
    let name = format!("{root}-burstable-pod{}", uid.replace('-', "_"));
    let ends = name.match_indices('-').map(|(end, _)| end).chain([name.len()]);
    ends.map(|end| format!("/{}.slice", &name[..end])).collect()
}

/// Files of a runtime in `directory` that lie elsewhere, where no configuration moves them: the
/// sockets of the processes that hold containers, and notes on the network of each pod.
fn files_elsewhere(directory: &Path) -> Vec<PathBuf> {
    let names = |directory: &Path| -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let pods = names(&directory.join("root/io.containerd.grpc.v1.cri/sandboxes"));
    let notes = names(Path::new(NETWORK_RESULTS)).into_iter();
    let notes = notes.filter(|note| pods.iter().any(|pod| note.contains(pod)));
    let tasks = directory.join("state/io.containerd.runtime.v2.task").join(NAMESPACE);
    let tasks = fs::read_dir(tasks).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| socket_of_shim(&task.path()))
        .chain(notes.map(|note| Path::new(NETWORK_RESULTS).join(note)))
        .collect()
}

/// The socket of what holds a container: older releases write its address, newer ones how to speak to
/// it as well.
pub(crate) fn socket_of_shim(task: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(task.join("address")).ok().or_else(|| {
        let parameters = fs::read(task.join("bootstrap.json")).ok()?;
        let parameters: serde_json::Value = serde_json::from_slice(&parameters).ok()?;
        Some(parameters["address"].as_str()?.to_owned())
    })?;
    address.trim().strip_prefix("unix://").map(PathBuf::from)
}

/// Takes away what a killed run left outside its cgroups, its network and `directory`, while that is
/// still there.
pub(crate) fn remove_stale(directory: &Path) {
    for file in files_elsewhere(directory) {
        // Another run may be removing it at the same time.
        let _gone = fs::remove_file(file);
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.show_if_panicking("containerd");
        }
        if self.running.is_some() {
            self.cri.remove_all();
        }
        let files = files_elsewhere(self.world.directory());
        if !self.end() {
            eprintln!("containerd did not end when it was asked to, and was killed");
        }
        // In this order: what runs in containers, then what holds them.
        for name in ["pods", NODE] {
            cgroup::remove(&self.world.cgroup().path().join(name));
        }
        cgroup::remove_from_all(self.world.name());
        match self.driver {
            Driver::Cgroupfs => {}
            Driver::Systemd => {
                let mut stop = Command::new("systemctl");
                let _gone = stop.args(["stop", "kubepods.slice", "kubelet.slice"]).status();
            }
        }
        mounts::unmount_below(self.world.directory());
        for file in files {
            // What ended in order took its own away.
            let _gone = fs::remove_file(file);
        }
    }
}

impl Release {
    /// The directory of its programs.
    #[track_caller]
    fn programs(self) -> PathBuf {
        let (name, variable) = match self {
            Self::OneFour => ("../containerd/1.4/usr/bin/containerd", "AGENTGUARD_CONTAINERD_1_4"),
            Self::One => ("../containerd/1/usr/bin/containerd", "AGENTGUARD_CONTAINERD_1"),
            Self::Two => ("../containerd/2/usr/bin/containerd", "AGENTGUARD_CONTAINERD_2"),
        };
        let program = binary(name, variable);
        let program = program.canonicalize().expect("it was just found");
        program.parent().expect("a program is in a directory").to_owned()
    }
}

const SOCKET: &str = "containerd.sock";
/// The runtime's socket of NRI.
const NRI: &str = "nri.sock";
const CONFIG: &str = "containerd.toml";
/// The cgroup of the runtime's own processes, in the world's.
const NODE: &str = "node";

/// The program in the images.
///
/// # Panics
///
/// When it was not built.
#[must_use]
pub fn agent_binary() -> PathBuf {
    binary("../static/agentguard-agent", "AGENTGUARD_AGENT_BIN")
}
