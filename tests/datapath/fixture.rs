//! A datapath and a cgroup of one's own, and what is granted there.

use std::{
    collections::BTreeSet,
    env, fs,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use agentguard::allowlist::{
    Block, EgressPermit, Permit, PortRange,
    compile::{Rows, compile},
};
use agentguard::datapath::{Datapath, DoorState, LoadError, Options, Sizes, uninstall};
use agentguard_common::{
    AllowlistId, FileId, GrantId, IdentityId, Layer as DoorLayer, Mode, Protocol, RuleSetId,
    ScopeId, Tag, WorkloadId, abi::Settings, allowlist::NEVER, event::Hook, stats::Counters,
};
use agentguard_tests::{Layer, requires, wait_until};
use aya::maps::{HashMap, Map, MapData};
use nix::{
    sys::signal::{Signal, kill},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use crate::worker::Worker;

pub(crate) const WORKLOAD: WorkloadId = WorkloadId(1);
/// Rows of rules that one generation may use.
const ROWS: u32 = 64;

/// Tables that are quick to make.
pub(crate) const SMALL: Sizes = Sizes {
    workloads: 16,
    cgroups: 64,
    destinations: 4096,
    rules: 4096,
    executables: 1024,
    unix_names: 64,
    unix_sockets: 64,
    tasks: 1024,
    verdicts: 4096,
    counters: 4,
    denied_ring: 1 << 16,
    allowed_ring: 1 << 16,
};

/// Tables that are soon full.
pub(crate) const SCARCE: Sizes = Sizes {
    workloads: 2,
    cgroups: 2,
    destinations: 8,
    rules: 8,
    executables: 8,
    unix_names: 2,
    unix_sockets: 2,
    tasks: 16,
    ..SMALL
};

/// A datapath with a workload's cgroup; dropped, both go, with what runs there.
pub(crate) struct Fixture {
    pub(crate) datapath: Datapath,
    pub(crate) cgroup: PathBuf,
    pins: Pins,
    pin_directory: PathBuf,
    generation: u32,
    /// What was counted before.
    before: Counters,
}

/// The tables of tasks below a pin directory.
pub(crate) struct Tasks(PathBuf);

impl Tasks {
    /// Leaves the kernel half as it is before it is told that a task is in a cgroup.
    #[track_caller]
    pub(crate) fn forget(&self) {
        for name in ["TASKS", "ENTERED"] {
            let path = pinned(&self.0, name).unwrap_or_else(|| panic!("{name} is not pinned"));
            let map = Map::from_map_data(MapData::from_pin(path).unwrap()).unwrap();
            let mut table: HashMap<MapData, u64, u32> = map.try_into().unwrap();
            let tasks: Vec<u64> = table.keys().map(Result::unwrap).collect();
            for task in tasks {
                // It may have ended meanwhile.
                let _absent = table.remove(&task);
            }
        }
    }
}

/// Where a table is pinned below a directory.
fn pinned(directory: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path()).find_map(|path| {
        if path.is_dir() {
            pinned(&path, name)
        } else {
            path.file_name().is_some_and(|file| file == name).then_some(path)
        }
    })
}

/// Where a datapath is pinned.
enum Pins {
    /// It goes with the fixture.
    Own(PathBuf),
    /// The next fixture adopts it: a machine that only runs tests says so, where verifying every
    /// program anew for each test takes most of the time.
    Shared,
}

fn unused_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("agentguard-datapath-{}-{number}", process::id())
}

fn pin_directory_of(name: &str) -> PathBuf {
    Path::new("/sys/fs/bpf").join(name)
}

fn options(pin_directory: PathBuf, sizes: Sizes) -> Options {
    let settings = Settings { aggregation_window: 1_000_000_000, diagnostics: 0, reserved: 0 };
    Options { pin_directory, sizes, settings }
}

/// The directory that fixtures share, if they do.
const SHARED_PINS: &str = "AGENTGUARD_TEST_DATAPATH_PINS";

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with(SMALL)
    }

    #[track_caller]
    pub(crate) fn with(sizes: Sizes) -> Self {
        requires(Layer::Portable);
        let name = unused_name();
        let (pins, pin_directory) = match env::var_os(SHARED_PINS) {
            Some(shared) if sizes == SMALL => (Pins::Shared, PathBuf::from(shared)),
            Some(mut shared) if sizes == SCARCE => {
                shared.push("-scarce");
                (Pins::Shared, PathBuf::from(shared))
            }
            Some(_) | None => {
                let own = pin_directory_of(&name);
                (Pins::Own(own.clone()), own)
            }
        };
        let datapath = Datapath::open(&options(pin_directory.clone(), sizes)).unwrap();
        let fixture = Self::of(datapath, pins, pin_directory, name);
        // Where tables are shared: a task is forgotten only once the kernel has done with it.
        wait_until("what ended in the test before is forgotten", || fixture.entries("tasks") == 0);
        fixture
    }

    /// One that finds in its pin directory what `prepare` puts there.
    #[track_caller]
    pub(crate) fn prepared(prepare: impl FnOnce(&Path)) -> Result<Self, LoadError> {
        // Mounts the BPF file system where nobody has yet.
        drop(Self::new());
        let name = unused_name();
        let own = pin_directory_of(&name);
        fs::create_dir_all(&own).unwrap();
        prepare(&own);
        match Datapath::open(&options(own.clone(), SMALL)) {
            Ok(datapath) => Ok(Self::of(datapath, Pins::Own(own.clone()), own, name)),
            Err(error) => {
                uninstall(&own).unwrap();
                Err(error)
            }
        }
    }

    #[track_caller]
    fn of(datapath: Datapath, pins: Pins, pin_directory: PathBuf, name: String) -> Self {
        for (door, state) in datapath.states() {
            if door.layer == DoorLayer::Portable {
                assert_eq!(*state, DoorState::Active, "{}", door.hook);
            }
        }
        let cgroup = root().join(&name);
        fs::create_dir(&cgroup).unwrap();
        let generation = datapath.highest().0.0;
        let before = datapath.counters(1).unwrap();
        Self { datapath, cgroup, pins, pin_directory, generation, before }
    }

    /// A process in the workload's cgroup, which belongs to the workload once that is captured.
    pub(crate) fn worker(&self) -> Worker {
        let worker = Worker::start();
        move_to(&self.cgroup, worker.pid());
        worker
    }

    /// Holds the workload to `permits` from now on, in a generation of its own.
    pub(crate) fn permit(&mut self, mode: Mode, permits: &[Permit]) -> Rows {
        self.generation += 1;
        let allowlist = AllowlistId(self.generation);
        let first = RuleSetId(self.generation * ROWS);
        let rows = compile(permits).unwrap().rows(allowlist, first).unwrap();
        self.datapath.load_allowlist(&rows).unwrap();
        let tag = Tag::new(IdentityId(1), mode, allowlist, rows.listening, 1);
        self.datapath.switch(WORKLOAD, tag).unwrap();
        rows
    }

    /// Begins to hold the cgroup to `permits`.
    pub(crate) fn attach(&mut self, mode: Mode, permits: &[Permit]) {
        self.permit(mode, permits);
        self.datapath.capture(&self.cgroup, WORKLOAD).unwrap();
    }

    /// What the kernel half knows of tasks one by one, to be forgotten: their cgroups are what is left.
    pub(crate) fn tasks(&self) -> Tasks {
        Tasks(self.pin_directory.clone())
    }

    /// Changes the workload's tag.
    pub(crate) fn retag(&mut self, change: impl FnOnce(Tag) -> Tag) {
        let held = self.datapath.workloads();
        let (_, tag) = held.into_iter().find(|(id, _)| *id == WORKLOAD).unwrap();
        self.datapath.switch(WORKLOAD, change(tag)).unwrap();
    }

    /// A cgroup that the host makes below the workload's; it goes with the fixture.
    pub(crate) fn below(&self, name: &str) -> PathBuf {
        let path = self.cgroup.join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// Ends the hold on the cgroup.
    pub(crate) fn detach(&mut self) {
        let id = self.datapath.cgroups().first().copied();
        for (cgroup, workload) in id.into_iter().chain(self.datapath.cgroups()) {
            self.datapath.release(cgroup, workload).unwrap();
        }
        self.datapath.release(cgroup_id(&self.cgroup), WORKLOAD).unwrap();
        self.datapath.forget(WORKLOAD).unwrap();
    }

    /// Whether a door's program is in force.
    pub(crate) fn is_active(&self, program: &str) -> bool {
        let states = self.datapath.states().iter();
        states
            .filter(|(door, _)| door.program == program)
            .any(|(_, state)| *state == DoorState::Active)
    }

    /// What a refused exec comes to on this kernel, and the hook that refuses it.
    pub(crate) fn refused_exec(&self) -> (&'static str, Hook) {
        if self.is_active("bprm_check") {
            ("EPERM", Hook::BprmCheck)
        } else {
            ("killed", Hook::Exec)
        }
    }

    /// How many rows a table has, by its name in metrics.
    #[track_caller]
    pub(crate) fn entries(&self, table: &str) -> usize {
        let fill = self.datapath.fill();
        fill.iter().find(|fill| fill.table == table).unwrap().entries
    }

    pub(crate) fn counters(&self) -> Counters {
        let mut counters = self.datapath.counters(1).unwrap();
        for (cell, before) in counters.cells.iter_mut().zip(&self.before.cells) {
            *cell -= before;
        }
        counters
    }

    /// A cgroup beside the workload's, which is nobody's; it goes with the fixture.
    pub(crate) fn outside(&self) -> PathBuf {
        let mut path = self.cgroup.clone().into_os_string();
        path.push("-outside");
        let path = PathBuf::from(path);
        fs::create_dir(&path).unwrap();
        path
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        match &self.pins {
            Pins::Own(pins) => {
                if let Err(error) = uninstall(pins) {
                    eprintln!("{} is left behind: {error}", pins.display());
                }
            }
            Pins::Shared => {
                self.detach();
                self.datapath.set_runtimes(&BTreeSet::new()).expect("rows can be removed");
                let next = self.generation + 1;
                let swept = self.datapath.sweep(
                    AllowlistId(next),
                    RuleSetId(next * ROWS),
                    &BTreeSet::new(),
                );
                swept.expect("rows can be removed");
            }
        }
        let mut outside = self.cgroup.clone().into_os_string();
        outside.push("-outside");
        for cgroup in [&self.cgroup, Path::new(&outside)] {
            if cgroup.exists() {
                remove(cgroup);
            }
        }
    }
}

fn remove(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    // What was killed leaves its cgroup a moment later.
    for _ in 0..200 {
        if fs::remove_dir(cgroup).is_ok() {
            return;
        }
        let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0) {
            let _ended_already = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(10));
    }
    eprintln!("{} is left behind", cgroup.display());
}

/// Where cgroup v2 is mounted.
pub(crate) fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    PathBuf::from(mount.and_then(|line| line.split(' ').nth(1)).expect("cgroup v2 is mounted"))
}

pub(crate) fn cgroup_id(path: &Path) -> agentguard_common::CgroupId {
    agentguard_common::CgroupId(fs::metadata(path).unwrap().ino())
}

/// Moves a process, as the host does.
pub(crate) fn move_to(cgroup: &Path, pid: u32) {
    fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
}

/// Nanoseconds of boot time, so much from now.
pub(crate) fn in_boot_time(later: Duration) -> u64 {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap());
    u64::try_from((now + later).as_nanos()).unwrap()
}

/// A grant of nothing yet.
pub(crate) fn standing() -> Permit {
    Permit {
        scope: ScopeId(1),
        grant: GrantId(1),
        expires_at: NEVER,
        egress: vec![],
        executables: vec![],
        unix_sockets: vec![],
        listening: vec![],
    }
}

/// A grant of one destination.
pub(crate) fn to(protocol: Protocol, destination: SocketAddr) -> Permit {
    let block = Block { cidr: destination.ip().into(), except: vec![] };
    Permit {
        egress: vec![EgressPermit {
            blocks: vec![block],
            ports: vec![port(protocol, destination.port())],
        }],
        ..standing()
    }
}

/// A grant to run one file.
pub(crate) fn running(path: &Path) -> Permit {
    let metadata = fs::metadata(path).unwrap();
    let (major, minor) =
        (nix::sys::stat::major(metadata.dev()), nix::sys::stat::minor(metadata.dev()));
    let device = u32::try_from(major << 20 | minor).unwrap();
    let file = FileId { inode: metadata.ino(), device, generation: 0 };
    Permit { executables: vec![file], ..standing() }
}

pub(crate) fn port(protocol: Protocol, port: u16) -> PortRange {
    PortRange { protocol, first: port, last: port }
}
