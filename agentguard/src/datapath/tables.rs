//! The verbs of the datapath over its tables and hooks.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use agentguard_common::abi::{Attachment, CachedVerdict, Membership, Moved, Settings};
use agentguard_common::allowlist::{
    DestinationEntry, DestinationKey, ExecutableEntry, ExecutableKey, Permission, RuleRow, Tag,
    UnixName, UnixSocketKey,
};
use agentguard_common::event::{Process, RequestKey};
use agentguard_common::stats::Counters;
use agentguard_common::{AllowlistId, CgroupId, FileId, RuleSetId, UnixNameId, WorkloadId};
use aya::maps::cgroup_storage::CgroupStorageKey;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray};

// The storage of an attachment, on every kernel; its newer namesake exists from 6.2 on.
#[expect(deprecated, reason = "aya calls it so for the newer one, which older kernels lack")]
use aya::maps::CgroupStorage;

use super::capacity::{Capacities, Fill, Table, is_full, refused, says_full};
use super::events::{Ring, Rings};
use super::load::{Datapath, LoadError, Sizes};
use super::pins::Pins;
use super::protection::{Door, DoorState};
use crate::allowlist::compile::Rows;

/// The datapath did not take a change; nothing of it is in force.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    #[error("the kernel's table {table} is full: it has room for {capacity} rows; {remedy}")]
    Full { table: &'static str, capacity: u32, remedy: &'static str },
    #[error(
        "the kernel's table {table} did not take a row: {source}; see the kernel's log (dmesg)"
    )]
    Table { table: &'static str, source: MapError },
    #[error("the cgroup {path} can not be opened: {source}")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error(
        "{program} can not be attached to the cgroup {path}: {reason}; where it is not permitted, a program of a cgroup above may allow none below: see bpftool cgroup tree"
    )]
    Attach { program: &'static str, path: PathBuf, reason: String },
    #[error("the pin {path} can not be removed: {source}")]
    Unpin { path: PathBuf, source: io::Error },
}

/// Rows of CGROUPS that are kept for cgroups that user space brings: a workload that makes cgroups until
/// the table is full takes no room of the next one's. Each is the row of a cgroup that can not be,
/// given up for one that is.
const RESERVE: u32 = 256;

/// The kernel's tables, by what they mean.
#[expect(deprecated, reason = "see the import of CgroupStorage")]
pub(super) struct Tables {
    workloads: HashMap<MapData, WorkloadId, Tag>,
    cgroups: HashMap<MapData, CgroupId, Membership>,
    moved: HashMap<MapData, u32, Moved>,
    followed: HashMap<MapData, CgroupId, u32>,
    tasks: HashMap<MapData, u64, Membership>,
    destinations: LpmTrie<MapData, DestinationKey, DestinationEntry>,
    rules: HashMap<MapData, RuleSetId, RuleRow>,
    executables: HashMap<MapData, ExecutableKey, ExecutableEntry>,
    runtimes: HashMap<MapData, FileId, u32>,
    unix_sockets: HashMap<MapData, UnixSocketKey, Permission>,
    unix_names: HashMap<MapData, UnixName, UnixNameId>,
    verdicts: HashMap<MapData, RequestKey, CachedVerdict>,
    counters: PerCpuArray<MapData, Counters>,
    settings: Array<MapData, Settings>,
    attachments: CgroupStorage<MapData, Attachment>,
    capacities: Capacities,
    /// The rows of CGROUPS that are kept free.
    reserve: BTreeSet<CgroupId>,
    /// How many there are to be.
    reserved: u32,
}

impl Tables {
    pub(super) fn open(pins: &Pins, sizes: &Sizes) -> Result<Self, LoadError> {
        let capacities = Capacities::read(pins)?;
        // One of an earlier version has no room for them.
        let room = capacities.of(Table::Cgroups).saturating_sub(sizes.cgroups);
        let cgroups: HashMap<MapData, CgroupId, Membership> = open(pins, "CGROUPS")?;
        Ok(Self {
            reserved: sizes.reserved_cgroups().min(room),
            reserve: cgroups.keys().filter_map(Result::ok).filter(|id| is_reserve(*id)).collect(),
            capacities,
            workloads: open(pins, "WORKLOADS")?,
            cgroups,
            moved: open(pins, "MOVED")?,
            followed: open(pins, "FOLLOWED")?,
            tasks: open(pins, "TASKS")?,
            destinations: open(pins, "DESTINATIONS")?,
            rules: open(pins, "RULES")?,
            executables: open(pins, "EXECUTABLES")?,
            runtimes: open(pins, "RUNTIMES")?,
            unix_sockets: open(pins, "UNIX_SOCKETS")?,
            unix_names: open(pins, "UNIX_NAMES")?,
            verdicts: open(pins, "VERDICTS")?,
            counters: open(pins, "COUNTERS")?,
            settings: open(pins, "SETTINGS")?,
            attachments: open(pins, "ATTACHMENTS")?,
        })
    }
}

impl Tables {
    /// Makes a cgroup a workload's, in a place that is kept free where there is no other.
    fn enroll(&mut self, cgroup: CgroupId, membership: Membership) -> Result<(), DatapathError> {
        loop {
            match self.cgroups.insert(cgroup, membership, 0) {
                Err(error) if is_full(&error) => {
                    let error = self.capacities.row(Table::Cgroups)(error);
                    // The kernel half may take the place in between; then there is another.
                    let place = self.reserve.pop_last().ok_or(error)?;
                    absent_is_fine(self.cgroups.remove(&place))
                        .map_err(self.capacities.row(Table::Cgroups))?;
                }
                done => return done.map_err(self.capacities.row(Table::Cgroups)),
            }
        }
    }
}

/// A pinned table, as the kind of table it is.
fn open<T>(pins: &Pins, name: &str) -> Result<T, LoadError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let error = |error: MapError| LoadError::part(name, error);
    let data = MapData::from_pin(pins.map(name)).map_err(error)?;
    T::try_from(Map::from_map_data(data).map_err(error)?).map_err(error)
}

/// What the kernel knows of processes of workloads; a handle of its own for whoever reads records.
pub struct Processes(HashMap<MapData, u32, Process>);

impl Processes {
    /// What is known of a process, also for a while after its end.
    #[must_use]
    pub fn get(&self, pid: u32) -> Option<Process> {
        self.0.get(&pid, 0).ok()
    }
}

impl Sizes {
    /// The rows of CGROUPS that are kept free beside those that are asked for.
    const fn reserved_cgroups(&self) -> u32 {
        if self.workloads < RESERVE { self.workloads } else { RESERVE }
    }

    /// How many rows CGROUPS is made for.
    pub(super) const fn cgroup_rows(&self) -> u32 {
        self.cgroups.saturating_add(self.reserved_cgroups())
    }
}

/// The cgroups that can not be: the kernel counts from one.
fn reserve() -> impl Iterator<Item = CgroupId> {
    (0..u64::from(RESERVE)).map(|number| CgroupId(u64::MAX - number))
}

fn is_reserve(cgroup: CgroupId) -> bool {
    cgroup.0 > u64::MAX - u64::from(RESERVE)
}

impl Datapath {
    /// What the kernel knows of processes of workloads.
    ///
    /// # Errors
    ///
    /// When the table can not be opened.
    pub fn processes(&self) -> Result<Processes, LoadError> {
        open(&self.pins, "PROCESSES").map(Processes)
    }

    /// The rings of records; to be read by one reader.
    ///
    /// # Errors
    ///
    /// When a ring can not be mapped.
    pub fn rings(&self) -> Result<Rings, LoadError> {
        let ring = |name| -> Result<Ring, LoadError> {
            let info = MapData::from_pin(self.pins.map(name)).and_then(|map| map.info());
            let capacity = info.map_err(|error| LoadError::part(name, error))?.max_entries();
            Ok(Ring::new(open(&self.pins, name)?, capacity))
        };
        Ok(Rings::new(ring("DENIED")?, ring("ALLOWED")?))
    }

    /// Changes what can be changed while programs run.
    ///
    /// # Errors
    ///
    /// When the table does not take it.
    pub fn set(&mut self, settings: Settings) -> Result<(), LoadError> {
        self.tables.settings.set(0, settings, 0).map_err(|error| LoadError::part("SETTINGS", error))
    }

    /// Makes `files` all that runs containers on this host: what such a program makes its child do
    /// in a workload's cgroup, before anything of the workload has run there, is its own doing.
    ///
    /// # Errors
    ///
    /// When the table does not take it.
    pub fn set_runtimes(&mut self, files: &BTreeSet<FileId>) -> Result<(), DatapathError> {
        let Tables { runtimes: table, capacities, .. } = &mut self.tables;
        let known: BTreeSet<FileId> = table.keys().flatten().collect();
        // The kernel half reads no generation of these.
        let wanted: BTreeSet<FileId> =
            files.iter().map(|file| FileId { generation: 0, ..*file }).collect();
        for file in known.difference(&wanted) {
            absent_is_fine(table.remove(file)).map_err(capacities.row(Table::Runtimes))?;
        }
        for file in wanted.difference(&known) {
            table.insert(file, 0, 0).map_err(capacities.row(Table::Runtimes))?;
        }
        Ok(())
    }

    /// Writes an allow-list beside those in force. It decides nothing until a tag leads to it.
    ///
    /// # Errors
    ///
    /// When a table is full; what was written is taken back.
    pub fn load_allowlist(&mut self, rows: &Rows) -> Result<(), DatapathError> {
        let written = self.write_rows(rows);
        if written.is_err() {
            // What can not be removed was never written.
            let _incomplete = self.drop_allowlist(rows);
        }
        written
    }

    fn write_rows(&mut self, rows: &Rows) -> Result<(), DatapathError> {
        let tables = &mut self.tables;
        for (id, rules) in &rows.rules {
            tables.rules.insert(id, rules, 0).map_err(tables.capacities.row(Table::Rules))?;
        }
        for (prefix, key, entry) in &rows.destinations {
            tables
                .destinations
                .insert(&Key::new(*prefix, *key), entry, 0)
                .map_err(tables.capacities.row(Table::Destinations))?;
        }
        for (key, entry) in &rows.executables {
            tables
                .executables
                .insert(key, entry, 0)
                .map_err(tables.capacities.row(Table::Executables))?;
        }
        for (key, permission) in &rows.unix_sockets {
            tables
                .unix_sockets
                .insert(key, permission, 0)
                .map_err(tables.capacities.row(Table::UnixSockets))?;
        }
        Ok(())
    }

    /// Removes an allow-list that no tag leads to any more. To be called a grace period after the
    /// switch, when no program can be reading it.
    ///
    /// # Errors
    ///
    /// When a row can not be removed.
    pub fn drop_allowlist(&mut self, rows: &Rows) -> Result<(), DatapathError> {
        let tables = &mut self.tables;
        let mut result = Ok(());
        let mut keep = |outcome: Result<(), MapError>, table| {
            if let Err(source) = absent_is_fine(outcome) {
                result = Err(DatapathError::Table { table, source });
            }
        };
        for (prefix, key, _) in &rows.destinations {
            keep(tables.destinations.remove(&Key::new(*prefix, *key)), "DESTINATIONS");
        }
        for (key, _) in &rows.executables {
            keep(tables.executables.remove(key), "EXECUTABLES");
        }
        for (key, _) in &rows.unix_sockets {
            keep(tables.unix_sockets.remove(key), "UNIX_SOCKETS");
        }
        for (id, _) in &rows.rules {
            keep(tables.rules.remove(id), "RULES");
        }
        result
    }

    /// Removes every row of allow-lists below `first` and every row of rules below `first_rules`:
    /// what an earlier daemon left and nobody leads to. Where some of them are `spared`, the rules are too.
    ///
    /// # Errors
    ///
    /// When a row can not be removed.
    pub fn sweep(
        &mut self,
        first: AllowlistId,
        first_rules: RuleSetId,
        spared: &BTreeSet<AllowlistId>,
    ) -> Result<usize, DatapathError> {
        let tables = &mut self.tables;
        let is_over = |number: AllowlistId| number < first && !spared.contains(&number);
        // Whose a rule is only the rows that lead to it tell.
        let first_rules = if spared.is_empty() { first_rules } else { RuleSetId::NONE };
        let destinations: Vec<_> = tables
            .destinations
            .keys()
            .filter_map(Result::ok)
            .filter(|key| is_over({ key.data() }.allowlist))
            .collect();
        let executables: Vec<_> = tables
            .executables
            .keys()
            .filter_map(Result::ok)
            .filter(|key| is_over(key.allowlist))
            .collect();
        let unix_sockets: Vec<_> = tables
            .unix_sockets
            .keys()
            .filter_map(Result::ok)
            .filter(|key| is_over(key.allowlist))
            .collect();
        let rules: Vec<_> =
            tables.rules.keys().filter_map(Result::ok).filter(|id| *id < first_rules).collect();
        let swept = destinations.len() + executables.len() + unix_sockets.len() + rules.len();
        for key in &destinations {
            tables.destinations.remove(key).map_err(tables.capacities.row(Table::Destinations))?;
        }
        for key in &executables {
            tables.executables.remove(key).map_err(tables.capacities.row(Table::Executables))?;
        }
        for key in &unix_sockets {
            tables.unix_sockets.remove(key).map_err(tables.capacities.row(Table::UnixSockets))?;
        }
        for id in &rules {
            tables.rules.remove(id).map_err(tables.capacities.row(Table::Rules))?;
        }
        Ok(swept)
    }

    /// The highest numbers in use, so that an adopting daemon gives out higher ones. A verdict that
    /// is still remembered uses the number of its allow-list, of which nothing else may be left.
    #[must_use]
    pub fn highest(&self) -> (AllowlistId, RuleSetId, WorkloadId) {
        let tables = &self.tables;
        let tags = tables.workloads.iter().filter_map(Result::ok);
        let (mut allowlist, mut workload) = (AllowlistId::NONE, WorkloadId::NONE);
        for (id, tag) in tags {
            allowlist = allowlist.max(tag.allowlist);
            workload = workload.max(id);
        }
        let listed = tables.verdicts.keys().filter_map(Result::ok);
        allowlist = listed.fold(allowlist, |high, key| high.max(key.allowlist));
        let listed = tables.destinations.keys().filter_map(Result::ok);
        allowlist = listed.fold(allowlist, |high, key| high.max({ key.data() }.allowlist));
        let listed = tables.executables.keys().filter_map(Result::ok);
        allowlist = listed.fold(allowlist, |high, key| high.max(key.allowlist));
        let listed = tables.unix_sockets.keys().filter_map(Result::ok);
        allowlist = listed.fold(allowlist, |high, key| high.max(key.allowlist));
        let rules = tables.rules.keys().filter_map(Result::ok).max().unwrap_or(RuleSetId::NONE);
        (allowlist, rules, workload)
    }

    /// Gives a name of unix sockets its number. To be called before an allow-list that uses the
    /// number is loaded: until then no socket of that name is told from one that no scope mentions.
    ///
    /// # Errors
    ///
    /// When the table is full.
    pub fn name_unix_socket(
        &mut self,
        name: &UnixName,
        number: UnixNameId,
    ) -> Result<(), DatapathError> {
        self.tables
            .unix_names
            .insert(name, number, 0)
            .map_err(self.tables.capacities.row(Table::UnixNames))
    }

    /// Takes a name's number away. To be called when no allow-list uses it any more.
    ///
    /// # Errors
    ///
    /// When the row can not be removed.
    pub fn forget_unix_name(&mut self, name: &UnixName) -> Result<(), DatapathError> {
        absent_is_fine(self.tables.unix_names.remove(name))
            .map_err(self.tables.capacities.row(Table::UnixNames))
    }

    /// The names of unix sockets that have a number.
    #[must_use]
    pub fn unix_names(&self) -> Vec<(UnixName, UnixNameId)> {
        self.tables.unix_names.iter().filter_map(Result::ok).collect()
    }

    /// The highest number of a name that anything refers to.
    #[must_use]
    pub fn highest_unix_name(&self) -> UnixNameId {
        let named = self.tables.unix_names.iter().filter_map(Result::ok).map(|(_, number)| number);
        let used = self.tables.unix_sockets.keys().filter_map(Result::ok).map(|key| key.name);
        named.chain(used).max().unwrap_or(UnixNameId::NONE)
    }

    /// Holds a workload to `tag` from now on: one write, and every hook sees the old row or the
    /// new one.
    ///
    /// # Errors
    ///
    /// When the table is full.
    pub fn switch(&mut self, workload: WorkloadId, tag: Tag) -> Result<(), DatapathError> {
        self.tables
            .workloads
            .insert(workload, tag.of(workload), 0)
            .map_err(self.tables.capacities.row(Table::Workloads))
    }

    /// Forgets a workload; its cgroups must be gone or released.
    ///
    /// # Errors
    ///
    /// When the row can not be removed.
    pub fn forget(&mut self, workload: WorkloadId) -> Result<(), DatapathError> {
        absent_is_fine(self.tables.workloads.remove(&workload))
            .map_err(self.tables.capacities.row(Table::Workloads))
    }

    /// The workloads the kernel holds, with their tags.
    #[must_use]
    pub fn workloads(&self) -> Vec<(WorkloadId, Tag)> {
        self.tables.workloads.iter().filter_map(Result::ok).collect()
    }

    /// The cgroups the kernel takes for a workload's.
    #[must_use]
    pub fn cgroups(&self) -> Vec<(CgroupId, WorkloadId)> {
        let cgroups = self.tables.cgroups.iter().filter_map(Result::ok);
        cgroups
            .filter(|(cgroup, _)| !is_reserve(*cgroup))
            .map(|(cgroup, membership)| (cgroup, membership.workload))
            .collect()
    }

    /// The workload of a cgroup, as the kernel sees it.
    #[must_use]
    pub fn workload_of(&self, cgroup: CgroupId) -> Option<WorkloadId> {
        self.tables.cgroups.get(&cgroup, 0).ok().map(|membership| membership.workload)
    }

    /// Makes the cgroup at `path` and all below it the workload's, with every hook attached.
    ///
    /// Its tag must be in force already. The processes in it are tied to the workload.
    ///
    /// # Errors
    ///
    /// When a hook can not be attached or the table is full; what is held by then stays held.
    pub fn capture(
        &mut self,
        path: &Path,
        workload: WorkloadId,
    ) -> Result<CgroupId, DatapathError> {
        let id = cgroup_id(path)?;
        let attached = self.attach(path, Attachment { cgroup: id.0, workload, reserved: 0 });
        // From here on the kernel gives the tag to every child that is made; those that were
        // there before are found by going through them afterwards. Also where a hook of the cgroup's is
        // missing: the global ones go by its row. Once, since tying processes holds up the host's forks.
        if attached.is_ok() || self.workload_of(id) != Some(workload) {
            self.join(path, workload)?;
        }
        attached.map(|()| id)
    }

    fn join(&mut self, path: &Path, workload: WorkloadId) -> Result<(), DatapathError> {
        let id = cgroup_id(path)?;
        let membership = Membership { workload };
        self.tables.enroll(id, membership)?;
        tie_processes(path);
        let error = |source| DatapathError::Cgroup { path: path.to_owned(), source };
        for entry in fs::read_dir(path).map_err(error)? {
            let entry = entry.map_err(error)?;
            if entry.file_type().map_err(error)?.is_dir() {
                match self.join(&entry.path(), workload) {
                    Ok(()) => {}
                    // It went while we looked, and the kernel forgot it by itself.
                    Err(DatapathError::Cgroup { source, .. })
                        if source.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Puts hooks on a cgroup of the host into which the host moved a task that keeps its tag.
    ///
    /// # Errors
    ///
    /// When a hook can not be attached.
    pub fn follow(&mut self, path: &Path) -> Result<(), DatapathError> {
        let cgroup = cgroup_id(path)?.0;
        if self.workload_of(CgroupId(cgroup)).is_some() {
            return Ok(());
        }
        self.attach(path, Attachment { cgroup, workload: WorkloadId::NONE, reserved: 0 })?;
        // Until then the LSM layer, where there is one, judges all that comes from there.
        self.tables.followed.insert(CgroupId(cgroup), 0, 0).map_err(refused("FOLLOWED"))
    }

    /// Whether a cgroup of the host has hooks for what was moved there.
    #[must_use]
    pub fn follows(&self, cgroup: CgroupId) -> bool {
        self.tables.followed.get(&cgroup, 0).is_ok()
    }

    /// Processes that the host moved out of their workload's cgroup, and where to: by the machine's
    /// process ids, which are others where the daemon has a PID namespace that is not the first.
    #[must_use]
    pub fn moved(&self) -> Vec<(u32, Moved)> {
        self.tables.moved.iter().filter_map(Result::ok).collect()
    }

    /// Keeps places free for cgroups that are brought, as far as there is room. To be called now and
    /// then: what makes room says nothing.
    ///
    /// # Errors
    ///
    /// When the table takes no row for another reason.
    pub fn keep_reserve(&mut self) -> Result<(), DatapathError> {
        let Tables { cgroups, reserve: kept, reserved, capacities, .. } = &mut self.tables;
        if kept.len() >= *reserved as usize {
            return Ok(());
        }
        let mut taken = Vec::new();
        for place in reserve().take(*reserved as usize).filter(|place| !kept.contains(place)) {
            match cgroups.insert(place, Membership::default(), 0) {
                Ok(()) => {}
                Err(error) if is_full(&error) => break,
                Err(error) => return Err(capacities.row(Table::Cgroups)(error)),
            }
            taken.push(place);
        }
        kept.extend(taken);
        Ok(())
    }

    /// Ends the hold on a cgroup: its processes and those below are nobody's from now on.
    ///
    /// # Errors
    ///
    /// When a pin can not be removed.
    pub fn release(&mut self, cgroup: CgroupId, workload: WorkloadId) -> Result<(), DatapathError> {
        let members: Vec<CgroupId> = self
            .cgroups()
            .into_iter()
            .filter(|(_, owner)| *owner == workload)
            .map(|(cgroup, _)| cgroup)
            .collect();
        for member in members {
            absent_is_fine(self.tables.cgroups.remove(&member))
                .map_err(self.tables.capacities.row(Table::Cgroups))?;
        }
        for (pid, moved) in self.moved() {
            if moved.workload == workload {
                absent_is_fine(self.tables.moved.remove(&pid))
                    .map_err(self.tables.capacities.row(Table::Moved))?;
            }
        }
        for program in &self.programs {
            // The kernel detaches a moment after the pin is gone; until then the hook is nobody's.
            let key = CgroupStorageKey::new(cgroup.0, program.kind.attach_type());
            let nobody = Attachment { cgroup: cgroup.0, ..Attachment::default() };
            absent_is_fine(self.tables.attachments.insert(key, nobody, 0))
                .map_err(refused("ATTACHMENTS"))?;
            let path = self.link(cgroup, program.name);
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(DatapathError::Unpin { path, source }),
            }
        }
        Ok(())
    }

    /// Removes the pins of hooks whose cgroup is gone, which the kernel has detached already, or needs none any
    /// more. What comes to the cgroup from then on is judged as where there never were any.
    ///
    /// # Errors
    ///
    /// When a pin can not be removed.
    pub fn prune(
        &mut self,
        alive: impl Fn(&Self, CgroupId) -> bool,
    ) -> Result<usize, DatapathError> {
        let directory = self.pins.links();
        let error = |source| DatapathError::Unpin { path: directory.clone(), source };
        let mut pruned = 0;
        for entry in fs::read_dir(&directory).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = entry.file_name();
            let cgroup = name.to_str().and_then(|name| name.split_once('-')?.0.parse().ok());
            let Some(cgroup) = cgroup.map(CgroupId).filter(|cgroup| !alive(self, *cgroup)) else {
                continue;
            };
            absent_is_fine(self.tables.followed.remove(&cgroup)).map_err(refused("FOLLOWED"))?;
            fs::remove_file(entry.path()).map_err(error)?;
            pruned += 1;
        }
        Ok(pruned)
    }

    fn link(&self, cgroup: CgroupId, program: &str) -> PathBuf {
        self.pins.cgroup_link(cgroup.0, program)
    }

    /// Attaches every hook, also the others where one can not be. One that this kernel does not let the
    /// daemon attach anywhere is no error here: its door is not active.
    fn attach(&mut self, path: &Path, attachment: Attachment) -> Result<(), DatapathError> {
        let cgroup = CgroupId(attachment.cgroup);
        let directory = File::open(path)
            .map_err(|source| DatapathError::Cgroup { path: path.to_owned(), source })?;
        let mut first_error = None;
        for program in &mut self.programs {
            let pin = self.pins.cgroup_link(cgroup.0, program.name);
            let attached = match (pin.exists(), program.may_attach) {
                (true, _) => Ok(()),
                (false, true) => program.kind.attach(&directory, &pin),
                (false, false) => continue,
            };
            let key = CgroupStorageKey::new(cgroup.0, program.kind.attach_type());
            let attachments = &mut self.tables.attachments;
            let told = attached.and_then(|()| {
                attachments.insert(key, attachment, 0).map_err(|error| error.to_string())
            });
            if let Err(reason) = told {
                let (program, path) = (program.name, path.to_owned());
                first_error.get_or_insert(DatapathError::Attach { program, path, reason });
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// A row of counters, summed over all CPUs.
    ///
    /// The kernel copies the rows of other CPUs word by word while these count
    /// (`bpf_percpu_array_copy` in its `kernel/bpf/arraymap.c`), which is why each verdict is counted
    /// in one word alone.
    ///
    /// # Errors
    ///
    /// When the kernel does not hand it out.
    pub fn counters(&self, row_number: u16) -> Result<Counters, DatapathError> {
        let values = self.tables.counters.get(&u32::from(row_number), 0);
        let mut sum = Counters::ZERO;
        for counters in values.map_err(refused("COUNTERS"))?.iter() {
            sum.add(counters);
        }
        Ok(sum)
    }

    /// How many rows of counters there are.
    #[must_use]
    pub fn counter_rows(&self) -> u16 {
        u16::try_from(self.tables.counters.len()).unwrap_or(u16::MAX)
    }

    /// The tables that are not of the size asked for, since an earlier start made them and they are
    /// kept: each with the key that asks, what it has and what was asked.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub fn kept_sizes(
        &self,
        sizes: &Sizes,
    ) -> Result<Vec<(&'static str, u32, u32)>, DatapathError> {
        let asked = [
            ("datapath.maps.cgroups, datapath.maps.workloads", "CGROUPS", sizes.cgroup_rows()),
            ("datapath.maps.tasks", "TASKS", sizes.tasks),
            ("datapath.maps.tasks", "MOVED", sizes.tasks),
            ("metrics.max_identities", "COUNTERS", sizes.counters),
            ("datapath.denied_ring_bytes", "DENIED", sizes.denied_ring),
            ("datapath.events_ring_bytes", "ALLOWED", sizes.allowed_ring),
        ];
        let mut kept = Vec::new();
        for (key, table, asked) in asked {
            let has = MapData::from_pin(self.pins.map(table))
                .and_then(|map| map.info())
                .map_err(refused(table))?
                .max_entries();
            if has != asked {
                kept.push((key, has, asked));
            }
        }
        Ok(kept)
    }

    /// How full the tables are that can fill up.
    #[must_use]
    pub fn fill(&self) -> Vec<Fill> {
        let Tables { capacities, .. } = &self.tables;
        let tables = &self.tables;
        let mut fill = self.kernels_fill().map(|(_, fill)| fill).to_vec();
        fill.extend([
            capacities.fill(Table::Workloads, tables.workloads.keys().count()),
            capacities.fill(Table::Destinations, tables.destinations.keys().count()),
            capacities.fill(Table::Rules, tables.rules.keys().count()),
            capacities.fill(Table::Executables, tables.executables.keys().count()),
            capacities.fill(Table::UnixSockets, tables.unix_sockets.keys().count()),
            capacities.fill(Table::UnixNames, tables.unix_names.keys().count()),
            capacities.fill(Table::Runtimes, tables.runtimes.keys().count()),
        ]);
        fill
    }

    /// How full the tables are that the kernel half fills by itself.
    fn kernels_fill(&self) -> [(Table, Fill); 3] {
        let tables = &self.tables;
        let mut cgroups = tables.capacities.fill(Table::Cgroups, tables.cgroups.keys().count());
        // Places that are kept free are neither rows nor room for what workloads make.
        cgroups.entries = cgroups.entries.saturating_sub(tables.reserve.len());
        cgroups.capacity = cgroups.capacity.saturating_sub(tables.reserve.len());
        [
            (Table::Cgroups, cgroups),
            (Table::Tasks, tables.capacities.fill(Table::Tasks, tables.tasks.keys().count())),
            (Table::Moved, tables.capacities.fill(Table::Moved, tables.moved.keys().count())),
        ]
    }

    /// What the kernel half finds no room for at this moment, one sentence for each table. What user
    /// space writes is told of where it is not taken.
    #[must_use]
    pub fn full_tables(&self) -> Vec<String> {
        let full =
            self.kernels_fill().into_iter().filter(|(_, fill)| fill.entries >= fill.capacity);
        full.map(|(table, fill)| says_full(table, &fill)).collect()
    }

    /// What each door comes to for a workload: a hook that this kernel gives may be missing from the
    /// workload's cgroup, and what goes by the cgroup does not know one that has no row.
    #[must_use]
    pub fn states_of(&self, cgroup: CgroupId, workload: WorkloadId) -> Vec<(Door, DoorState)> {
        let is_member = self.workload_of(cgroup) == Some(workload);
        let of_workload = |(door, state): &(Door, DoorState)| {
            let missing = match (state, door.gate_program()) {
                (DoorState::Unavailable(_), _) => None,
                (DoorState::Active, Some(_)) => (!is_member)
                    .then_some("the kernel's table CGROUPS has no row for the workload's cgroup"),
                (DoorState::Active, None) => (!self.link(cgroup, door.program).exists())
                    .then_some("it is not attached to the workload's cgroup; restart the daemon"),
            };
            let state =
                missing.map_or_else(|| state.clone(), |why| DoorState::Unavailable(why.to_owned()));
            (*door, state)
        };
        self.states().iter().map(of_workload).collect()
    }
}

fn absent_is_fine(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        // What removing a row that is not there comes to in most kinds of tables.
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        other => other,
    }
}

/// The number of a cgroup is the inode of its directory.
///
/// # Errors
///
/// When there is no such directory.
pub fn cgroup_id(path: &Path) -> Result<CgroupId, DatapathError> {
    let metadata = fs::metadata(path)
        .map_err(|source| DatapathError::Cgroup { path: path.to_owned(), source })?;
    Ok(CgroupId(metadata.ino()))
}

/// Ties the processes that are in a cgroup already to its workload: they are moved to where they
/// are, and the kernel half takes that for their arrival.
fn tie_processes(path: &Path) {
    let procs = path.join("cgroup.procs");
    let Ok(pids) = fs::read_to_string(&procs) else { return };
    for pid in pids.lines() {
        if let Err(error) = fs::write(&procs, pid) {
            // It ended meanwhile, or it is a thread of a threaded cgroup: the cgroup's own tag
            // holds it.
            tracing::debug!(pid, %error, path = %path.display(), "a process was not tied");
        }
    }
}
