//! The compiled tables in ordinary collections, with the kernel's meaning of a look-up.
//!
//! `explain` decides over them in the daemon, and the fake datapath in its place of the kernel.
//! They hold numbers only and know nothing of who is tagged with what.

use std::collections::{BTreeMap, BTreeSet};

use agentguard_common::{
    Address, AllowlistId, FileId, Permission, RuleSetId, Tables, UnixSocket,
    allowlist::{
        DestinationEntry, DestinationKey, ExecutableEntry, ExecutableKey, RuleRow, UnixSocketKey,
    },
};

use super::{compile::Rows, prefix::Prefix};

/// Every allow-list that is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableSet {
    allowlists: BTreeMap<AllowlistId, Loaded>,
    rules: BTreeMap<RuleSetId, RuleRow>,
    executables: BTreeMap<ExecutableKey, ExecutableEntry>,
    unix_sockets: BTreeMap<UnixSocketKey, Permission>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Loaded {
    /// By the length of their prefix, so that the longest is looked for first.
    destinations: BTreeMap<u8, BTreeMap<Prefix, DestinationEntry>>,
    /// What goes when the allow-list goes.
    rules: BTreeSet<RuleSetId>,
    executables: BTreeSet<ExecutableKey>,
    unix_sockets: BTreeSet<UnixSocketKey>,
}

/// Why rows were not loaded; nothing of them was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    #[error("allow-list number {} is loaded already; give every generation a number of its own", .0.0)]
    AllowlistInUse(AllowlistId),
    #[error("rule row {} is in use; number the rows from one that is free", .0.0)]
    RuleRowInUse(RuleSetId),
    #[error(
        "a destination of allow-list number {} has a key of {bits} bits; load rows as they were compiled",
        .id.0
    )]
    KeyLength { id: AllowlistId, bits: u32 },
}

impl TableSet {
    /// Loads one allow-list beside those that are there.
    ///
    /// # Errors
    ///
    /// A number that is in use, or a key that can not be one.
    pub fn load(&mut self, rows: Rows) -> Result<(), LoadError> {
        let Rows { allowlist, destinations, rules, executables, unix_sockets, listening: _ } = rows;
        if self.allowlists.contains_key(&allowlist) {
            return Err(LoadError::AllowlistInUse(allowlist));
        }
        if let Some((id, _)) = rules.iter().find(|(id, _)| self.rules.contains_key(id)) {
            return Err(LoadError::RuleRowInUse(*id));
        }
        let mut loaded = Loaded::default();
        for (bits, key, entry) in destinations {
            let length = bits
                .checked_sub(DestinationKey::ALLOWLIST_BITS)
                .and_then(|length| u8::try_from(length).ok())
                .filter(|length| *length <= 128)
                .ok_or(LoadError::KeyLength { id: allowlist, bits })?;
            let prefix = Prefix::truncated(&key.address, length);
            loaded.destinations.entry(length).or_default().insert(prefix, entry);
        }
        loaded.rules.extend(rules.iter().map(|(id, _)| *id));
        loaded.executables.extend(executables.iter().map(|(key, _)| *key));
        loaded.unix_sockets.extend(unix_sockets.iter().map(|(key, _)| *key));
        self.allowlists.insert(allowlist, loaded);
        self.rules.extend(rules);
        self.executables.extend(executables);
        self.unix_sockets.extend(unix_sockets);
        Ok(())
    }

    /// Removes an allow-list with all that came with it; whether it was there.
    pub fn remove(&mut self, allowlist: AllowlistId) -> bool {
        let Some(loaded) = self.allowlists.remove(&allowlist) else { return false };
        for row in &loaded.rules {
            self.rules.remove(row);
        }
        for key in &loaded.executables {
            self.executables.remove(key);
        }
        for key in &loaded.unix_sockets {
            self.unix_sockets.remove(key);
        }
        true
    }

    /// The numbers of the allow-lists that are loaded.
    pub fn allowlists(&self) -> impl Iterator<Item = AllowlistId> + '_ {
        self.allowlists.keys().copied()
    }

    /// How many rows of rules are loaded.
    #[must_use]
    pub fn rule_rows(&self) -> usize {
        self.rules.len()
    }
}

impl Tables for TableSet {
    fn destination(&self, allowlist: AllowlistId, address: &Address) -> Option<DestinationEntry> {
        self.allowlists
            .get(&allowlist)?
            .destinations
            .iter()
            .rev()
            .find_map(|(length, blocks)| blocks.get(&Prefix::truncated(address, *length)).copied())
    }

    fn rules(&self, id: RuleSetId) -> Option<&RuleRow> {
        self.rules.get(&id)
    }

    fn executable(&self, allowlist: AllowlistId, file: &FileId) -> Option<ExecutableEntry> {
        self.executables.get(&ExecutableKey::new(allowlist, file)).copied()
    }

    fn unix_socket(&self, allowlist: AllowlistId, socket: &UnixSocket) -> Option<Permission> {
        self.unix_sockets.get(&UnixSocketKey::new(allowlist, socket)).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use agentguard_common::UnixNameId;

    use super::*;

    fn rows(allowlist: u32, blocks: &[(&str, u32)], rules: &[u32]) -> Rows {
        let allowlist = AllowlistId(allowlist);
        Rows {
            allowlist,
            destinations: blocks
                .iter()
                .map(|(block, set)| {
                    let prefix = Prefix::canonical(&block.parse().unwrap()).next().unwrap();
                    let length = u32::from(prefix.length());
                    let key = DestinationKey { allowlist, address: prefix.network() };
                    let entry = DestinationEntry { rules: RuleSetId(*set), prefix: length };
                    (DestinationKey::ALLOWLIST_BITS + length, key, entry)
                })
                .collect(),
            rules: rules
                .iter()
                .map(|id| {
                    let rules = [agentguard_common::allowlist::Rule::NOTHING; 8];
                    (RuleSetId(*id), RuleRow { rules, next: RuleSetId::NONE, reserved: 0 })
                })
                .collect(),
            executables: vec![],
            unix_sockets: vec![],
            listening: RuleSetId::NONE,
        }
    }

    fn socket(name: u32) -> UnixSocket {
        UnixSocket { directory: 7, device: 8, name: UnixNameId(name) }
    }

    fn with_socket(mut rows: Rows, name: u32) -> Rows {
        let key = UnixSocketKey::new(rows.allowlist, &socket(name));
        rows.unix_sockets.push((key, Permission { expires_at: 9, ..Permission::NONE }));
        rows
    }

    fn found(tables: &TableSet, allowlist: u32, address: &str) -> Option<u32> {
        let address = Address::from(address.parse::<IpAddr>().unwrap());
        tables.destination(AllowlistId(allowlist), &address).map(|entry| entry.rules.0)
    }

    #[test]
    fn the_longest_prefix_of_the_asked_allow_list_is_found() {
        let mut tables = TableSet::default();
        let blocks = [("10.0.0.0/8", 1), ("10.1.0.0/16", 2), ("10.1.2.3/32", 3), ("::/0", 4)];
        tables.load(rows(1, &blocks, &[])).unwrap();
        tables.load(rows(2, &[("10.1.2.0/24", 5)], &[])).unwrap();
        assert_eq!(found(&tables, 1, "10.1.2.3"), Some(3));
        assert_eq!(found(&tables, 1, "10.1.2.4"), Some(2));
        assert_eq!(found(&tables, 1, "10.2.0.0"), Some(1));
        // As in the kernel: what an entry means is for compile and the decision to say.
        assert_eq!(found(&tables, 1, "11.0.0.0"), Some(4));
        assert_eq!(found(&tables, 2, "10.1.2.4"), Some(5));
        assert_eq!(found(&tables, 2, "10.1.3.4"), None);
        assert_eq!(found(&tables, 3, "10.1.2.3"), None);
    }

    #[test]
    fn numbers_in_use_are_refused_and_nothing_is_loaded() {
        let mut tables = TableSet::default();
        tables.load(rows(1, &[("10.0.0.0/8", 1)], &[1, 2])).unwrap();
        let before = tables.clone();
        let again = tables.load(rows(1, &[], &[]));
        assert_eq!(again, Err(LoadError::AllowlistInUse(AllowlistId(1))));
        let row = tables.load(rows(2, &[("10.0.0.0/8", 2)], &[2, 3]));
        assert_eq!(row, Err(LoadError::RuleRowInUse(RuleSetId(2))));
        assert_eq!(tables, before);
    }

    #[test]
    fn a_key_of_impossible_length_is_refused() {
        for bits in [31, 161, u32::MAX] {
            let mut broken = rows(1, &[("10.0.0.0/8", 1)], &[1]);
            broken.destinations[0].0 = bits;
            let mut tables = TableSet::default();
            let id = AllowlistId(1);
            assert_eq!(tables.load(broken), Err(LoadError::KeyLength { id, bits }));
            assert_eq!(tables, TableSet::default());
        }
    }

    #[test]
    fn an_allow_list_goes_with_everything_that_came_with_it() {
        let mut tables = TableSet::default();
        tables.load(with_socket(rows(1, &[("10.0.0.0/8", 1)], &[1, 2]), 1)).unwrap();
        let one = tables.clone();
        tables.load(with_socket(rows(2, &[("10.0.0.0/8", 3)], &[3]), 1)).unwrap();
        assert!(tables.unix_socket(AllowlistId(2), &socket(1)).is_some());
        assert_eq!(tables.unix_socket(AllowlistId(2), &socket(2)), None);
        assert_eq!(tables.unix_socket(AllowlistId(3), &socket(1)), None);
        assert!(tables.remove(AllowlistId(2)));
        assert!(!tables.remove(AllowlistId(2)));
        assert_eq!(tables, one);
        assert_eq!(tables.allowlists().collect::<Vec<_>>(), [AllowlistId(1)]);
        assert_eq!(tables.rule_rows(), 2);
    }
}
