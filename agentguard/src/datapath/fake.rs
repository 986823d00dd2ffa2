//! A datapath without a kernel: the same tables, the same decision, ordinary collections.
//!
//! Whoever drives a datapath is tested against this one. It really decides: the tables are
//! [`TableSet`], over which the daemon's `explain` decides too, and the decision is the kernel's
//! own. It knows neither BPF nor cgroups of this machine. A value of one owner, not shared.

use std::collections::BTreeMap;

use agentguard_common::{AllowlistId, CgroupId, Reason, Request, Tag, Verdict, WorkloadId, decide};

use crate::allowlist::{
    compile::Rows,
    tables::{LoadError, TableSet},
};

/// What the kernel would hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FakeDatapath {
    tables: TableSet,
    tags: BTreeMap<WorkloadId, Tag>,
    members: BTreeMap<CgroupId, WorkloadId>,
}

impl FakeDatapath {
    /// Writes an allow-list beside those that are loaded; no workload is held to it yet.
    ///
    /// # Errors
    ///
    /// A number of `rows` is in use; nothing was written.
    pub fn load_allowlist(&mut self, rows: Rows) -> Result<(), LoadError> {
        self.tables.load(rows)
    }

    /// Holds `workload` to `tag` from now on: the one write that ends the old generation and
    /// begins the new one.
    pub fn switch(&mut self, workload: WorkloadId, tag: Tag) {
        self.tags.insert(workload, tag);
    }

    /// Removes an allow-list; whether it was loaded. Like the kernel's, this does not ask whether
    /// a tag still points to it: such a workload is denied what the allow-list permitted.
    pub fn drop_allowlist(&mut self, allowlist: AllowlistId) -> bool {
        self.tables.remove(allowlist)
    }

    /// Makes the processes of `cgroup` processes of `workload`.
    pub fn enroll(&mut self, cgroup: CgroupId, workload: WorkloadId) {
        self.members.insert(cgroup, workload);
    }

    /// What the kernel does when a cgroup is made: it belongs to the workload of its parent.
    pub fn make_cgroup(&mut self, cgroup: CgroupId, parent: CgroupId) {
        if let Some(workload) = self.members.get(&parent).copied() {
            self.enroll(cgroup, workload);
        }
    }

    /// What the kernel does when a cgroup is removed.
    pub fn remove_cgroup(&mut self, cgroup: CgroupId) {
        self.members.remove(&cgroup);
    }

    /// Removes a workload: its tag, and its cgroups from membership.
    pub fn forget(&mut self, workload: WorkloadId) {
        self.tags.remove(&workload);
        self.members.retain(|_, member| *member != workload);
    }

    /// The tag of `workload`.
    #[must_use]
    pub fn tag(&self, workload: WorkloadId) -> Option<Tag> {
        self.tags.get(&workload).copied()
    }

    /// The tables as they are loaded.
    #[must_use]
    pub const fn tables(&self) -> &TableSet {
        &self.tables
    }

    /// Decides what a process in `cgroup` asks at `now` (nanoseconds of boot time).
    #[must_use]
    pub fn decide(&self, cgroup: CgroupId, request: &Request, now: u64) -> Verdict {
        let Some(workload) = self.members.get(&cgroup) else { return Verdict::Unmanaged };
        match self.tags.get(workload) {
            Some(tag) => decide(&self.tables, tag, request, now).verdict,
            None => Verdict::Deny(Reason::MissingTable),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use agentguard_common::{
        Destination, GrantId, IdentityId, Mode, Protocol, RuleSetId, ScopeId, allowlist::NEVER,
    };

    use super::*;
    use crate::allowlist::{Block, EgressPermit, Permit, PortRange, compile::compile};

    const CGROUP: CgroupId = CgroupId(11);
    const WORKLOAD: WorkloadId = WorkloadId(1);

    fn rows(allowlist: u32, first_row: u32, cidr: &str) -> Rows {
        let permit = Permit {
            scope: ScopeId(1),
            grant: GrantId(1),
            expires_at: NEVER,
            egress: vec![EgressPermit {
                blocks: vec![Block { cidr: cidr.parse().unwrap(), except: vec![] }],
                ports: vec![PortRange { protocol: Protocol::Tcp, first: 443, last: 443 }],
            }],
            executables: vec![],
            unix_sockets: vec![],
            listening: vec![],
        };
        compile(&[permit]).unwrap().rows(AllowlistId(allowlist), RuleSetId(first_row)).unwrap()
    }

    fn tag(allowlist: u32) -> Tag {
        Tag::new(IdentityId(1), Mode::Enforce, AllowlistId(allowlist), RuleSetId::NONE, 0)
    }

    fn connect(datapath: &FakeDatapath, cgroup: CgroupId, address: [u8; 4]) -> Verdict {
        let address = Ipv4Addr::from(address).into();
        let destination = Destination { address, protocol: 6, port: 443 };
        datapath.decide(cgroup, &Request::Connect(destination), 0)
    }

    #[test]
    fn a_switch_holds_the_workload_to_the_new_generation_at_once() {
        const NOT_GRANTED: Verdict = Verdict::Deny(Reason::NotGranted);
        let mut datapath = FakeDatapath::default();
        assert_eq!(connect(&datapath, CGROUP, [10, 0, 0, 1]), Verdict::Unmanaged);
        datapath.load_allowlist(rows(1, 1, "10.0.0.0/8")).unwrap();
        datapath.switch(WORKLOAD, tag(1));
        datapath.enroll(CGROUP, WORKLOAD);
        assert_eq!(connect(&datapath, CGROUP, [10, 0, 0, 1]), Verdict::Allow);

        datapath.load_allowlist(rows(2, 2, "192.0.2.0/24")).unwrap();
        assert_eq!(connect(&datapath, CGROUP, [192, 0, 2, 1]), NOT_GRANTED);
        datapath.switch(WORKLOAD, tag(2));
        assert!(datapath.drop_allowlist(AllowlistId(1)));
        assert_eq!(connect(&datapath, CGROUP, [192, 0, 2, 1]), Verdict::Allow);
        assert_eq!(connect(&datapath, CGROUP, [10, 0, 0, 1]), NOT_GRANTED);
    }

    #[test]
    fn a_new_cgroup_belongs_to_the_workload_of_its_parent() {
        let mut datapath = FakeDatapath::default();
        datapath.load_allowlist(rows(1, 1, "10.0.0.0/8")).unwrap();
        datapath.switch(WORKLOAD, tag(1));
        datapath.enroll(CGROUP, WORKLOAD);
        let (child, stranger) = (CgroupId(12), CgroupId(13));
        datapath.make_cgroup(child, CGROUP);
        datapath.make_cgroup(stranger, CgroupId(99));
        assert_eq!(connect(&datapath, child, [10, 0, 0, 1]), Verdict::Allow);
        assert_eq!(connect(&datapath, stranger, [10, 0, 0, 1]), Verdict::Unmanaged);
        datapath.remove_cgroup(child);
        assert_eq!(connect(&datapath, child, [10, 0, 0, 1]), Verdict::Unmanaged);
        datapath.forget(WORKLOAD);
        assert_eq!(datapath.tag(WORKLOAD), None);
        assert_eq!(connect(&datapath, CGROUP, [10, 0, 0, 1]), Verdict::Unmanaged);
    }

    #[test]
    fn a_member_without_a_tag_and_one_without_its_allow_list_are_denied() {
        let mut datapath = FakeDatapath::default();
        datapath.enroll(CGROUP, WORKLOAD);
        let missing = Verdict::Deny(Reason::MissingTable);
        assert_eq!(connect(&datapath, CGROUP, [10, 0, 0, 1]), missing);
        datapath.switch(WORKLOAD, tag(1));
        let denied = Verdict::Deny(Reason::NotGranted);
        assert_eq!(connect(&datapath, CGROUP, [10, 0, 0, 1]), denied);
    }
}
