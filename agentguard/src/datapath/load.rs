//! Loading the kernel half, or adopting the one that is already in force.
//!
//! Everything is pinned: a daemon that goes leaves enforcement as it is. The pins of one build of
//! the object share a directory named after it:
//!
//! ```text
//! <pin directory>/<object>/maps/<name>        tables
//! <pin directory>/<object>/programs/<name>    programs, for cgroups still to come
//! <pin directory>/<object>/links/<name>       what is global (tracepoints)
//! <pin directory>/<object>/links/<cgroup id>-<name>   what is attached to a cgroup
//! ```
//!
//! A daemon of the same build adopts them as they are. One of another build sets up its own beside
//! them and removes theirs last ([`Datapath::remove_others`]), so that both decide for a moment
//! and none never.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use agentguard_common::abi::{self, KernelOffsets, Settings};
use aya::programs::{
    CgroupSkb, CgroupSkbAttachType, CgroupSock, CgroupSockAddr, CgroupSockAddrAttachType,
    CgroupSockAttachType, Program, ProgramError,
};
use aya::{Btf, Ebpf, EbpfLoader};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use sha2::{Digest as _, Sha256};

use super::events::Diagnostics;
use super::kernel::{Kernel, KernelError};
use super::object;
use super::protection::{Door, DoorState, GAP_OTHERS, GAPS, Protection, doors};
use super::tables::{Tables, fd_link};

/// How much each table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub workloads: u32,
    pub cgroups: u32,
    pub destinations: u32,
    pub rules: u32,
    pub executables: u32,
    pub unix_sockets: u32,
    pub unix_names: u32,
    /// Processes by whose descendants they are.
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
            unix_sockets: 65536,
            unix_names: 8192,
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
    #[error("the kernel half does not load: {source}; run `agentguard doctor` as root")]
    Load { source: Box<aya::EbpfError> },
    #[error("the kernel half's {name} can not be used: {reason}")]
    Part { name: String, reason: String },
}

impl LoadError {
    pub(super) fn part(name: &str, reason: impl std::fmt::Display) -> Self {
        Self::Part { name: name.to_owned(), reason: reason.to_string() }
    }
}

/// The kernel half, in force.
pub struct Datapath {
    pub(super) programs: Vec<AttachedProgram>,
    pub(super) pins: PathBuf,
    pub(super) tables: Tables,
    states: Vec<(Door, DoorState)>,
    adopted: bool,
    /// What the programs say of themselves, until somebody takes it to read.
    diagnostics: Option<Diagnostics>,
}

/// A program that can be attached to cgroups.
pub(super) struct AttachedProgram {
    pub(super) name: &'static str,
    pub(super) kind: CgroupProgram,
}

pub(super) enum CgroupProgram {
    SockAddr(CgroupSockAddr, CgroupSockAddrAttachType),
    Sock(CgroupSock, CgroupSockAttachType),
    Skb(CgroupSkb, CgroupSkbAttachType),
}

impl CgroupProgram {
    fn id(&self) -> Option<u32> {
        let info = match self {
            Self::SockAddr(program, _) => program.info(),
            Self::Sock(program, _) => program.info(),
            Self::Skb(program, _) => program.info(),
        };
        info.ok().map(|info| info.id())
    }
}

/// Maps of the object that are pinned.
const PINNED_MAPS: [&str; 16] = [
    "WORKLOADS",
    "CGROUPS",
    "MOVED",
    "DESTINATIONS",
    "RULES",
    "EXECUTABLES",
    "VERDICTS",
    "PROCESSES",
    "COUNTERS",
    "SETTINGS",
    "DENIED",
    "ALLOWED",
    "ATTACHMENTS",
    "SOCKETS",
    "TASKS",
    "BLANK",
];

impl Datapath {
    /// Adopts the kernel half that is in force, or loads it.
    ///
    /// # Errors
    ///
    /// When nothing of it can be loaded. A single program that this kernel does not take is no
    /// error: see [`Datapath::states`].
    pub fn open(options: &Options) -> Result<Self, LoadError> {
        mount_bpffs(&options.pin_directory)?;
        let pins = options.pin_directory.join(fingerprint(&options.sizes));
        if pins.join(READY).exists() {
            return Self::adopt(pins, options);
        }
        // What a start that was cut short left behind enforces nothing yet.
        remove_pins(&pins)?;
        make_directories(&pins)?;
        let kernel = Kernel::running()?;
        let offsets = kernel.offsets()?;
        let signal = kernel.function("bpf_send_signal_task");
        // aya's loader reads the kernel's types for itself, and lends them to nobody.
        let (btf, loader) = thread::scope(|scope| {
            let loader = scope.spawn(EbpfLoader::new);
            (kernel.for_loader(), loader.join())
        });
        let btf = btf?;
        let loader = loader.unwrap_or_else(|_panic| EbpfLoader::new());
        let mut ebpf = load(loader, options, &pins, &offsets, &btf, &object::bind(signal))?;
        if signal.is_some() && !takes_kernel_function(&mut ebpf, &btf) {
            drop(ebpf);
            remove_pins(&pins)?;
            make_directories(&pins)?;
            let loader = EbpfLoader::new();
            ebpf = load(loader, options, &pins, &offsets, &btf, &object::bind(None))?;
        } else if signal.is_some() {
            let path = pins.join(ENDS_OTHERS);
            fs::create_dir(&path).map_err(|source| LoadError::Pin { path, source })?;
        }
        Self::set_up(ebpf, pins, options, &btf)
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
        let ends_others = self.pins.join(ENDS_OTHERS).exists();
        let of_kernel = (!ends_others).then_some(GAP_OTHERS);
        GAPS.into_iter().chain(of_kernel).map(str::to_owned).collect()
    }

    /// How much of the promise is kept.
    #[must_use]
    pub fn protection(&self) -> Protection {
        Protection::of(&self.states, self.gaps())
    }

    fn set_up(
        mut ebpf: Ebpf,
        pins: PathBuf,
        options: &Options,
        btf: &Btf,
    ) -> Result<Self, LoadError> {
        let mut programs = Vec::new();
        let mut states = Vec::new();
        let mut loaded = load_programs(&mut ebpf, btf);
        for door in doors() {
            let outcome = loaded
                .remove(door.program)
                .unwrap_or_else(|| Err("the object does not hold it".to_owned()));
            let state = match outcome {
                Ok(()) => {
                    let path = pins.join("programs").join(door.program);
                    let program = ebpf
                        .program_mut(door.program)
                        .ok_or_else(|| LoadError::part(door.program, "is gone"))?;
                    program.pin(&path).map_err(|error| LoadError::part(door.program, error))?;
                    match cgroup_program(door.program, &path)? {
                        Some(kind) => {
                            programs.push(AttachedProgram { name: door.program, kind });
                            DoorState::Active
                        }
                        None => attach_tracepoint(door, program, &pins),
                    }
                }
                Err(reason) => DoorState::Unavailable(reason),
            };
            states.push((*door, state));
        }
        let tables = Tables::open(&pins.join("maps"))?;
        let mut datapath = Self {
            programs,
            pins,
            tables,
            states,
            adopted: false,
            diagnostics: Diagnostics::of(&mut ebpf),
        };
        datapath.set(options.settings)?;
        let ready = datapath.pins.join(READY);
        fs::create_dir(&ready).map_err(|source| LoadError::Pin { path: ready, source })?;
        Ok(datapath)
    }

    fn adopt(pins: PathBuf, options: &Options) -> Result<Self, LoadError> {
        let mut programs = Vec::new();
        let mut states = Vec::new();
        for door in doors() {
            let program = pins.join("programs").join(door.program);
            let state = if !program.exists() {
                DoorState::Unavailable("this kernel did not take it when it was set up".to_owned())
            } else if let Some(kind) = cgroup_program(door.program, &program)? {
                programs.push(AttachedProgram { name: door.program, kind });
                DoorState::Active
            } else if pins.join("links").join(door.program).exists() {
                DoorState::Active
            } else {
                DoorState::Unavailable("its pinned link is gone".to_owned())
            };
            states.push((*door, state));
        }
        let tables = Tables::open(&pins.join("maps"))?;
        let diagnostics =
            programs.first().and_then(|program| Diagnostics::adopt(program.kind.id()?));
        let mut datapath = Self { programs, pins, tables, states, adopted: true, diagnostics };
        datapath.set(options.settings)?;
        Ok(datapath)
    }

    /// Removes what other builds of the kernel half left in force beside this one; to be called
    /// once this one holds everything that they held.
    ///
    /// # Errors
    ///
    /// When a pin can not be removed.
    pub fn remove_others(&self, pin_directory: &Path) -> Result<usize, LoadError> {
        let mut removed = 0;
        for path in builds(pin_directory)? {
            if path != self.pins {
                remove_pins(&path)?;
                fs::remove_dir(&path).map_err(|source| LoadError::Pin { path, source })?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// Removes all protection: every program, table and link pinned below `pin_directory`. Returns how
/// many builds of the kernel half were in force.
///
/// # Errors
///
/// When a pin can not be removed.
pub fn uninstall(pin_directory: &Path) -> Result<usize, LoadError> {
    let builds = builds(pin_directory)?;
    for path in &builds {
        remove_pins(path)?;
        fs::remove_dir(path).map_err(|source| LoadError::Pin { path: path.clone(), source })?;
    }
    match fs::remove_dir(pin_directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(LoadError::Pin { path: pin_directory.to_owned(), source }),
    }
    Ok(builds.len())
}

/// Present where the kernel half can end a task that is not the caller.
const ENDS_OTHERS: &str = "ends-others";
/// Present once a build is set up completely.
const READY: &str = "ready";

/// A directory name for this build of the object with tables of these sizes: whatever shares it
/// can be adopted.
fn fingerprint(sizes: &Sizes) -> String {
    let mut digest = Sha256::new();
    digest.update(object::OBJECT);
    digest.update(format!("{} {sizes:?}", abi::VERSION));
    digest.finalize().iter().take(8).fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn builds(pin_directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let error = |source| LoadError::Pin { path: pin_directory.to_owned(), source };
    let entries = match fs::read_dir(pin_directory) {
        Ok(entries) => entries,
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(error(source)),
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(error)).collect()
}

/// Removes the pins of one build, links first: a program without tables would refuse everything.
fn remove_pins(pins: &Path) -> Result<(), LoadError> {
    for mark in [READY, ENDS_OTHERS] {
        let path = pins.join(mark);
        if path.exists() {
            fs::remove_dir(&path).map_err(|source| LoadError::Pin { path, source })?;
        }
    }
    for directory in ["links", "programs", "maps"] {
        let path = pins.join(directory);
        let error = |source| LoadError::Pin { path: path.clone(), source };
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(error(source)),
        };
        for entry in entries {
            fs::remove_file(entry.map_err(error)?.path()).map_err(error)?;
        }
        fs::remove_dir(&path).map_err(error)?;
    }
    Ok(())
}

fn make_directories(pins: &Path) -> Result<(), LoadError> {
    for directory in ["maps", "programs", "links"] {
        let path = pins.join(directory);
        fs::create_dir_all(&path).map_err(|source| LoadError::Pin { path, source })?;
    }
    Ok(())
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

fn load<'a>(
    mut loader: EbpfLoader<'a>,
    options: &Options,
    pins: &Path,
    offsets: &'a KernelOffsets,
    btf: &'a Btf,
    object: &[u8],
) -> Result<Ebpf, LoadError> {
    let Sizes {
        workloads,
        cgroups,
        destinations,
        rules,
        executables,
        // Their tables come with the hooks of the LSM layer.
        unix_sockets: _,
        unix_names: _,
        tasks: _,
        verdicts,
        counters,
        denied_ring,
        allowed_ring,
    } = options.sizes;
    loader
        .btf(Some(btf))
        .allow_unsupported_maps()
        .override_global("OFFSETS", offsets, true)
        .map_max_entries("WORKLOADS", workloads)
        .map_max_entries("CGROUPS", cgroups)
        .map_max_entries("MOVED", workloads)
        .map_max_entries("DESTINATIONS", destinations)
        .map_max_entries("RULES", rules)
        .map_max_entries("EXECUTABLES", executables)
        .map_max_entries("VERDICTS", verdicts)
        .map_max_entries("COUNTERS", counters)
        .map_max_entries("DENIED", denied_ring)
        .map_max_entries("ALLOWED", allowed_ring);
    for name in PINNED_MAPS {
        loader.map_pin_path(name, pins.join("maps").join(name));
    }
    loader.load(object).map_err(|source| LoadError::Load { source: Box::new(source) })
}

/// Whether the verifier lets the tracepoints call the kernel function they were bound to.
fn takes_kernel_function(ebpf: &mut Ebpf, btf: &Btf) -> bool {
    match ebpf.program_mut("process_fork") {
        Some(Program::BtfTracePoint(program)) => program.load("sched_process_fork", btf).is_ok(),
        Some(_) | None => false,
    }
}

/// Loads every program, all at once: what the verifier takes for them is most of a start.
fn load_programs(ebpf: &mut Ebpf, btf: &Btf) -> BTreeMap<&'static str, Result<(), String>> {
    thread::scope(|scope| {
        let loading: Vec<_> = ebpf
            .programs_mut()
            .filter_map(|(name, program)| {
                let door = doors().iter().find(|door| door.program == name)?;
                Some((door.program, scope.spawn(move || load_program(door, program, btf))))
            })
            .collect();
        let ended = |_panic| Err("its loader ended before its time".to_owned());
        loading.into_iter().map(|(name, load)| (name, load.join().unwrap_or_else(ended))).collect()
    })
}

/// Loads one program; the reason in one line when the kernel does not take it.
#[expect(clippy::wildcard_enum_match_arm, reason = "aya's kinds of programs are not ours")]
fn load_program(door: &Door, program: &mut Program, btf: &Btf) -> Result<(), String> {
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::BtfTracePoint(program) => {
            let tracepoint = door.hook.rsplit('/').next().unwrap_or(door.hook);
            program.load(tracepoint, btf)
        }
        _ => return Err(format!("{} is of a kind that is not known here", door.program)),
    };
    match loaded {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            tracing::debug!(program = door.program, %log, "the verifier refused a program");
            let last = log.lines().rev().find(|line| !line.starts_with("processed"));
            Err(format!("{io_error}: {}", last.unwrap_or("the verifier says nothing")))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// A tracepoint is in force from here on, for all tasks.
fn attach_tracepoint(door: &Door, program: &mut Program, pins: &Path) -> DoorState {
    let Program::BtfTracePoint(program) = program else {
        return DoorState::Unavailable("it is no tracepoint".to_owned());
    };
    let mut attach = || -> Result<(), String> {
        let id = program.attach().map_err(|error| error.to_string())?;
        let link = program.take_link(id).map_err(|error| error.to_string())?;
        fd_link(link)?
            .pin(pins.join("links").join(door.program))
            .map_err(|error| error.to_string())?;
        Ok(())
    };
    match attach() {
        Ok(()) => DoorState::Active,
        Err(reason) => DoorState::Unavailable(reason),
    }
}

/// The pinned program under its kind, if it is one for cgroups.
fn cgroup_program(name: &str, path: &Path) -> Result<Option<CgroupProgram>, LoadError> {
    use CgroupSockAddrAttachType as Address;
    let address = match name {
        "connect4" => Address::Connect4,
        "connect6" => Address::Connect6,
        "sendmsg4" => Address::UDPSendMsg4,
        "sendmsg6" => Address::UDPSendMsg6,
        "bind4" => Address::Bind4,
        "bind6" => Address::Bind6,
        "sock_create" => {
            let kind = CgroupSockAttachType::SockCreate;
            return CgroupSock::from_pin(path, kind)
                .map(|program| Some(CgroupProgram::Sock(program, kind)))
                .map_err(|error| LoadError::part(name, error));
        }
        "egress" => {
            let kind = CgroupSkbAttachType::Egress;
            return CgroupSkb::from_pin(path, kind)
                .map(|program| Some(CgroupProgram::Skb(program, kind)))
                .map_err(|error| LoadError::part(name, error));
        }
        _ => return Ok(None),
    };
    CgroupSockAddr::from_pin(path, address)
        .map(|program| Some(CgroupProgram::SockAddr(program, address)))
        .map_err(|error| LoadError::part(name, error))
}
