//! Loading the kernel half, or adopting the one that is already in force.
//!
//! Everything is pinned (see [`super::pins`]): a daemon that goes leaves enforcement as it is. What
//! this kernel gives is found by trying, before anything is attached; which of it is in force then
//! never changes. What this process may attach to cgroups is found at every start.
//!
//! A daemon of the same build adopts what is there. One of another build sets up its programs
//! beside those in force, goes on with the same state, fills its own tables, and then takes over hook
//! by hook ([`Datapath::take_over`]): each by one write, so that every request meets one program.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread;

use agentguard_common::Layer;
use agentguard_common::abi::{Achieved, KernelOffsets, Settings};
use aya::maps::{Array, Map, MapData, MapError};
use aya::programs::{Program, ProgramError};
use aya::{Btf, Ebpf, EbpfLoader};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::attach::AttachedProgram;
use super::events::Diagnostics;
use super::handover::{self, GlobalProgram};
use super::kernel::{Kernel, KernelError};
use super::object;
use super::pins::{self, ExecJudge, Pins};
use super::protection::{self, Door, DoorState, EXEC_ACCOUNT, EXEC_CHECK, Protection, doors};
use super::tables::Tables;
use crate::fault;

/// How much each table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub workloads: u32,
    pub cgroups: u32,
    pub destinations: u32,
    pub rules: u32,
    pub executables: u32,
    pub unix_names: u32,
    pub unix_sockets: u32,
    /// Tasks by descent.
    pub tasks: u32,
    pub verdicts: u32,
    /// Rows of counters, with the one that all further identities share.
    pub counters: u32,
    /// Bytes, a power of two.
    pub denied_ring: u32,
    /// Bytes, a power of two.
    pub allowed_ring: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            workloads: 8192,
            cgroups: 65536,
            destinations: 524_288,
            rules: 65536,
            executables: 262_144,
            unix_names: 8192,
            unix_sockets: 65536,
            tasks: 262_144,
            verdicts: 32768,
            counters: 129,
            denied_ring: 1 << 20,
            allowed_ring: 1 << 22,
        }
    }
}

/// What to load, and where to keep it.
#[derive(Clone, Debug)]
pub struct Options {
    /// A directory on a BPF file system; made, and the file system mounted, if missing.
    pub pin_directory: PathBuf,
    pub sizes: Sizes,
    pub settings: Settings,
}

/// The datapath can not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(
        "the BPF file system can not be mounted at {path}: {source}; mount it there or set pin_directory"
    )]
    Mount { path: PathBuf, source: nix::Error },
    #[error("pins can not be kept at {path}: {source}; free the path or set pin_directory")]
    Pin { path: PathBuf, source: io::Error },
    #[error(
        "the kernel half does not load: {}; see the kernel's log (dmesg), and make datapath.maps smaller where memory is short",
        causes(source)
    )]
    Load { source: Box<aya::EbpfError> },
    #[error(
        "{path} is kept by a version of agentguard that this one can not go on from; end what it holds with that version's `agentguard uninstall`, or reboot"
    )]
    ForeignState { path: PathBuf },
    #[error(
        "in the version of agentguard that is in force the BPF LSM judges exec, and this one can not have it do so: {reason}; of what is being run at the change a part would be judged twice. Go on with that version, or end what it holds with its `agentguard uninstall`, or reboot"
    )]
    ExecJudge { reason: String },
    #[error("the kernel half's {name} can not be used: {reason}")]
    Part { name: String, reason: String },
}

/// An error with all that led to it: aya's own first line names the table or the program, and only
/// the last one says what the kernel answered.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    let mut text = error.to_string();
    for cause in causes.map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

impl LoadError {
    pub(super) fn part(name: &str, reason: impl std::fmt::Display) -> Self {
        Self::Part { name: name.to_owned(), reason: reason.to_string() }
    }
}

/// The kernel half, in force.
pub struct Datapath {
    pub(super) programs: Vec<AttachedProgram>,
    pub(super) globals: Vec<GlobalProgram>,
    pub(super) pins: Pins,
    pub(super) tables: Tables,
    states: Vec<(Door, DoorState)>,
    adopted: bool,
    /// Whether this start loaded the programs, and did not find them in force.
    loaded: bool,
    /// What the programs say of themselves, until somebody takes it to read.
    diagnostics: Option<Diagnostics>,
}

impl Datapath {
    /// Adopts the kernel half that is in force, or loads it. Where another build's is in force,
    /// nothing of this one's is until [`Datapath::take_over`].
    ///
    /// # Errors
    ///
    /// When nothing of it can be loaded. A single program that this kernel does not take is no
    /// error: see [`Datapath::states`].
    pub fn open(options: &Options) -> Result<Self, LoadError> {
        mount_bpffs(&options.pin_directory)?;
        let pins = Pins::new(&options.pin_directory, &options.sizes);
        if let Some(path) = pins.foreign_state()? {
            return Err(LoadError::ForeignState { path });
        }
        let adopted = pins.is_in_use();
        if !pins.is_ready() {
            // What a start that was cut short left behind enforces nothing yet.
            pins.remove_unfinished()?;
            pins.make_directories()?;
            fault::point("load.directories");
        }
        let mut datapath = if pins.is_ready() {
            Self::adopt(pins, options)?
        } else {
            Self::set_up(pins, options, adopted)?
        };
        datapath.set(options.settings)?;
        datapath.keep_reserve().map_err(|error| LoadError::part("CGROUPS", error))?;
        if datapath.pins.others()?.is_empty() {
            datapath.open_gates()?;
        }
        Ok(datapath)
    }

    /// Takes back what this start set up, where nothing of it holds anything yet: all of it or, beside
    /// another build in force, the programs of this one. What an earlier start left is in force still.
    ///
    /// # Errors
    ///
    /// When a pin can not be removed.
    pub fn abandon(self) -> Result<(), LoadError> {
        match (self.loaded, self.has_others()?) {
            (true, false) => pins::remove_all(self.pins.root()).map(drop),
            (true, true) => self.pins.remove_unfinished(),
            (false, _) => Ok(()),
        }
    }

    /// Whether the kernel half was in force before.
    #[must_use]
    pub const fn adopted(&self) -> bool {
        self.adopted
    }

    /// What the programs say of themselves; once.
    #[must_use]
    pub fn take_diagnostics(&mut self) -> Option<Diagnostics> {
        self.diagnostics.take()
    }

    /// What became of each program.
    #[must_use]
    pub fn states(&self) -> &[(Door, DoorState)] {
        &self.states
    }

    /// What stays open on this kernel by the nature of the layers that are in force, one sentence
    /// each.
    #[must_use]
    pub fn gaps(&self) -> Vec<String> {
        protection::gaps(&self.states, self.pins.ends_others())
    }

    /// Whether the programs in force can end a task that is not the caller.
    #[must_use]
    pub fn ends_others(&self) -> bool {
        self.pins.ends_others()
    }

    /// How much of the promise is kept.
    #[must_use]
    pub fn protection(&self) -> Protection {
        self.protection_by(&self.states)
    }

    /// What doors in these states, such as those of one workload, add up to.
    #[must_use]
    pub fn protection_by(&self, states: &[(Door, DoorState)]) -> Protection {
        Protection::of(states, protection::gaps(states, self.pins.ends_others()))
    }

    fn set_up(pins: Pins, options: &Options, adopted: bool) -> Result<Self, LoadError> {
        let Fitted { mut ebpf, mut outcomes, btf } = fit(&pins, options)?;
        let mut states = Vec::new();
        for door in doors() {
            let outcome = outcomes
                .remove(door.program)
                .unwrap_or_else(|| Err("the object does not hold it".to_owned()));
            let state = match outcome {
                Ok(()) => {
                    let attached = match door.gate {
                        Some(gate) => handover::attach_gate(&mut ebpf, &btf, door, gate, &pins),
                        None => Ok(()),
                    };
                    match attached {
                        Ok(()) => {
                            pin(&mut ebpf, door, &pins)?;
                            DoorState::Active
                        }
                        Err(reason) => DoorState::Unavailable(reason),
                    }
                }
                Err(reason) => DoorState::Unavailable(reason),
            };
            fault::point("load.pinned");
            states.push((*door, state));
        }
        let (programs, globals) = open_programs(&pins, &mut states)?;
        let tables = Tables::open(&pins, &options.sizes)?;
        let diagnostics = Diagnostics::of(&mut ebpf);
        pins.mark_ready()?;
        fault::point("load.ready");
        Ok(Self { programs, globals, pins, tables, states, adopted, loaded: true, diagnostics })
    }

    fn adopt(pins: Pins, options: &Options) -> Result<Self, LoadError> {
        let state = |door: &Door| {
            if !pins.program(door.program).exists() {
                let reason = "this build was set up without it: the kernel did not take it, or what \
                              was in force then left it aside; see agentguard doctor";
                DoorState::Unavailable(reason.to_owned())
            } else if door.gate.is_some() && !pins.global_link(door.program).exists() {
                DoorState::Unavailable("its pinned link is gone".to_owned())
            } else {
                DoorState::Active
            }
        };
        let mut states: Vec<_> = doors().iter().map(|door| (*door, state(door))).collect();
        let (programs, globals) = open_programs(&pins, &mut states)?;
        let tables = Tables::open(&pins, &options.sizes)?;
        let diagnostics =
            programs.first().and_then(|program| Diagnostics::adopt(program.kind.id()?));
        fault::point("load.adopted");
        Ok(Self {
            programs,
            globals,
            pins,
            tables,
            states,
            adopted: true,
            loaded: false,
            diagnostics,
        })
    }
}

/// Removes all protection: every program, table and link pinned below `pin_directory`. Returns how
/// many builds of the kernel half were in force.
///
/// # Errors
///
/// When a pin can not be removed.
pub fn uninstall(pin_directory: &Path) -> Result<usize, LoadError> {
    pins::remove_all(pin_directory)
}

/// Mounts the BPF file system if `pin_directory` is not on one, and makes the directory for root
/// alone.
fn mount_bpffs(pin_directory: &Path) -> Result<(), LoadError> {
    let on_bpffs =
        |path: &Path| statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    let existing = pin_directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !on_bpffs(existing) {
        let path = Path::new("/sys/fs/bpf");
        if !pin_directory.starts_with(path) {
            return Err(LoadError::Mount {
                path: pin_directory.to_owned(),
                source: nix::Error::EINVAL,
            });
        }
        mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .map_err(|source| LoadError::Mount { path: path.to_owned(), source })?;
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(pin_directory)
        .map_err(|source| LoadError::Pin { path: pin_directory.to_owned(), source })
}

/// An object that fits this kernel, with what became of each of its programs.
struct Fitted {
    ebpf: Ebpf,
    outcomes: BTreeMap<&'static str, Result<(), String>>,
    btf: Btf,
}

/// What is asked of the kernel beside the portable layer. Found wanting, the object is loaded again
/// and asks for less.
struct Asked {
    /// The function by which a task that is not the caller is ended.
    ends_others: Option<u32>,
    /// Why there is no LSM layer, if there is none.
    lsm: Result<(), String>,
    /// Why exec is left to the tracepoint, if it is.
    exec_by_lsm: Result<(), String>,
}

impl Asked {
    /// Leaves exec to the tracepoint, unless a build is in force that does not.
    ///
    /// An exec comes to both hooks, and any time may pass between them. Were one of two builds to judge
    /// it at the first and the other at the second, an exec under way at the change would be judged
    /// twice; the other way round, by neither. No order of writing the gates helps against that, so what
    /// judges exec stays the same for as long as anything is in force.
    fn leave_exec(&mut self, in_force: Option<ExecJudge>, reason: String) -> Result<(), LoadError> {
        match in_force {
            Some(ExecJudge::Lsm) => Err(LoadError::ExecJudge { reason }),
            Some(ExecJudge::Tracepoint) | None => {
                self.exec_by_lsm = Err(reason);
                Ok(())
            }
        }
    }
}

/// Why exec is left to the tracepoint where this kernel would not ask for that.
const EXEC_IS_LEFT: &str = "another version of agentguard was in force when this one began, and had the tracepoint judge exec; \
     after a reboot, or `agentguard uninstall` and a start, the BPF LSM does";

/// Loads all programs as this kernel takes them.
fn fit(pins: &Pins, options: &Options) -> Result<Fitted, LoadError> {
    let kernel = Kernel::running()?;
    let types = kernel.types()?;
    let offsets = types.offsets()?;
    // The allocator of tables, from 6.1 on. Before, a row is allocated like any other memory, which may wake
    // a task, and so ask for the lock of a run queue.
    let writes_under_locks = types.function("bpf_mem_cache_alloc").is_some();
    if !writes_under_locks {
        tracing::info!(
            "this kernel allocates rows of tables as kernels before 6.1 do: births are judged at \
             sched_process_fork alone"
        );
    }
    let in_force = pins.exec_judge_of_others()?;
    let mut asked = Asked {
        ends_others: types.function("bpf_send_signal_task"),
        lsm: Ok(()),
        exec_by_lsm: match in_force {
            Some(ExecJudge::Tracepoint) => Err(EXEC_IS_LEFT.to_owned()),
            Some(ExecJudge::Lsm) | None => Ok(()),
        },
    };
    // aya's loader reads the kernel's types for itself, and lends them to nobody.
    let (btf, loader) = thread::scope(|scope| {
        let loader = scope.spawn(EbpfLoader::new);
        (kernel.for_loader(), loader.join())
    });
    let btf = btf?;
    let mut loader = Some(loader.unwrap_or_else(|_panic| EbpfLoader::new()));
    loop {
        let achieved = Achieved {
            exec_by_lsm: u32::from(asked.exec_by_lsm.is_ok()),
            writes_under_locks: u32::from(writes_under_locks),
        };
        let object = object::bind(asked.ends_others);
        let loader = loader.take().unwrap_or_default();
        let mut ebpf = load(loader, options, pins, &offsets, &achieved, &btf, &object)?;
        if asked.ends_others.is_some() && !takes_kernel_function(&mut ebpf, &btf) {
            asked.ends_others = None;
            continue;
        }
        if asked.lsm.is_ok()
            && let Err(reason) = calls_lsm_programs(&mut ebpf, &btf, pins)
        {
            tracing::info!(reason, "there is no LSM layer on this kernel");
            asked.lsm = Err(reason.clone());
            asked.leave_exec(in_force, reason)?;
            continue;
        }
        let mut outcomes = load_programs(&mut ebpf, &btf, &asked.lsm);
        let refused = || {
            EXEC_BY_LSM.iter().find_map(|program| match outcomes.get(program) {
                Some(Err(reason)) => Some(reason.clone()),
                Some(Ok(())) | None => None,
            })
        };
        if asked.exec_by_lsm.is_ok()
            && let Some(reason) = refused()
        {
            asked.leave_exec(in_force, reason)?;
            continue;
        }
        fault::point("load.loaded");
        match &asked.exec_by_lsm {
            // The tracepoint's program leaves exec to these, which must be called for that.
            Ok(()) => {
                let attached = EXEC_BY_LSM
                    .iter()
                    .try_for_each(|program| attach_gate_of(program, &mut ebpf, &btf, pins));
                if let Err(reason) = attached {
                    asked.leave_exec(in_force, reason)?;
                    continue;
                }
            }
            Err(reason) => {
                outcomes.extend(EXEC_BY_LSM.map(|program| (program, Err(reason.clone()))));
            }
        }
        if asked.ends_others.is_some() {
            pins.mark_ends_others()?;
        }
        return Ok(Fitted { ebpf, outcomes, btf });
    }
}

fn load<'a>(
    mut loader: EbpfLoader<'a>,
    options: &Options,
    pins: &Pins,
    offsets: &'a KernelOffsets,
    achieved: &'a Achieved,
    btf: &'a Btf,
    object: &[u8],
) -> Result<Ebpf, LoadError> {
    let Sizes {
        workloads,
        cgroups: _,
        destinations,
        rules,
        executables,
        unix_names,
        unix_sockets,
        tasks,
        verdicts,
        counters,
        denied_ring,
        allowed_ring,
    } = options.sizes;
    loader
        .btf(Some(btf))
        .allow_unsupported_maps()
        .override_global("OFFSETS", offsets, true)
        .override_global("ACHIEVED", achieved, true)
        .map_max_entries("WORKLOADS", workloads)
        .map_max_entries("CGROUPS", options.sizes.cgroup_rows())
        // Whoever was moved is a task: there is room where there is for it.
        .map_max_entries("MOVED", tasks)
        .map_max_entries("TASKS", tasks)
        .map_max_entries("DESTINATIONS", destinations)
        .map_max_entries("RULES", rules)
        .map_max_entries("EXECUTABLES", executables)
        .map_max_entries("UNIX_NAMES", unix_names)
        .map_max_entries("UNIX_SOCKETS", unix_sockets)
        .map_max_entries("VERDICTS", verdicts)
        .map_max_entries("COUNTERS", counters)
        .map_max_entries("DENIED", denied_ring)
        .map_max_entries("ALLOWED", allowed_ring);
    for (name, path) in pins.maps() {
        loader.map_pin_path(name, path);
    }
    loader.load(object).map_err(|source| LoadError::Load { source: Box::new(source) })
}

/// The programs by which the LSM layer judges exec, and keeps account of it.
const EXEC_BY_LSM: [&str; 2] = [EXEC_CHECK, EXEC_ACCOUNT];

/// Attaches what calls the program of a global hook.
fn attach_gate_of(program: &str, ebpf: &mut Ebpf, btf: &Btf, pins: &Pins) -> Result<(), String> {
    let is_it = |door: &&Door| door.program == program;
    match doors().iter().find(is_it).and_then(|door| Some((door, door.gate?))) {
        Some((door, gate)) => handover::attach_gate(ebpf, btf, door, gate, pins),
        None => Err(format!("there is no gate for {program}")),
    }
}

/// Whether the verifier lets the tracepoints call the kernel function they were bound to.
fn takes_kernel_function(ebpf: &mut Ebpf, btf: &Btf) -> bool {
    match ebpf.program_mut("process_fork") {
        Some(Program::BtfTracePoint(program)) => program.load("sched_process_fork", btf).is_ok(),
        Some(_) | None => false,
    }
}

/// Whether the BPF LSM calls a program here. A list that names it does not tell: a kernel may refuse
/// to attach it, or attach it to a function that nothing calls.
fn calls_lsm_programs(ebpf: &mut Ebpf, btf: &Btf, pins: &Pins) -> Result<(), String> {
    fn text(error: impl std::fmt::Display) -> String {
        error.to_string()
    }
    let mut calls: Array<MapData, u64> = MapData::from_pin(pins.map("LSM_CALLS"))
        .and_then(Map::from_map_data)
        .and_then(Array::try_from)
        .map_err(|error: MapError| error.to_string())?;
    calls.set(0, 0, 0).map_err(text)?;
    let Some(Program::Lsm(probe)) = ebpf.program_mut("lsm_probe") else {
        return Err("the object holds no probe for it".to_owned());
    };
    let loaded = probe.load("socket_create", btf);
    loaded.map_err(|error| reason_of("lsm_probe", error))?;
    let link = probe.attach().map_err(|error| reason_of("lsm_probe", error))?;
    // Any socket will do: the hook is asked at each.
    let asked = UnixDatagram::unbound();
    let called = calls.get(&0, 0);
    probe.detach(link).map_err(text)?;
    probe.unload().map_err(text)?;
    asked.map_err(text)?;
    match called {
        Ok(0) => {
            let list = fs::read_to_string("/sys/kernel/security/lsm");
            let list = list.map_or_else(|_unmounted| String::new(), |list| format!(" ({list})"));
            Err(format!(
                "the BPF LSM is not among the kernel's active modules{list}; boot with `bpf` in lsm="
            ))
        }
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Loads every program, all at once: what the verifier takes for them is most of a start.
fn load_programs(
    ebpf: &mut Ebpf,
    btf: &Btf,
    lsm: &Result<(), String>,
) -> BTreeMap<&'static str, Result<(), String>> {
    thread::scope(|scope| {
        let mut outcomes = BTreeMap::new();
        let mut loading = Vec::new();
        for (name, program) in ebpf.programs_mut() {
            let Some(door) = doors().iter().find(|door| door.program == name) else { continue };
            match (door.layer, lsm) {
                (Layer::Lsm, Err(reason)) => {
                    outcomes.insert(door.program, Err(reason.clone()));
                }
                (Layer::Lsm, Ok(())) | (Layer::Portable, _) => {
                    let load =
                        scope.spawn(move || load_program(door.program, door.hook, program, btf));
                    loading.push((door.program, load));
                }
            }
        }
        let ended = |_panic| Err("its loader ended before its time".to_owned());
        outcomes.extend(
            loading.into_iter().map(|(name, load)| (name, load.join().unwrap_or_else(ended))),
        );
        outcomes
    })
}

/// Loads one program for a hook; the reason in one line when the kernel does not take it.
#[expect(clippy::wildcard_enum_match_arm, reason = "aya's kinds of programs are not ours")]
pub(super) fn load_program(
    name: &str,
    hook: &str,
    program: &mut Program,
    btf: &Btf,
) -> Result<(), String> {
    let function = hook.rsplit('/').next().unwrap_or(hook);
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::BtfTracePoint(program) => program.load(function, btf),
        Program::Lsm(program) => program.load(function, btf),
        _ => return Err(format!("{name} is of a kind that is not known here")),
    };
    match loaded {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(reason_of(name, error)),
    }
}

/// Why the kernel does not take a program, in one line.
#[expect(clippy::wildcard_enum_match_arm, reason = "aya's errors are not ours")]
pub(super) fn reason_of(name: &str, error: ProgramError) -> String {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            tracing::debug!(program = name, %log, "the verifier refused a program");
            // What it ends with is its own account.
            let account = ["processed ", "stack depth ", "verification time "];
            let said = |line: &&str| !account.iter().any(|part| line.starts_with(part));
            let last = log.lines().rev().find(said);
            format!("{io_error}: {}", last.unwrap_or("the verifier says nothing"))
        }
        error => causes(&error),
    }
}

fn pin(ebpf: &mut Ebpf, door: &Door, pins: &Pins) -> Result<(), LoadError> {
    let program =
        ebpf.program_mut(door.program).ok_or_else(|| LoadError::part(door.program, "is gone"))?;
    program.pin(pins.program(door.program)).map_err(|error| LoadError::part(door.program, error))
}

/// The programs of all active doors, from their pins. A door is not active any more where this process
/// may not attach its program.
fn open_programs(
    pins: &Pins,
    states: &mut [(Door, DoorState)],
) -> Result<(Vec<AttachedProgram>, Vec<GlobalProgram>), LoadError> {
    let (mut programs, mut globals) = (Vec::new(), Vec::new());
    for (door, state) in states {
        match (&*state, door.gate) {
            (DoorState::Unavailable(_), _) => {}
            (DoorState::Active, Some(gate)) => globals.push(GlobalProgram::open(door, gate, pins)?),
            (DoorState::Active, None) => {
                let mut program = AttachedProgram::open(door.program, &pins.program(door.program))?;
                if let Err(reason) = program.probe() {
                    *state = DoorState::Unavailable(reason);
                }
                programs.push(program);
            }
        }
    }
    Ok((programs, globals))
}
