//! What each table has room for, and what is said where one is full.
//!
//! The sizes are the kernel's own: a table that an earlier start made is kept with the size it has,
//! whatever the configuration says now. Knows no rows. Read once when the tables are opened, and
//! only read from then on.

use std::collections::BTreeMap;

use aya::maps::{MapData, MapError};
use nix::errno::Errno;

use super::load::LoadError;
use super::pins::Pins;
use super::tables::DatapathError;

/// A table that takes no more rows than it was made for.
struct Bounded {
    table: &'static str,
    /// As metrics name it.
    name: &'static str,
    /// What makes room.
    remedy: &'static str,
}

const BOUNDED: [Bounded; 10] = [
    Bounded {
        table: "WORKLOADS",
        name: "workloads",
        remedy: "make datapath.maps.workloads larger and restart the daemon",
    },
    Bounded {
        table: "CGROUPS",
        name: "cgroups",
        remedy: "make datapath.maps.cgroups larger, which takes effect after agentguard uninstall",
    },
    Bounded {
        table: "TASKS",
        name: "tasks",
        remedy: "make datapath.maps.tasks larger, which takes effect after agentguard uninstall",
    },
    Bounded {
        table: "MOVED",
        name: "moved",
        remedy: "make datapath.maps.tasks larger, which takes effect after agentguard uninstall",
    },
    Bounded {
        table: "DESTINATIONS",
        name: "destinations",
        remedy: "make datapath.maps.destinations larger and restart the daemon",
    },
    Bounded {
        table: "RULES",
        name: "rules",
        remedy: "make datapath.maps.rules larger and restart the daemon",
    },
    Bounded {
        table: "EXECUTABLES",
        name: "executables",
        remedy: "make datapath.maps.executables larger and restart the daemon",
    },
    Bounded {
        table: "UNIX_SOCKETS",
        name: "unix_sockets",
        remedy: "make datapath.maps.unix_sockets larger and restart the daemon",
    },
    Bounded {
        table: "UNIX_NAMES",
        name: "unix_names",
        remedy: "make datapath.maps.unix_names larger and restart the daemon",
    },
    Bounded {
        table: "RUNTIMES",
        name: "runtimes",
        remedy: "name fewer programs in containers.runtime_programs",
    },
];

/// How full a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// As metrics name it.
    pub table: &'static str,
    pub entries: usize,
    pub capacity: usize,
}

/// What the tables have room for.
pub(super) struct Capacities(BTreeMap<&'static str, u32>);

impl Capacities {
    /// Asks the kernel.
    pub(super) fn read(pins: &Pins) -> Result<Self, LoadError> {
        let of = |bounded: &Bounded| {
            let info = MapData::from_pin(pins.map(bounded.table)).and_then(|map| map.info());
            let info = info.map_err(|error| LoadError::part(bounded.table, error))?;
            Ok((bounded.table, info.max_entries()))
        };
        BOUNDED.iter().map(of).collect::<Result<_, _>>().map(Self)
    }

    /// How many rows a table has room for.
    pub(super) fn of(&self, table: &str) -> u32 {
        self.0.get(table).copied().unwrap_or_default()
    }

    /// What a table's refusal of a row is told as.
    pub(super) fn row(&self, table: &'static str) -> impl Fn(MapError) -> DatapathError + '_ {
        move |source| match BOUNDED.iter().find(|bounded| bounded.table == table) {
            Some(Bounded { remedy, .. }) if is_full(&source) => {
                DatapathError::Full { table, capacity: self.of(table), remedy }
            }
            Some(_) | None => DatapathError::Table { table, source },
        }
    }

    /// How full a table is that has so many rows.
    pub(super) fn fill(&self, table: &str, entries: usize) -> Fill {
        let name = BOUNDED.iter().find(|bounded| bounded.table == table).map(|of| of.name);
        Fill { table: name.unwrap_or_default(), entries, capacity: self.of(table) as usize }
    }

    /// What is said of a table that the kernel half fills and that takes no more rows.
    pub(super) fn says_full(&self, table: &str, fill: &Fill) -> String {
        let remedy = BOUNDED.iter().find(|bounded| bounded.table == table).map(|of| of.remedy);
        format!(
            "the kernel's table {table} is full: it has room for {} rows, and what finds none is \
             denied; {}",
            fill.capacity,
            remedy.unwrap_or_default()
        )
    }
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
    fn a_full_table_is_told_by_name_size_and_remedy() {
        let capacities = Capacities(BTreeMap::from([("RULES", 16)]));
        let refused = |errno: Errno| {
            let io_error = std::io::Error::from_raw_os_error(errno as i32);
            MapError::SyscallError(aya::sys::SyscallError { call: "bpf_map_update_elem", io_error })
        };
        for full in [Errno::E2BIG, Errno::ENOSPC] {
            let told = capacities.row("RULES")(refused(full)).to_string();
            for part in ["table RULES is full", "16 rows", "datapath.maps.rules larger"] {
                assert!(told.contains(part), "{part}: {told}");
            }
        }
        let told = capacities.row("RULES")(refused(Errno::ENOMEM)).to_string();
        assert!(told.contains("did not take a row") && !told.contains("larger"), "{told}");
    }
}
