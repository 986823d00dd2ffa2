//! What each table has room for, and what is said where one is full.
//!
//! The sizes are the kernel's own: a table that an earlier start made is kept with the size it has,
//! whatever the configuration says now. Knows no rows. Read once when the tables are opened, and
//! only read from then on.

use aya::maps::{MapData, MapError};
use nix::errno::Errno;

use super::load::LoadError;
use super::pins::Pins;
use super::tables::DatapathError;

/// A table that takes no more rows than it was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Workloads,
    Cgroups,
    Tasks,
    Moved,
    Destinations,
    Rules,
    Executables,
    UnixSockets,
    UnixNames,
    Runtimes,
}

impl Table {
    const ALL: [Self; 10] = [
        Self::Workloads,
        Self::Cgroups,
        Self::Tasks,
        Self::Moved,
        Self::Destinations,
        Self::Rules,
        Self::Executables,
        Self::UnixSockets,
        Self::UnixNames,
        Self::Runtimes,
    ];

    /// As the object names it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Workloads => "WORKLOADS",
            Self::Cgroups => "CGROUPS",
            Self::Tasks => "TASKS",
            Self::Moved => "MOVED",
            Self::Destinations => "DESTINATIONS",
            Self::Rules => "RULES",
            Self::Executables => "EXECUTABLES",
            Self::UnixSockets => "UNIX_SOCKETS",
            Self::UnixNames => "UNIX_NAMES",
            Self::Runtimes => "RUNTIMES",
        }
    }

    /// As metrics name it.
    const fn label(self) -> &'static str {
        match self {
            Self::Workloads => "workloads",
            Self::Cgroups => "cgroups",
            Self::Tasks => "tasks",
            Self::Moved => "moved",
            Self::Destinations => "destinations",
            Self::Rules => "rules",
            Self::Executables => "executables",
            Self::UnixSockets => "unix_sockets",
            Self::UnixNames => "unix_names",
            Self::Runtimes => "runtimes",
        }
    }

    /// What makes room.
    const fn remedy(self) -> &'static str {
        match self {
            Self::Workloads => "make datapath.maps.workloads larger and restart the daemon",
            Self::Cgroups => {
                "make datapath.maps.cgroups larger, which takes effect after agentguard uninstall"
            }
            Self::Tasks | Self::Moved => {
                "make datapath.maps.tasks larger, which takes effect after agentguard uninstall"
            }
            Self::Destinations => "make datapath.maps.destinations larger and restart the daemon",
            Self::Rules => "make datapath.maps.rules larger and restart the daemon",
            Self::Executables => "make datapath.maps.executables larger and restart the daemon",
            Self::UnixSockets => "make datapath.maps.unix_sockets larger and restart the daemon",
            Self::UnixNames => "make datapath.maps.unix_names larger and restart the daemon",
            Self::Runtimes => "name fewer programs in containers.runtime_programs",
        }
    }
}

/// How full a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// As metrics name it.
    pub table: &'static str,
    pub entries: usize,
    pub capacity: usize,
}

/// What the tables have room for, in the order of [`Table::ALL`].
pub(super) struct Capacities([u32; Table::ALL.len()]);

impl Capacities {
    /// Asks the kernel.
    pub(super) fn read(pins: &Pins) -> Result<Self, LoadError> {
        let mut capacities = [0; Table::ALL.len()];
        for table in Table::ALL {
            let info = MapData::from_pin(pins.map(table.name())).and_then(|map| map.info());
            let info = info.map_err(|error| LoadError::part(table.name(), error))?;
            capacities[table as usize] = info.max_entries();
        }
        Ok(Self(capacities))
    }

    /// How many rows a table has room for.
    pub(super) const fn of(&self, table: Table) -> u32 {
        self.0[table as usize]
    }

    /// What a table's refusal of a row is told as.
    pub(super) fn row(&self, table: Table) -> impl Fn(MapError) -> DatapathError + 'static {
        let capacity = self.of(table);
        move |source| {
            if is_full(&source) {
                let remedy = table.remedy();
                DatapathError::Full { table: table.name(), capacity, remedy }
            } else {
                refused(table.name())(source)
            }
        }
    }

    /// How full a table is that has so many rows.
    pub(super) const fn fill(&self, table: Table, entries: usize) -> Fill {
        Fill { table: table.label(), entries, capacity: self.of(table) as usize }
    }
}

/// What is said of a table that the kernel half fills and that takes no more rows.
pub(super) fn says_full(table: Table, fill: &Fill) -> String {
    format!(
        "the kernel's table {} is full: it has room for {} rows, and what finds none is denied; {}",
        table.name(),
        fill.capacity,
        table.remedy()
    )
}

/// What the refusal of a row is told as by a table that has room for all there can be.
pub(super) fn refused(table: &'static str) -> impl Fn(MapError) -> DatapathError {
    move |source| DatapathError::Table { table, source }
}

/// Whether a table did not take a row for want of room: a hash and a trie say so in their own ways
/// (`htab_map_update_elem`, `trie_update_elem` of the kernel).
pub(super) fn is_full(error: &MapError) -> bool {
    let MapError::SyscallError(error) = error else { return false };
    let number = error.io_error.raw_os_error();
    [Errno::E2BIG, Errno::ENOSPC].map(|full| Some(full as i32)).contains(&number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_table_stands_where_its_capacity_is_read() {
        for (place, table) in Table::ALL.into_iter().enumerate() {
            assert_eq!(table as usize, place, "{}", table.name());
        }
    }

    #[test]
    fn a_full_table_is_told_by_name_size_and_remedy() {
        let capacities = Capacities([16; Table::ALL.len()]);
        let refused = |errno: Errno| {
            let io_error = std::io::Error::from_raw_os_error(errno as i32);
            MapError::SyscallError(aya::sys::SyscallError { call: "bpf_map_update_elem", io_error })
        };
        for full in [Errno::E2BIG, Errno::ENOSPC] {
            let told = capacities.row(Table::Rules)(refused(full)).to_string();
            for part in ["table RULES is full", "16 rows", "datapath.maps.rules larger"] {
                assert!(told.contains(part), "{part}: {told}");
            }
        }
        let told = capacities.row(Table::Rules)(refused(Errno::ENOMEM)).to_string();
        assert!(told.contains("did not take a row") && !told.contains("larger"), "{told}");
    }
}
