//! Whether one allow-list permits all that another one does.
//!
//! Pure. Blocks are compared as [`compile`](super::compile) made them: sorted, so that one walk along both
//! meets each block with those around it on a stack.

use std::{iter::Peekable, slice};

use agentguard_common::{Permission, allowlist::Rule};

use super::{
    compile::{CompiledAllowlist, Coverage},
    prefix::Prefix,
};

impl CompiledAllowlist {
    /// Whether all that `earlier` permits at `now` (nanoseconds of boot time) or later is permitted here too,
    /// and for as long.
    ///
    /// Rules are compared one by one: what several make up for together is not seen. So `true` is never
    /// wrong, and `false` may be.
    #[must_use]
    pub fn covers(&self, earlier: &Self, now: u64) -> bool {
        are_permitted(earlier.executables(), self.executables(), now)
            && are_permitted(earlier.unix_sockets(), self.unix_sockets(), now)
            && are_within(listening(earlier), listening(self), now)
            && are_destinations_within(earlier, self, now)
    }
}

/// Whether each of `earlier` that is not over is among `here`, which is sorted, for as long.
fn are_permitted<K: Ord>(earlier: &[(K, Permission)], here: &[(K, Permission)], now: u64) -> bool {
    let lasts = |(key, permission): &(K, Permission)| {
        let found = here.binary_search_by(|(other, _)| other.cmp(key));
        found.is_ok_and(|index| here[index].1.expires_at >= permission.expires_at)
    };
    earlier.iter().filter(|(_, permission)| permission.expires_at > now).all(lasts)
}

fn listening(allowlist: &CompiledAllowlist) -> &[Rule] {
    allowlist.listening().map_or(&[], |set| allowlist.rules(set))
}

/// Whether each rule that is not over is among `others`, for as long.
fn are_within(rules: &[Rule], others: &[Rule], now: u64) -> bool {
    let lasts_as = |rule: &Rule, other: &Rule| {
        let mut same = *other;
        same.permission = rule.permission;
        same == *rule && other.permission.expires_at >= rule.permission.expires_at
    };
    let mut still = rules.iter().filter(|rule| rule.permission.expires_at > now);
    still.all(|rule| others.iter().any(|other| lasts_as(rule, other)))
}

fn are_destinations_within(
    earlier: &CompiledAllowlist,
    here: &CompiledAllowlist,
    now: u64,
) -> bool {
    let (mut earlier, mut here) = (Walk::along(earlier), Walk::along(here));
    // What an address gets is said by the smallest block around it, so it changes at a block of either.
    while let Some(block) = [earlier.next(), here.next()].into_iter().flatten().min() {
        if !are_within(earlier.rules_at(block), here.rules_at(block), now) {
            return false;
        }
    }
    true
}

/// A walk along the blocks of an allow-list.
struct Walk<'a> {
    allowlist: &'a CompiledAllowlist,
    ahead: Peekable<slice::Iter<'a, (Prefix, Coverage)>>,
    /// Blocks around the present one, each in the one before.
    around: Vec<(Prefix, &'a [Rule])>,
}

impl<'a> Walk<'a> {
    fn along(allowlist: &'a CompiledAllowlist) -> Self {
        let ahead = allowlist.destinations().iter().peekable();
        Self { allowlist, ahead, around: Vec::new() }
    }

    fn next(&mut self) -> Option<Prefix> {
        self.ahead.peek().map(|(block, _)| *block)
    }

    /// The rules for addresses of `block` that are in no smaller one. Each call is for a later block, which
    /// is no later than the next one of this walk.
    fn rules_at(&mut self, block: Prefix) -> &'a [Rule] {
        while self.around.last().is_some_and(|(around, _)| !around.contains(block)) {
            self.around.pop();
        }
        if let Some((own, coverage)) = self.ahead.next_if(|(own, _)| *own == block) {
            let rules = match coverage {
                Coverage::Rules(set) => self.allowlist.rules(*set),
                Coverage::Excepted | Coverage::Uncovered => &[],
            };
            self.around.push((*own, rules));
        }
        self.around.last().map_or(&[], |(_, rules)| rules)
    }
}

#[cfg(test)]
mod tests {
    use agentguard_common::{FileId, GrantId, Protocol, ScopeId, allowlist::NEVER};

    use crate::allowlist::{Block, EgressPermit, Permit, PortRange, compile::compile};

    const NOW: u64 = 100;

    fn ports(first: u16, last: u16) -> PortRange {
        PortRange { protocol: Protocol::Tcp, first, last }
    }

    fn to(cidr: &str, except: &[&str], first: u16, last: u16) -> EgressPermit {
        let except = except.iter().map(|cidr| cidr.parse().unwrap()).collect();
        EgressPermit {
            blocks: vec![Block { cidr: cidr.parse().unwrap(), except }],
            ports: vec![ports(first, last)],
        }
    }

    fn until(expires_at: u64, egress: Vec<EgressPermit>) -> Permit {
        Permit {
            scope: ScopeId(1),
            grant: GrantId(1),
            expires_at,
            egress,
            executables: vec![],
            unix_sockets: vec![],
            listening: vec![],
        }
    }

    fn covers(here: &[Permit], earlier: &[Permit]) -> bool {
        compile(here).unwrap().covers(&compile(earlier).unwrap(), NOW)
    }

    #[test]
    fn what_is_permitted_besides_takes_nothing_away() {
        let one = [until(NEVER, vec![to("192.0.2.0/24", &[], 1, 9)])];
        let two = [until(
            NEVER,
            vec![
                to("192.0.2.0/24", &[], 1, 9),
                to("192.0.2.7/32", &[], 20, 30),
                to("198.51.100.0/24", &[], 1, 9),
            ],
        )];
        assert!(covers(&one, &one) && covers(&two, &one) && covers(&one, &[]));
        assert!(!covers(&one, &two) && !covers(&[], &one));
    }

    #[test]
    fn a_wider_block_covers_a_narrower_one_and_not_the_other_way_round() {
        let wide = [until(NEVER, vec![to("192.0.2.0/24", &[], 1, 9)])];
        let narrow = [until(NEVER, vec![to("192.0.2.128/25", &[], 1, 9)])];
        let excepted = [until(NEVER, vec![to("192.0.2.0/24", &["192.0.2.8/29"], 1, 9)])];
        assert!(covers(&wide, &narrow) && covers(&wide, &excepted));
        assert!(covers(&excepted, &narrow), "the exception is elsewhere");
        assert!(!covers(&narrow, &wide) && !covers(&excepted, &wide));
    }

    #[test]
    fn an_end_that_comes_earlier_takes_away_and_what_is_over_does_not_count() {
        let block = || vec![to("192.0.2.0/24", &[], 1, 9)];
        let (brief, long, over) = (until(200, block()), until(300, block()), until(NOW, block()));
        assert!(covers(std::slice::from_ref(&long), std::slice::from_ref(&brief)));
        assert!(!covers(std::slice::from_ref(&brief), std::slice::from_ref(&long)));
        assert!(covers(&[], std::slice::from_ref(&over)));
        assert!(!covers(&[over], &[brief]));
    }

    #[test]
    fn files_and_ports_to_listen_on_count_too() {
        let with = |files: &[u64], last| {
            let file = |inode: &u64| FileId { inode: *inode, ..FileId::default() };
            let executables = files.iter().map(file).collect();
            let listening = vec![ports(80, last)];
            [Permit { executables, listening, ..until(NEVER, vec![]) }]
        };
        assert!(covers(&with(&[1, 2], 80), &with(&[2], 80)));
        assert!(!covers(&with(&[1], 80), &with(&[2], 80)));
        assert!(!covers(&with(&[2], 80), &with(&[2], 81)));
    }
}
