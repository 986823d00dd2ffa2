//! Reads the `spec` of a `Workload` manifest.

use agentguard_common::Mode;

use super::reader::Value;
use crate::{
    identity::{Selector, WorkloadDocument},
    name::ResourceName,
};

pub(super) fn read(name: Option<ResourceName>, spec: &Value<'_>) -> Option<WorkloadDocument> {
    let [select, spiffe_id, mode] = spec.fields(["select", "spiffeId", "mode"])?;
    let selector = select.required(read_selector);
    let spiffe_id = spiffe_id.required(Value::parse);
    let mode = mode.required(|value| value.one_of(&Mode::ALL, Mode::as_str));
    Some(WorkloadDocument { name: name?, selector: selector?, spiffe_id: spiffe_id?, mode: mode? })
}

fn read_selector(select: &Value<'_>) -> Option<Selector> {
    let [cgroup, unit] = select.fields(["cgroup", "systemdUnit"])?;
    select.check_exactly_one([&cgroup, &unit]);
    let cgroup = cgroup.optional(|value| {
        value.note();
        value.parse()
    });
    let unit = unit.optional(Value::parse);
    cgroup?.map(Selector::Cgroup).or(unit?.map(Selector::SystemdUnit))
}
