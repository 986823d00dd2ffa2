//! Compiles permits into the tables the kernel decides over.
//!
//! Pure. Knows neither the numbers under which an allow-list is loaded nor the kernel; what a
//! permit means is [`super::specification`]'s to say, and the two are tested against each other.
//!
//! Longest-prefix match returns one entry, so every entry must hold all that its block and every
//! block around it permit there. Sorted, a block comes before everything in it: one walk along
//! the sorted blocks, with those around the current one on a stack, meets each block once.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, btree_map::Entry},
};

use agentguard_common::{
    AllowlistId, FileId, Permission, Protocol, RuleSetId, ScopeId, UnixSocket,
    allowlist::{
        DestinationEntry, DestinationKey, ExecutableEntry, ExecutableKey, MAX_RULES, NEVER,
        RULES_PER_ROW, Rule, RuleRow, UnixSocketKey,
    },
};

use super::{Permit, PortRange, precedence, prefix::Prefix, reserved::Reserved};

/// What an identity is permitted, compiled but not yet numbered.
///
/// Equal where the tables would be equal, in whatever order the permits came: whoever compiles
/// again sees by `==` whether anything is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompiledAllowlist {
    /// Sorted.
    destinations: Vec<(Prefix, Coverage)>,
    /// Each different, at most [`MAX_RULES`] long, in the order in which they answer.
    rule_sets: Vec<Vec<Rule>>,
    /// Sorted by device and inode, of which each has one.
    executables: Vec<(FileId, Permission)>,
    /// Sorted, each once.
    unix_sockets: Vec<(UnixSocket, Permission)>,
    listening: Option<SetIndex>,
}

/// What the longest prefix that contains an address has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coverage {
    /// Blocks cover the address; this set has the rules for its ports.
    Rules(SetIndex),
    /// Every block that covers the address excepts it.
    Excepted,
    /// No block covers the address: it is IPv4, and only blocks of IPv6 are around it.
    Uncovered,
}

/// The place of a set in [`CompiledAllowlist::rule_sets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetIndex(usize);

/// Why permits can not be compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    #[error(
        "{prefix} has more than {MAX_RULES} port rules, most of them from scope number {}; \
         join its port ranges, or grant fewer scopes for these addresses",
        .scope.0
    )]
    TooManyRules { prefix: Prefix, scope: ScopeId },
    #[error(
        "there are more than {MAX_RULES} port rules for listening, most of them from scope \
         number {}; join its port ranges, or grant fewer scopes that listen",
        .scope.0
    )]
    TooManyListeningRules { scope: ScopeId },
}

/// An allow-list under its numbers: what the tables are to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    pub allowlist: AllowlistId,
    /// The length of each key in bits, [`DestinationKey::ALLOWLIST_BITS`] included; the key; the
    /// entry.
    pub destinations: Vec<(u32, DestinationKey, DestinationEntry)>,
    /// Numbered consecutively.
    pub rules: Vec<(RuleSetId, RuleRow)>,
    pub executables: Vec<(ExecutableKey, ExecutableEntry)>,
    pub unix_sockets: Vec<(UnixSocketKey, Permission)>,
    /// What [`Tag::listening`](agentguard_common::Tag::listening) must be.
    pub listening: RuleSetId,
}

/// Why an allow-list can not have the numbers it was to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowsError {
    #[error("rule row 0 means none; number the rows from 1 or above")]
    NumberedFromNone,
    #[error(
        "{rows} rule rows do not fit behind row {}; number the rows from a lower one",
        .first.0
    )]
    Exhausted { first: RuleSetId, rows: usize },
}

/// Compiles what the permits of one identity permit together.
///
/// Leave out permits that are over: they take room, and only their reason for denial is lost.
///
/// # Errors
///
/// One destination, or listening, has more than [`MAX_RULES`] rules.
pub fn compile(permits: &[Permit]) -> Result<CompiledAllowlist, CompileError> {
    compile_within(permits, &Reserved::default())
}

/// [`compile`], where some addresses are reserved.
///
/// # Errors
///
/// As [`compile`].
pub fn compile_within(
    permits: &[Permit],
    reserved: &Reserved,
) -> Result<CompiledAllowlist, CompileError> {
    compile_counted(permits, reserved).map(|(compiled, _)| compiled)
}

impl CompiledAllowlist {
    /// The blocks with what they permit, sorted.
    #[must_use]
    pub fn destinations(&self) -> &[(Prefix, Coverage)] {
        &self.destinations
    }

    /// The rules of a set, in the order in which they answer. Empty for an index that is not of
    /// this allow-list.
    #[must_use]
    pub fn rules(&self, set: SetIndex) -> &[Rule] {
        self.rule_sets.get(set.0).map_or(&[], Vec::as_slice)
    }

    /// The sets of rules, each different.
    #[must_use]
    pub fn rule_sets(&self) -> &[Vec<Rule>] {
        &self.rule_sets
    }

    /// The files that may run, sorted by device and inode.
    #[must_use]
    pub fn executables(&self) -> &[(FileId, Permission)] {
        &self.executables
    }

    /// The unix sockets that may be connected and sent to, sorted.
    #[must_use]
    pub fn unix_sockets(&self) -> &[(UnixSocket, Permission)] {
        &self.unix_sockets
    }

    /// The rules for listening; `None` where nothing permits any.
    #[must_use]
    pub const fn listening(&self) -> Option<SetIndex> {
        self.listening
    }

    /// The next moment after `now` (nanoseconds of boot time) at which something that is permitted
    /// here ends. The tables need no change then; they only hold what is over from then on.
    #[must_use]
    pub fn next_expiry(&self, now: u64) -> Option<u64> {
        self.permissions()
            .map(|permission| permission.expires_at)
            .filter(|expires_at| *expires_at > now && *expires_at != NEVER)
            .min()
    }

    /// Every permission there is here, some of them more than once.
    pub fn permissions(&self) -> impl Iterator<Item = Permission> {
        let rules = self.rule_sets.iter().flatten().map(|rule| rule.permission);
        let executables = self.executables.iter().map(|(_, permission)| *permission);
        let unix_sockets = self.unix_sockets.iter().map(|(_, permission)| *permission);
        rules.chain(executables).chain(unix_sockets)
    }

    /// How many rule rows [`Self::rows`] numbers.
    #[must_use]
    pub fn rule_row_count(&self) -> usize {
        self.rule_sets.iter().map(|set| row_count(set)).sum()
    }

    /// What the tables are to hold for allow-list number `id`, with rule rows from `first` on.
    ///
    /// # Errors
    ///
    /// `first` is [`RuleSetId::NONE`], or too high for all rows to have a number.
    pub fn rows(&self, id: AllowlistId, first: RuleSetId) -> Result<Rows, RowsError> {
        let (starts, rules) = self.number_rules(first)?;
        let destinations = self
            .destinations
            .iter()
            .map(|(prefix, coverage)| {
                let length = u32::from(prefix.length());
                let entry = match coverage {
                    Coverage::Rules(set) => {
                        DestinationEntry { rules: starts[set.0], prefix: length }
                    }
                    Coverage::Excepted => {
                        DestinationEntry { rules: RuleSetId::NONE, prefix: length }
                    }
                    Coverage::Uncovered => DestinationEntry::UNCOVERED,
                };
                let key = DestinationKey { allowlist: id, address: prefix.network() };
                (DestinationKey::ALLOWLIST_BITS + length, key, entry)
            })
            .collect();
        let executables = self
            .executables
            .iter()
            .map(|(file, permission)| {
                let entry = ExecutableEntry {
                    permission: *permission,
                    generation: file.generation,
                    reserved: 0,
                };
                (ExecutableKey::new(id, file), entry)
            })
            .collect();
        let unix_sockets = self
            .unix_sockets
            .iter()
            .map(|(socket, permission)| (UnixSocketKey::new(id, socket), *permission))
            .collect();
        let listening = self.listening.map_or(RuleSetId::NONE, |set| starts[set.0]);
        Ok(Rows { allowlist: id, destinations, rules, executables, unix_sockets, listening })
    }

    /// The first row of every set, and all rows.
    #[expect(clippy::type_complexity, reason = "two lists that only the one caller takes apart")]
    fn number_rules(
        &self,
        first: RuleSetId,
    ) -> Result<(Vec<RuleSetId>, Vec<(RuleSetId, RuleRow)>), RowsError> {
        let count = self.rule_row_count();
        if count > 0 && !first.is_some() {
            return Err(RowsError::NumberedFromNone);
        }
        let exhausted = RowsError::Exhausted { first, rows: count };
        let end = u32::try_from(count).ok().and_then(|count| first.0.checked_add(count));
        let mut numbers = (first.0..end.ok_or(exhausted)?).map(RuleSetId);
        let mut starts = Vec::with_capacity(self.rule_sets.len());
        let mut rows: Vec<(RuleSetId, RuleRow)> = Vec::with_capacity(count);
        for set in &self.rule_sets {
            let start = rows.len();
            for (number, index) in numbers.by_ref().take(row_count(set)).zip(0..) {
                let mut rules = [Rule::NOTHING; RULES_PER_ROW];
                let held = set.iter().skip(index * RULES_PER_ROW);
                rules.iter_mut().zip(held).for_each(|(slot, rule)| *slot = *rule);
                rows.push((number, RuleRow { rules, next: RuleSetId::NONE, reserved: 0 }));
            }
            for row in (start + 1..rows.len()).rev() {
                rows[row - 1].1.next = rows[row].0;
            }
            starts.push(rows[start].0);
        }
        Ok((starts, rows))
    }
}

/// Rows of a set; one even for a set without rules, which is not the same as no set.
fn row_count(set: &[Rule]) -> usize {
    set.len().div_ceil(RULES_PER_ROW).max(1)
}

/// [`compile`], with the number of steps it took.
fn compile_counted(
    permits: &[Permit],
    reserved: &Reserved,
) -> Result<(CompiledAllowlist, usize), CompileError> {
    let mut sets = RuleSets::default();
    let mut blocks = Blocks::default();
    for permit in permits {
        blocks.add(permit, reserved, &mut sets);
    }
    let Blocks { pieces, v4, v6 } = blocks;
    let mut walk = Walk::new(&pieces, &mut sets);
    let mut destinations = walk.along(v6)?;
    let ipv4 = walk.along(v4)?;
    let steps = walk.steps;
    // A block of IPv6 never covers IPv4, but its prefix may contain it.
    let contained = destinations.iter().any(|(prefix, _)| prefix.contains(Prefix::IPV4));
    if contained && ipv4.first().is_none_or(|(prefix, _)| *prefix != Prefix::IPV4) {
        destinations.push((Prefix::IPV4, Coverage::Uncovered));
    }
    destinations.extend(ipv4);
    destinations.sort_unstable_by_key(|(prefix, _)| *prefix);

    let listening = compile_listening(permits, &mut sets)?;
    let executables = compile_executables(permits);
    let unix_sockets = compile_unix_sockets(permits);
    let rule_sets = sets.list;
    let compiled =
        CompiledAllowlist { destinations, rule_sets, executables, unix_sockets, listening };
    Ok((compiled, steps))
}

fn compile_listening(
    permits: &[Permit],
    sets: &mut RuleSets,
) -> Result<Option<SetIndex>, CompileError> {
    if permits.iter().all(|permit| permit.listening.is_empty()) {
        return Ok(None);
    }
    let rules = permits.iter().flat_map(|permit| rules_of(permit, &permit.listening)).collect();
    sets.set(rules).map(Some).map_err(|scope| CompileError::TooManyListeningRules { scope })
}

fn compile_executables(permits: &[Permit]) -> Vec<(FileId, Permission)> {
    let order =
        |file: &FileId, permission: &Permission| (precedence(permission), Reverse(file.generation));
    let mut executables: BTreeMap<(u32, u64), (FileId, Permission)> = BTreeMap::new();
    for permit in permits {
        let permission = permit.permission();
        for file in &permit.executables {
            match executables.entry((file.device, file.inode)) {
                Entry::Vacant(entry) => {
                    entry.insert((*file, permission));
                }
                Entry::Occupied(mut entry) => {
                    let (held, by) = entry.get();
                    if order(file, &permission) < order(held, by) {
                        entry.insert((*file, permission));
                    }
                }
            }
        }
    }
    executables.into_values().collect()
}

fn compile_unix_sockets(permits: &[Permit]) -> Vec<(UnixSocket, Permission)> {
    let mut sockets: BTreeMap<UnixSocket, Permission> = BTreeMap::new();
    for permit in permits {
        let permission = permit.permission();
        for socket in permit.unix_sockets.iter().filter(|socket| socket.name.is_some()) {
            let held = sockets.entry(*socket).or_insert(permission);
            if precedence(&permission) < precedence(held) {
                *held = permission;
            }
        }
    }
    sockets.into_iter().collect()
}

/// The blocks of all permits in canonical form.
#[derive(Default)]
struct Blocks {
    /// The source of each.
    pieces: Vec<SourceIndex>,
    v4: Vec<(Prefix, Edge)>,
    v6: Vec<(Prefix, Edge)>,
}

/// The place of a canonical block in [`Blocks::pieces`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct PieceIndex(usize);

/// What happens at a prefix. In this order at the same prefix, so that a block knows on entering
/// whether it is excepted as a whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Edge {
    /// An exception of the block begins.
    Except(PieceIndex),
    /// The block begins.
    Block(PieceIndex),
}

impl Blocks {
    fn add(&mut self, permit: &Permit, reserved: &Reserved, sets: &mut RuleSets) {
        for egress in &permit.egress {
            let source = sets.source(rules_of(permit, &egress.ports).collect());
            for block in &egress.blocks {
                for prefix in Prefix::canonical(&block.cidr) {
                    let piece = PieceIndex(self.pieces.len());
                    self.pieces.push(source);
                    let edges = if prefix.is_v4() { &mut self.v4 } else { &mut self.v6 };
                    edges.push((prefix, Edge::Block(piece)));
                    // Whoever names exactly one address means it.
                    let reserved: &[Prefix] =
                        if prefix.is_host() { &[] } else { reserved.around_or_in(prefix) };
                    let excepts = block.except.iter().flat_map(Prefix::canonical);
                    // An exception says something only inside its own block.
                    for except in excepts.chain(reserved.iter().copied()) {
                        if except.is_v4() != prefix.is_v4() {
                            continue;
                        }
                        if prefix.contains(except) {
                            edges.push((except, Edge::Except(piece)));
                        } else if except.contains(prefix) {
                            edges.push((prefix, Edge::Except(piece)));
                        }
                    }
                }
            }
        }
    }
}

/// The walk along the sorted blocks of one family of addresses.
struct Walk<'a> {
    pieces: &'a [SourceIndex],
    sets: &'a mut RuleSets,
    /// By piece: how many of its exceptions contain the current prefix.
    excepted: Vec<u32>,
    /// By piece: whether the block contains the current prefix.
    entered: Vec<bool>,
    /// How many blocks of each source contain the current prefix and do not except it.
    active: BTreeMap<SourceIndex, u32>,
    /// What the growth with the input is measured by.
    steps: usize,
}

/// A prefix that contains the current one.
struct Surrounding {
    prefix: Prefix,
    edges: std::ops::Range<usize>,
    coverage: Coverage,
}

impl<'a> Walk<'a> {
    fn new(pieces: &'a [SourceIndex], sets: &'a mut RuleSets) -> Self {
        Self {
            pieces,
            sets,
            excepted: vec![0; pieces.len()],
            entered: vec![false; pieces.len()],
            active: BTreeMap::new(),
            steps: 0,
        }
    }

    /// The entries that the edges of one family need.
    fn along(
        &mut self,
        mut edges: Vec<(Prefix, Edge)>,
    ) -> Result<Vec<(Prefix, Coverage)>, CompileError> {
        edges.sort_unstable();
        let mut entries = Vec::new();
        let mut stack: Vec<Surrounding> = Vec::new();
        let mut start = 0;
        for here in edges.chunk_by(|(left, _), (right, _)| left == right) {
            let range = start..start + here.len();
            start = range.end;
            let Some((prefix, _)) = here.first().copied() else { continue };
            while let Some(around) = stack.pop_if(|around| !around.prefix.contains(prefix)) {
                self.leave(&edges[around.edges]);
            }
            self.enter(here);
            if prefix.is_host() && prefix.network().is_metadata() {
                // Only a block of exactly this address covers it, so what is around adds nothing,
                // and without such a block the shorter prefix must be found.
                if let Some(coverage) = self.exact(prefix, here)? {
                    entries.push((prefix, coverage));
                }
                self.leave(here);
                continue;
            }
            let coverage = self.coverage(prefix)?;
            if stack.last().is_none_or(|around| around.coverage != coverage) {
                entries.push((prefix, coverage));
            }
            stack.push(Surrounding { prefix, edges: range, coverage });
        }
        while let Some(around) = stack.pop() {
            self.leave(&edges[around.edges]);
        }
        Ok(entries)
    }

    fn enter(&mut self, edges: &[(Prefix, Edge)]) {
        for (_, edge) in edges {
            self.steps += 1;
            match *edge {
                Edge::Except(piece) => {
                    if self.is_active(piece) {
                        self.deactivate(piece);
                    }
                    self.excepted[piece.0] += 1;
                }
                Edge::Block(piece) => {
                    self.entered[piece.0] = true;
                    if self.is_active(piece) {
                        self.activate(piece);
                    }
                }
            }
        }
    }

    /// Undoes [`Self::enter`].
    fn leave(&mut self, edges: &[(Prefix, Edge)]) {
        for (_, edge) in edges.iter().rev() {
            self.steps += 1;
            match *edge {
                Edge::Except(piece) => {
                    self.excepted[piece.0] -= 1;
                    if self.is_active(piece) {
                        self.activate(piece);
                    }
                }
                Edge::Block(piece) => {
                    if self.is_active(piece) {
                        self.deactivate(piece);
                    }
                    self.entered[piece.0] = false;
                }
            }
        }
    }

    fn is_active(&self, piece: PieceIndex) -> bool {
        self.entered[piece.0] && self.excepted[piece.0] == 0
    }

    fn activate(&mut self, piece: PieceIndex) {
        *self.active.entry(self.pieces[piece.0]).or_default() += 1;
    }

    fn deactivate(&mut self, piece: PieceIndex) {
        if let Entry::Occupied(mut entry) = self.active.entry(self.pieces[piece.0]) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }

    /// What all blocks around and at `prefix` permit there. At least one contains it: an edge is
    /// a block or lies in one.
    fn coverage(&mut self, prefix: Prefix) -> Result<Coverage, CompileError> {
        self.cover(prefix, self.active.keys().copied().collect())
    }

    /// What the blocks of exactly one address permit there; `None` where there are none.
    fn exact(
        &mut self,
        prefix: Prefix,
        here: &[(Prefix, Edge)],
    ) -> Result<Option<Coverage>, CompileError> {
        let mut named = false;
        let mut sources = Vec::new();
        for (_, edge) in here {
            match *edge {
                Edge::Except(_) => {}
                Edge::Block(piece) => {
                    named = true;
                    if self.is_active(piece) {
                        sources.push(self.pieces[piece.0]);
                    }
                }
            }
        }
        sources.sort_unstable();
        sources.dedup();
        if named { self.cover(prefix, sources).map(Some) } else { Ok(None) }
    }

    fn cover(
        &mut self,
        prefix: Prefix,
        sources: Vec<SourceIndex>,
    ) -> Result<Coverage, CompileError> {
        self.steps += sources.len();
        if sources.is_empty() {
            return Ok(Coverage::Excepted);
        }
        self.sets
            .set_of(sources)
            .map(Coverage::Rules)
            .map_err(|scope| CompileError::TooManyRules { prefix, scope })
    }
}

/// The place of one list of rules in [`RuleSets::sources`]: what one permit gives at its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct SourceIndex(usize);

/// The sets of rules, each kept once.
#[derive(Default)]
struct RuleSets {
    list: Vec<Vec<Rule>>,
    indices: HashMap<Vec<Rule>, SetIndex>,
    sources: Vec<Vec<Rule>>,
    source_indices: HashMap<Vec<Rule>, SourceIndex>,
    /// Which set the sources together come to: most prefixes have the same few.
    known: HashMap<Vec<SourceIndex>, SetIndex>,
}

impl RuleSets {
    fn source(&mut self, rules: Vec<Rule>) -> SourceIndex {
        let next = SourceIndex(self.sources.len());
        *self.source_indices.entry(rules).or_insert_with_key(|rules| {
            self.sources.push(rules.clone());
            next
        })
    }

    /// The set of `sources` together; on failure the scope with the most rules.
    fn set_of(&mut self, sources: Vec<SourceIndex>) -> Result<SetIndex, ScopeId> {
        if let Some(set) = self.known.get(&sources) {
            return Ok(*set);
        }
        let rules = sources.iter().flat_map(|source| &self.sources[source.0]).copied().collect();
        let set = self.set(rules)?;
        self.known.insert(sources, set);
        Ok(set)
    }

    /// The set that decides as `rules` do; on failure the scope with the most rules.
    fn set(&mut self, rules: Vec<Rule>) -> Result<SetIndex, ScopeId> {
        let rules = reduce(join(rules))?;
        let next = SetIndex(self.list.len());
        Ok(*self.indices.entry(rules).or_insert_with_key(|rules| {
            self.list.push(rules.clone());
            next
        }))
    }
}

/// The rules by which `permit` permits `ranges`.
fn rules_of(permit: &Permit, ranges: &[PortRange]) -> impl Iterator<Item = Rule> {
    let permission = permit.permission();
    ranges
        .iter()
        .filter(|range| range.first <= range.last)
        .map(move |range| Rule::new(permission, range.protocol as u8, range.first, range.last))
}

/// Sorts rules into the order in which they answer, and joins ranges of one permission and
/// protocol that overlap or touch.
fn join(mut rules: Vec<Rule>) -> Vec<Rule> {
    rules.sort_unstable_by_key(|rule| {
        (precedence(&rule.permission), rule.protocol(), rule.first_port, rule.last_port)
    });
    rules.dedup_by(|rule, before| {
        let joined = rule.permission == before.permission
            && rule.protocol() == before.protocol()
            && u32::from(rule.first_port) <= u32::from(before.last_port) + 1;
        if joined {
            before.last_port = before.last_port.max(rule.last_port);
        }
        joined
    });
    rules
}

/// Drops every rule that never answers because an earlier one covers all that it covers.
fn reduce(rules: Vec<Rule>) -> Result<Vec<Rule>, ScopeId> {
    let mut kept: Vec<Rule> = Vec::new();
    for rule in rules {
        if kept.iter().any(|before| implies(before, &rule)) {
            continue;
        }
        kept.push(rule);
        if kept.len() > MAX_RULES {
            return Err(most_frequent_scope(&kept));
        }
    }
    Ok(kept)
}

fn implies(before: &Rule, rule: &Rule) -> bool {
    (before.protocol() == Protocol::Any as u8 || before.protocol() == rule.protocol())
        && before.first_port <= rule.first_port
        && rule.last_port <= before.last_port
}

fn most_frequent_scope(rules: &[Rule]) -> ScopeId {
    let mut counts: BTreeMap<ScopeId, usize> = BTreeMap::new();
    for rule in rules {
        *counts.entry(rule.permission.scope).or_default() += 1;
    }
    counts
        .into_iter()
        .max_by_key(|(scope, count)| (*count, Reverse(*scope)))
        .map_or(ScopeId::NONE, |(scope, _)| scope)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use agentguard_common::{
        Address, Decision, Destination, Endpoint, GrantId, Naming, Peer, Reason, Request,
        UnixNameId, Verdict, allowlist::ROWS_PER_SET, decide,
    };

    use super::*;
    use crate::allowlist::{Block, EgressPermit, agreement::load};

    const NOW: u64 = 100;

    fn block(cidr: &str, except: &[&str]) -> Block {
        Block {
            cidr: cidr.parse().unwrap(),
            except: except.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        }
    }

    fn tcp(first: u16, last: u16) -> PortRange {
        PortRange { protocol: Protocol::Tcp, first, last }
    }

    fn permit(number: u32, expires_at: u64) -> Permit {
        Permit {
            scope: ScopeId(number),
            grant: GrantId(number),
            expires_at,
            egress: vec![],
            executables: vec![],
            unix_sockets: vec![],
            listening: vec![],
        }
    }

    fn socket(name: u32) -> UnixSocket {
        UnixSocket { directory: 7, device: 8, name: UnixNameId(name) }
    }

    fn egress(number: u32, blocks: Vec<Block>, ports: Vec<PortRange>) -> Permit {
        Permit { egress: vec![EgressPermit { blocks, ports }], ..permit(number, NEVER) }
    }

    fn ask(permits: &[Permit], request: &Request) -> Decision {
        let (tables, tag) = load(&compile(permits).unwrap());
        decide(&tables, &tag, request, NOW)
    }

    fn connect(permits: &[Permit], address: &str, port: u16) -> Verdict {
        let address = Address::from(address.parse::<IpAddr>().unwrap());
        ask(permits, &Request::Connect(Destination { address, protocol: 6, port })).verdict
    }

    fn blocks(permits: &[Permit]) -> Vec<String> {
        let compiled = compile(permits).unwrap();
        compiled.destinations().iter().map(|(prefix, _)| prefix.to_string()).collect()
    }

    #[test]
    fn nothing_is_permitted_where_nothing_is_granted() {
        let compiled = compile(&[]).unwrap();
        assert_eq!(compiled, CompiledAllowlist::default());
        assert_eq!(connect(&[], "192.0.2.7", 443), Verdict::Deny(Reason::NotGranted));
        let bind = Request::Bind(Endpoint { protocol: 6, port: 80 });
        assert_eq!(ask(&[], &bind), Decision::deny(Reason::NotGranted));
    }

    #[test]
    fn a_narrow_block_keeps_what_the_wide_one_around_it_permits() {
        let permits = [
            egress(1, vec![block("10.0.0.0/8", &[])], vec![tcp(443, 443)]),
            egress(2, vec![block("10.1.0.0/16", &[])], vec![tcp(22, 22)]),
        ];
        for (address, port, verdict) in [
            ("10.1.2.3", 443, Verdict::Allow),
            ("10.1.2.3", 22, Verdict::Allow),
            ("10.2.0.0", 443, Verdict::Allow),
            ("10.2.0.0", 22, Verdict::Deny(Reason::PortNotGranted)),
            ("11.0.0.0", 443, Verdict::Deny(Reason::NotGranted)),
        ] {
            assert_eq!(connect(&permits, address, port), verdict, "{address} {port}");
        }
    }

    #[test]
    fn an_exception_takes_away_from_its_own_block_only() {
        let mut permits =
            vec![egress(1, vec![block("10.0.0.0/8", &["10.1.0.0/16"])], vec![tcp(443, 443)])];
        assert_eq!(connect(&permits, "10.0.255.255", 443), Verdict::Allow);
        assert_eq!(connect(&permits, "10.1.0.0", 443), Verdict::Deny(Reason::Excepted));
        assert_eq!(connect(&permits, "10.1.255.255", 443), Verdict::Deny(Reason::Excepted));
        assert_eq!(connect(&permits, "10.2.0.0", 443), Verdict::Allow);
        permits.push(egress(2, vec![block("10.1.2.0/24", &[])], vec![tcp(443, 443)]));
        assert_eq!(connect(&permits, "10.1.2.3", 443), Verdict::Allow);
        assert_eq!(connect(&permits, "10.1.3.3", 443), Verdict::Deny(Reason::Excepted));
    }

    #[test]
    fn all_of_ipv6_is_nothing_of_ipv4() {
        let permits = [egress(1, vec![block("::/0", &[])], vec![tcp(443, 443)])];
        assert_eq!(blocks(&permits), ["::/0", "0.0.0.0/0"]);
        assert_eq!(connect(&permits, "2001:db8::1", 443), Verdict::Allow);
        for address in ["192.0.2.7", "::ffff:192.0.2.7", "64:ff9b::192.0.2.7", "0.0.0.0"] {
            let denied = Verdict::Deny(Reason::NotGranted);
            assert_eq!(connect(&permits, address, 443), denied, "{address}");
        }
    }

    #[test]
    fn all_of_ipv4_is_nothing_of_ipv6_and_every_spelling_of_ipv4() {
        let permits = [egress(1, vec![block("0.0.0.0/0", &[])], vec![tcp(443, 443)])];
        assert_eq!(connect(&permits, "2002:c000:207::", 443), Verdict::Allow);
        assert_eq!(connect(&permits, "0.0.0.0", 443), Verdict::Allow);
        assert_eq!(connect(&permits, "::1", 443), Verdict::Deny(Reason::NotGranted));
    }

    #[test]
    fn a_metadata_address_is_reached_only_by_the_block_of_exactly_it() {
        let wide = egress(1, vec![block("0.0.0.0/0", &[])], vec![tcp(0, u16::MAX)]);
        let denied = Verdict::Deny(Reason::Metadata);
        let metadata = "169.254.169.254";
        assert_eq!(connect(&[], metadata, 80), denied);
        assert_eq!(connect(std::slice::from_ref(&wide), metadata, 80), denied);
        let excepting =
            egress(2, vec![block("169.254.0.0/16", &["169.254.169.254/32"])], vec![tcp(80, 80)]);
        assert_eq!(connect(&[wide.clone(), excepting], metadata, 80), denied);
        let exact = egress(3, vec![block("169.254.169.254/32", &[])], vec![tcp(80, 80)]);
        assert_eq!(connect(&[wide.clone(), exact.clone()], metadata, 80), Verdict::Allow);
        let other_port = connect(&[wide, exact], metadata, 443);
        assert_eq!(other_port, Verdict::Deny(Reason::PortNotGranted));
    }

    #[test]
    fn what_lasts_longest_answers_and_then_the_lowest_grant_and_scope() {
        let with = |scope, grant, expires_at| Permit {
            scope: ScopeId(scope),
            grant: GrantId(grant),
            expires_at,
            ..egress(0, vec![block("10.0.0.0/8", &[])], vec![tcp(443, 443)])
        };
        let request = Request::Connect(Destination {
            address: Ipv4Addr::new(10, 0, 0, 1).into(),
            protocol: 6,
            port: 443,
        });
        let permits =
            [with(1, 1, NOW), with(2, 3, NOW + 9), with(4, 2, NOW + 9), with(3, 2, NOW + 9)];
        let permission = Permission { expires_at: NOW + 9, scope: ScopeId(3), grant: GrantId(2) };
        let decision = ask(&permits, &request);
        assert_eq!(decision, Decision { verdict: Verdict::Allow, permission });
        let over = ask(&permits[..1], &request);
        assert_eq!(over.verdict, Verdict::Deny(Reason::Expired));
        assert_eq!(over.permission.grant, GrantId(1));
    }

    #[test]
    fn a_grant_that_ended_before_the_machine_started_is_expired() {
        let permits = [Permit {
            expires_at: 0,
            ..egress(5, vec![block("10.0.0.0/8", &[])], vec![tcp(443, 443)])
        }];
        assert_eq!(connect(&permits, "10.0.0.1", 443), Verdict::Deny(Reason::Expired));
    }

    #[test]
    fn blocks_that_permit_the_same_share_one_set_and_need_no_entry_inside_each_other() {
        let permits = [egress(
            1,
            vec![
                block("10.0.0.0/8", &[]),
                block("10.1.0.0/16", &[]),
                block("10.1.0.0/16", &[]),
                block("192.0.2.0/24", &[]),
            ],
            vec![tcp(443, 443)],
        )];
        assert_eq!(blocks(&permits), ["10.0.0.0/8", "192.0.2.0/24"]);
        assert_eq!(compile(&permits).unwrap().rule_sets().len(), 1);
    }

    #[test]
    fn ranges_that_touch_are_one_rule_and_implied_rules_are_dropped() {
        let all = PortRange { protocol: Protocol::Any, first: 0, last: u16::MAX };
        let here = || vec![block("10.0.0.0/8", &[])];
        let touching = egress(1, here(), vec![tcp(81, 90), tcp(70, 79), tcp(80, 80)]);
        let compiled = compile(std::slice::from_ref(&touching)).unwrap();
        let [(_, Coverage::Rules(set))] = compiled.destinations() else { panic!("{compiled:?}") };
        let [rule] = compiled.rules(*set) else { panic!("{compiled:?}") };
        assert_eq!((rule.first_port, rule.last_port), (70, 90));

        let shorter = Permit { expires_at: NOW, ..egress(2, here(), vec![all]) };
        let compiled = compile(&[touching.clone(), shorter]).unwrap();
        assert_eq!(compiled.rule_sets()[0].len(), 2, "each permits what the other does not");
        let standing = egress(0, here(), vec![all]);
        let compiled = compile(&[touching, standing]).unwrap();
        assert_eq!(compiled.rule_sets()[0].len(), 1, "the standing grant permits all of it");
    }

    #[test]
    fn listening_is_permitted_by_port_and_a_port_the_kernel_chooses_always() {
        let permits = [Permit { listening: vec![tcp(8000, 8999)], ..permit(1, NEVER) }];
        let endpoint = |port| Endpoint { protocol: 6, port };
        let verdict = |request| ask(&permits, &request).verdict;
        assert_eq!(verdict(Request::Bind(endpoint(8000))), Verdict::Allow);
        assert_eq!(verdict(Request::Reply(endpoint(8999))), Verdict::Allow);
        let denied = Verdict::Deny(Reason::PortNotGranted);
        assert_eq!(verdict(Request::Bind(endpoint(9000))), denied);
        assert_eq!(verdict(Request::Reply(endpoint(0))), denied);
        assert_eq!(ask(&permits, &Request::Bind(endpoint(0))), Decision::ALLOW);
    }

    #[test]
    fn nobody_is_served_on_a_port_that_was_not_granted_not_even_on_one_the_kernel_chose() {
        let permits = [Permit { listening: vec![tcp(8000, 8999)], ..permit(1, NEVER) }];
        for request in [Request::Listen, Request::Accept] {
            let verdict = |permits, port| {
                let endpoint = Endpoint { protocol: 6, port };
                ask(permits, &request(endpoint)).verdict
            };
            assert_eq!(verdict(&permits, 8000), Verdict::Allow);
            for port in [0, 9000] {
                assert_eq!(verdict(&permits, port), Verdict::Deny(Reason::PortNotGranted));
            }
            assert_eq!(verdict(&[], 0), Verdict::Deny(Reason::NotGranted));
        }
    }

    #[test]
    fn a_unix_socket_is_its_directory_and_its_name() {
        let abstract_name = UnixSocket { name: UnixNameId(3), ..UnixSocket::default() };
        let permits = [Permit { unix_sockets: vec![socket(1), abstract_name], ..permit(1, NEVER) }];
        for request in [Request::UnixConnect, Request::UnixSend] {
            let ask = |socket, peer| ask(&permits, &request(socket, peer)).verdict;
            let denied = Verdict::Deny(Reason::NotGranted);
            assert_eq!(ask(socket(1), Peer::Other), Verdict::Allow);
            assert_eq!(ask(abstract_name, Peer::Other), Verdict::Allow);
            for stranger in [
                socket(2),
                socket(3),
                UnixSocket { directory: 9, ..socket(1) },
                UnixSocket { device: 9, ..socket(1) },
                UnixSocket { name: UnixNameId(1), ..UnixSocket::default() },
                UnixSocket::default(),
            ] {
                assert_eq!(ask(stranger, Peer::Other), denied, "{stranger:?}");
                assert_eq!(ask(stranger, Peer::Own), Verdict::Allow);
                assert_eq!(ask(stranger, Peer::Unnamed), Verdict::Allow);
            }
        }
    }

    #[test]
    fn a_unix_socket_whose_name_has_no_number_is_never_permitted() {
        let permits = [Permit { unix_sockets: vec![socket(0)], ..permit(1, NEVER) }];
        assert_eq!(compile(&permits).unwrap().unix_sockets(), []);
        let verdict = ask(&permits, &Request::UnixConnect(socket(0), Peer::Other)).verdict;
        assert_eq!(verdict, Verdict::Deny(Reason::NotGranted));
    }

    #[test]
    fn of_the_grants_of_a_unix_socket_the_one_that_lasts_longest_answers() {
        let with = |number, expires_at| Permit {
            unix_sockets: vec![socket(1)],
            ..permit(number, expires_at)
        };
        let ask = |permits: &[Permit]| {
            let decision = ask(permits, &Request::UnixConnect(socket(1), Peer::Other));
            (decision.verdict, decision.permission.grant)
        };
        let (over, lasts) = (with(1, NOW), with(2, NOW + 1));
        let expired = (Verdict::Deny(Reason::Expired), GrantId(1));
        assert_eq!(ask(std::slice::from_ref(&over)), expired);
        assert_eq!(ask(&[over.clone(), lasts.clone()]), (Verdict::Allow, GrantId(2)));
        assert_eq!(ask(&[lasts, over]), (Verdict::Allow, GrantId(2)));
    }

    #[test]
    fn families_are_granted_to_nobody() {
        let verdict = |family, protocol| ask(&[], &Request::Socket { family, protocol }).verdict;
        for (family, protocol) in [(1, 0), (2, 6), (10, 17), (16, 0)] {
            assert_eq!(verdict(family, protocol), Verdict::Allow, "{family}");
        }
        for (family, protocol) in [(16, 9), (17, 0), (38, 0), (40, 0), (44, 0), (u16::MAX, 0)] {
            assert_eq!(verdict(family, protocol), Verdict::Deny(Reason::SocketFamily), "{family}");
        }
    }

    #[test]
    fn a_file_runs_only_in_the_generation_that_was_granted() {
        let file = |inode, generation| FileId { inode, device: 3, generation };
        let permits = [Permit { executables: vec![file(1, 7), file(2, 0)], ..permit(1, NEVER) }];
        let verdict = |file| ask(&permits, &Request::Exec(file, Naming::Named)).verdict;
        assert_eq!(verdict(file(1, 7)), Verdict::Allow);
        assert_eq!(verdict(file(1, 8)), Verdict::Deny(Reason::ReplacedFile));
        assert_eq!(verdict(file(2, 9)), Verdict::Allow);
        assert_eq!(verdict(file(3, 0)), Verdict::Deny(Reason::NotGranted));
    }

    #[test]
    fn a_long_set_goes_on_in_the_next_row() {
        let ports = |count: u16| (0..count).map(|port| tcp(port * 2, port * 2)).collect();
        let permits = [egress(1, vec![block("10.0.0.0/8", &[])], ports(20))];
        let compiled = compile(&permits).unwrap();
        let rows = compiled.rows(AllowlistId(1), RuleSetId(40)).unwrap();
        let numbers: Vec<_> = rows.rules.iter().map(|(id, row)| (id.0, row.next.0)).collect();
        assert_eq!(numbers, [(40, 41), (41, 42), (42, 0)]);
        assert_eq!(compiled.rule_row_count(), 3);
        for port in 0..40 {
            let granted = connect(&permits, "10.0.0.1", port) == Verdict::Allow;
            assert_eq!(granted, port % 2 == 0, "{port}");
        }
        let most = ports(MAX_RULES as u16);
        let full = [egress(1, vec![block("10.0.0.0/8", &[])], most)];
        let compiled = compile(&full).unwrap();
        assert_eq!(compiled.rule_row_count(), ROWS_PER_SET);
        let last = (MAX_RULES as u16 - 1) * 2;
        assert_eq!(connect(&full, "10.0.0.1", last), Verdict::Allow);
    }

    #[test]
    fn too_many_rules_name_the_block_and_the_scope_with_the_most() {
        let ports =
            |first: u16, count| (0..count).map(move |at| tcp(first + at * 2, first + at * 2));
        let wide = egress(1, vec![block("10.0.0.0/8", &[])], ports(1, 20).collect());
        let narrow = egress(2, vec![block("10.1.0.0/16", &[])], ports(1000, 50).collect());
        assert!(compile(std::slice::from_ref(&wide)).is_ok());
        assert!(compile(std::slice::from_ref(&narrow)).is_ok());
        let error = compile(&[wide, narrow]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "10.1.0.0/16 has more than 64 port rules, most of them from scope number 2; join \
             its port ranges, or grant fewer scopes for these addresses"
        );
        let listening = Permit { listening: ports(1, 65).collect(), ..permit(3, NEVER) };
        assert_eq!(
            compile(&[listening]),
            Err(CompileError::TooManyListeningRules { scope: ScopeId(3) })
        );
    }

    #[test]
    fn rows_are_numbered_from_one_or_not_at_all() {
        let permits = [egress(1, vec![block("10.0.0.0/8", &[])], vec![tcp(1, 1), tcp(3, 3)])];
        let compiled = compile(&permits).unwrap();
        let rows = |first| compiled.rows(AllowlistId(1), RuleSetId(first)).map(|rows| rows.rules);
        assert_eq!(rows(0), Err(RowsError::NumberedFromNone));
        assert!(rows(u32::MAX - 1).is_ok());
        let exhausted = RowsError::Exhausted { first: RuleSetId(u32::MAX), rows: 1 };
        assert_eq!(rows(u32::MAX), Err(exhausted));
        assert!(compile(&[]).unwrap().rows(AllowlistId(1), RuleSetId::NONE).is_ok());
    }

    #[test]
    fn the_next_expiry_is_that_of_something_permitted() {
        let mut permits = vec![
            Permit { expires_at: 200, listening: vec![tcp(80, 80)], ..permit(1, 0) },
            Permit {
                expires_at: 300,
                ..egress(2, vec![block("10.0.0.0/8", &[])], vec![tcp(1, 1)])
            },
            Permit {
                executables: vec![FileId { inode: 1, device: 1, generation: 1 }],
                ..permit(3, 400)
            },
            permit(4, 250),
            Permit { unix_sockets: vec![socket(1)], ..permit(5, 350) },
        ];
        let next = |permits: &[Permit], now| compile(permits).unwrap().next_expiry(now);
        assert_eq!(next(&permits, 0), Some(200));
        assert_eq!(next(&permits, 200), Some(300));
        assert_eq!(next(&permits, 300), Some(350));
        assert_eq!(next(&permits, 399), Some(400));
        assert_eq!(next(&permits, 400), None);
        permits[0].expires_at = NEVER;
        assert_eq!(next(&permits, 0), Some(300));
    }

    /// Blocks in 16 wide ones, some with an exception, some with two permissions.
    fn many(count: u32) -> Vec<Permit> {
        let narrow = |number: u32| {
            let address = Ipv4Addr::from(0x0a00_0000_u32 | (number << 8));
            let excepts = usize::from(number.is_multiple_of(3));
            let corner = format!("{address}/30");
            block(&format!("{address}/24"), &[corner.as_str()][..excepts])
        };
        let wide = (0..16).map(|number| block(&format!("10.{}.0.0/12", number * 16), &[]));
        vec![
            egress(1, (0..count).map(narrow).collect(), vec![tcp(443, 443)]),
            egress(2, (0..count).step_by(2).map(narrow).collect(), vec![tcp(22, 22)]),
            egress(3, wide.collect(), vec![tcp(53, 53)]),
        ]
    }

    #[test]
    fn ten_times_the_blocks_take_ten_times_the_steps() {
        let (few, few_steps) = compile_counted(&many(1_000), &Reserved::default()).unwrap();
        let (all, all_steps) = compile_counted(&many(10_000), &Reserved::default()).unwrap();
        assert!(few.destinations().len() >= 1_000);
        assert!(all.destinations().len() >= 10_000);
        assert!(all_steps <= 11 * few_steps, "{few_steps} steps, then {all_steps}");
        assert_eq!(all.rule_sets().len(), few.rule_sets().len());
    }
}
