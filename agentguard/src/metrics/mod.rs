//! What agentguard tells Prometheus.
//!
//! Callers say what happened in methods with domain names; names and labels of metrics exist only
//! here, in one table that is also the reference ([`describe`]). No label is ever an address, a
//! path or a pid, and the number of workload identities that get a label is bounded (`labels`), so
//! the number of series is bounded whatever workloads do. Must not know where values come from.
//! All methods can be called from any thread.

mod labels;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentguard_common::stats::{Counters, Fate};
use agentguard_common::{Layer, Mode, Reason};
use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use labels::IdentityLabels;

/// The content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// What the reference says about a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricDoc {
    pub name: &'static str,
    pub kind: MetricKind,
    pub labels: &'static [LabelDoc],
    pub help: &'static str,
}

/// What the reference says about a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LabelDoc {
    pub name: &'static str,
    pub values: &'static str,
}

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only rises; starts from zero when the daemon does.
    Counter,
    Gauge,
    Histogram,
}

impl MetricKind {
    /// The word that Prometheus uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

const fn label(name: &'static str, values: &'static str) -> LabelDoc {
    LabelDoc { name, values }
}

const fn metric(
    name: &'static str,
    kind: MetricKind,
    labels: &'static [LabelDoc],
    help: &'static str,
) -> MetricDoc {
    MetricDoc { name, kind, labels, help }
}

use MetricKind::{Counter, Gauge as GaugeKind, Histogram as HistogramKind};

const VERDICTS: MetricDoc = metric(
    "agentguard_verdicts_total",
    Counter,
    &[
        label("hook", "the kernel's name of the hook"),
        label("verdict", "`allow`, `deny` or `unmanaged`"),
        label("reason", "why it is denied; `none` unless it is"),
        label("mode", "`audit` or `enforce`; a denial is refused in `enforce` only"),
        label("identity", "the SPIFFE ID, or `other` beyond `metrics.max_identities`"),
    ],
    "Requests that the kernel decided.",
);
const EVENTS: MetricDoc = metric(
    "agentguard_events_total",
    Counter,
    &[label(
        "outcome",
        "`logged`, `aggregated` into an earlier record, or `lost` for want of room",
    )],
    "What became of the records of verdicts in the kernel; the sum equals the verdicts.",
);
const IDENTITIES_OTHER: MetricDoc = metric(
    "agentguard_identities_unlabelled",
    GaugeKind,
    &[],
    "Workload identities that share the label `other`.",
);
const PROTECTION: MetricDoc = metric(
    "agentguard_protection",
    GaugeKind,
    &[label("layer", "`portable` or `lsm`"), label("protection", "`full`, `partial` or `none`")],
    "What each layer of hooks can enforce on this kernel: 1 at the one that holds, else 0.",
);
const WORKLOAD_PROTECTION: MetricDoc = metric(
    "agentguard_workload_protection",
    GaugeKind,
    &[
        label("layer", "`portable` or `lsm`"),
        label("protection", "`full`, `partial` or `none`"),
        label("identity", "the SPIFFE ID, or `other` beyond `metrics.max_identities`"),
    ],
    "Workloads of an identity, at what the layer enforces for each of them; 0 at the others.",
);
const WORKLOADS: MetricDoc = metric(
    "agentguard_workloads",
    GaugeKind,
    &[label("mode", "`audit` or `enforce`"), label("protection", "`full`, `partial` or `none`")],
    "Workloads on this node.",
);
const GRANTS: MetricDoc = metric(
    "agentguard_grants",
    GaugeKind,
    &[label(
        "state",
        "`pending`, `active` (with an end), `standing` (active without end), `expired` or `revoked`",
    )],
    "Grants that are known, each in one state.",
);
const ALLOWLIST_ENTRIES: MetricDoc = metric(
    "agentguard_allowlist_entries",
    GaugeKind,
    &[],
    "Entries of all allow-lists in the kernel.",
);
const GENERATION: MetricDoc = metric(
    "agentguard_allowlist_generation",
    GaugeKind,
    &[],
    "Generation of the newest allow-list in the kernel.",
);
const RECONCILE_DURATION: MetricDoc = metric(
    "agentguard_reconcile_duration_seconds",
    HistogramKind,
    &[],
    "Time from a change of grants or workloads to the kernel enforcing it.",
);
const RECONCILE_FAILURES: MetricDoc = metric(
    "agentguard_reconcile_failures_total",
    Counter,
    &[],
    "Changes that could not be brought into the kernel; what was enforced before stays.",
);
const LOAD_DURATION: MetricDoc = metric(
    "agentguard_load_duration_seconds",
    HistogramKind,
    &[],
    "Time to load or adopt the kernel half.",
);
const MANIFEST_ERRORS: MetricDoc = metric(
    "agentguard_manifest_errors",
    GaugeKind,
    &[],
    "Manifests that are refused at present; what is enforced does not follow them.",
);
const CLUSTER_LEFT_OUT: MetricDoc = metric(
    "agentguard_cluster_left_out",
    GaugeKind,
    &[],
    "Objects of the cluster that found no room in kubernetes.max_kind_bytes since they were last listed; no scope leads to them.",
);
const NRI_CONNECTED: MetricDoc = metric(
    "agentguard_nri_connected",
    GaugeKind,
    &[],
    "1 while the container runtime waits for the daemon before it starts a container.",
);
const MAP_ENTRIES: MetricDoc = metric(
    "agentguard_map_entries",
    GaugeKind,
    &[label("map", "name of the kernel map")],
    "Entries in a kernel map.",
);
const MAP_CAPACITY: MetricDoc = metric(
    "agentguard_map_capacity",
    GaugeKind,
    &[label("map", "name of the kernel map")],
    "Entries that a kernel map has room for.",
);
const AUDIT_RECORDS: MetricDoc = metric(
    "agentguard_audit_records_total",
    Counter,
    &[label("outcome", "`written`, or `lost` for want of room in front of the log")],
    "Records of the audit log.",
);
const AUDIT_BYTES: MetricDoc =
    metric("agentguard_audit_written_bytes_total", Counter, &[], "Bytes written to the audit log.");
const AUDIT_FAILURES: MetricDoc = metric(
    "agentguard_audit_write_failures_total",
    Counter,
    &[],
    "Writes to the audit log that failed; each is tried again.",
);
const AUDIT_FAILING: MetricDoc =
    metric("agentguard_audit_failing", GaugeKind, &[], "1 while the audit log can not be written.");
const AUDIT_ROTATIONS: MetricDoc = metric(
    "agentguard_audit_rotations_total",
    Counter,
    &[],
    "Files of the audit log begun after the first.",
);
const API_REQUESTS: MetricDoc = metric(
    "agentguard_api_requests_total",
    Counter,
    &[label("route", "the route, not the path"), label("status", "HTTP status code")],
    "Requests to the control API.",
);
const BUILD_INFO: MetricDoc = metric(
    "agentguard_build_info",
    GaugeKind,
    &[label("version", "version of the daemon"), label("revision", "commit it was built from")],
    "Always 1.",
);
const START_TIME: MetricDoc = metric(
    "agentguard_start_time_seconds",
    GaugeKind,
    &[],
    "When the daemon started, in seconds since 1970.",
);

/// Every metric, in the order of the reference.
const ALL: [MetricDoc; 25] = [
    VERDICTS,
    EVENTS,
    IDENTITIES_OTHER,
    PROTECTION,
    WORKLOAD_PROTECTION,
    WORKLOADS,
    GRANTS,
    ALLOWLIST_ENTRIES,
    GENERATION,
    RECONCILE_DURATION,
    RECONCILE_FAILURES,
    LOAD_DURATION,
    MANIFEST_ERRORS,
    CLUSTER_LEFT_OUT,
    NRI_CONNECTED,
    MAP_ENTRIES,
    MAP_CAPACITY,
    AUDIT_RECORDS,
    AUDIT_BYTES,
    AUDIT_FAILURES,
    AUDIT_FAILING,
    AUDIT_ROTATIONS,
    API_REQUESTS,
    BUILD_INFO,
    START_TIME,
];

/// Every metric that [`Metrics`] can have, for the reference.
#[must_use]
pub fn describe() -> Vec<MetricDoc> {
    ALL.to_vec()
}

/// Upper bounds of the buckets for durations, in seconds.
const SECONDS: [f64; 12] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// How much of the promise is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protection {
    Full,
    Partial,
    None,
}

impl Protection {
    const ALL: [Self; 3] = [Self::Full, Self::Partial, Self::None];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Partial => "partial",
            Self::None => "none",
        }
    }
}

/// How many grants are in which state; each grant is in one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrantCounts {
    pub pending: u64,
    /// Active, with an end.
    pub active: u64,
    /// Active without end.
    pub standing: u64,
    pub expired: u64,
    pub revoked: u64,
}

/// What became of audit records so far, in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuditTotals {
    pub written: u64,
    pub lost: u64,
    pub bytes: u64,
    pub write_failures: u64,
    pub rotations: u64,
    pub failing: bool,
}

/// A row of the kernel's counters.
#[derive(Clone, Copy, Debug)]
pub struct VerdictRow<'a> {
    /// Whose it is (SPIFFE ID); `None` for the kernel's own row of those without one.
    pub identity: Option<&'a str>,
    /// The totals as the kernel holds them, summed over CPUs.
    pub counters: &'a Counters,
}

/// A metric that can not be made; only a mistake in the table of this module leads to it.
#[derive(Debug, thiserror::Error)]
#[error("a metric of agentguard's own is not valid: {0}; please report this")]
pub struct MetricsError(#[from] prometheus::Error);

/// All metrics of the daemon.
pub struct Metrics {
    registry: Registry,
    verdicts: IntCounterVec,
    events: IntCounterVec,
    identities_other: IntGauge,
    protection: IntGaugeVec,
    workload_protection: IntGaugeVec,
    workloads: IntGaugeVec,
    grants: IntGaugeVec,
    allowlist_entries: IntGauge,
    generation: IntGauge,
    reconcile_duration: Histogram,
    reconcile_failures: IntCounter,
    load_duration: Histogram,
    manifest_errors: IntGauge,
    cluster_left_out: IntGauge,
    nri_connected: IntGauge,
    map_entries: IntGaugeVec,
    map_capacity: IntGaugeVec,
    audit_records: IntCounterVec,
    audit_bytes: IntCounter,
    audit_failures: IntCounter,
    audit_failing: IntGauge,
    audit_rotations: IntCounter,
    api_requests: IntCounterVec,
    build_info: IntGaugeVec,
    start_time: Gauge,
    rows: Mutex<Rows>,
}

/// What the kernel's totals were when they were last read.
struct Rows {
    labels: IdentityLabels,
    seen: HashMap<Option<String>, Seen>,
    audit: AuditTotals,
    /// Labels of identities whose workloads have series.
    protected: BTreeSet<String>,
}

/// One row as it was last read: its cells that are not zero.
#[derive(Default)]
struct Seen {
    cells: HashMap<usize, u64>,
}

impl Seen {
    /// Whether a total fell, so that the row was begun anew since.
    fn was_reset(&self, now: &Counters) -> bool {
        self.cells.iter().any(|(cell, seen)| now.cells[*cell] < *seen)
    }
}

impl Metrics {
    /// Makes all metrics; at most `max_identities` workload identities get a label of their own.
    ///
    /// # Errors
    /// Never, unless this module is wrong.
    pub fn new(max_identities: usize) -> Result<Self, MetricsError> {
        let registry = Registry::new();
        let metrics = Self {
            verdicts: counters(&registry, &VERDICTS)?,
            events: counters(&registry, &EVENTS)?,
            identities_other: gauge(&registry, &IDENTITIES_OTHER)?,
            protection: gauges(&registry, &PROTECTION)?,
            workload_protection: gauges(&registry, &WORKLOAD_PROTECTION)?,
            workloads: gauges(&registry, &WORKLOADS)?,
            grants: gauges(&registry, &GRANTS)?,
            allowlist_entries: gauge(&registry, &ALLOWLIST_ENTRIES)?,
            generation: gauge(&registry, &GENERATION)?,
            reconcile_duration: histogram(&registry, &RECONCILE_DURATION)?,
            reconcile_failures: counter(&registry, &RECONCILE_FAILURES)?,
            load_duration: histogram(&registry, &LOAD_DURATION)?,
            manifest_errors: gauge(&registry, &MANIFEST_ERRORS)?,
            cluster_left_out: gauge(&registry, &CLUSTER_LEFT_OUT)?,
            nri_connected: gauge(&registry, &NRI_CONNECTED)?,
            map_entries: gauges(&registry, &MAP_ENTRIES)?,
            map_capacity: gauges(&registry, &MAP_CAPACITY)?,
            audit_records: counters(&registry, &AUDIT_RECORDS)?,
            audit_bytes: counter(&registry, &AUDIT_BYTES)?,
            audit_failures: counter(&registry, &AUDIT_FAILURES)?,
            audit_failing: gauge(&registry, &AUDIT_FAILING)?,
            audit_rotations: counter(&registry, &AUDIT_ROTATIONS)?,
            api_requests: counters(&registry, &API_REQUESTS)?,
            build_info: gauges(&registry, &BUILD_INFO)?,
            start_time: register(&registry, Gauge::new(START_TIME.name, START_TIME.help)?)?,
            rows: Mutex::new(Rows {
                labels: IdentityLabels::new(max_identities),
                seen: HashMap::new(),
                audit: AuditTotals::default(),
                protected: BTreeSet::new(),
            }),
            registry,
        };
        // Alerts need these to be there before the first loss.
        for fate in Fate::ALL {
            metrics.events.with_label_values(&[fate.as_str()]);
        }
        for outcome in ["written", "lost"] {
            metrics.audit_records.with_label_values(&[outcome]);
        }
        metrics.set_grants(GrantCounts::default());
        metrics.set_workloads(&[]);
        Ok(metrics)
    }

    /// Takes over the kernel's totals of verdicts, one row for every identity there is.
    ///
    /// A row that fell was begun anew, as when the tables were made afresh: what it holds now is
    /// added to what was shown before. The series of identities without a row are removed; their
    /// label is free for another.
    pub fn set_verdicts(&self, rows: &[VerdictRow<'_>]) {
        let mut state = self.rows();
        let Rows { labels, seen, .. } = &mut *state;
        let gone = labels.retain(rows.iter().filter_map(|row| row.identity));
        for (identity, label) in gone {
            if let (Some(label), Some(seen)) = (label, seen.remove(&Some(identity))) {
                for cell in seen.cells.into_keys() {
                    if let Some(labels) = cell_labels(cell) {
                        let [hook, verdict, reason, mode] = labels.verdict;
                        // A series that is not there needs no removal.
                        let _ = self
                            .verdicts
                            .remove_label_values(&[hook, verdict, reason, mode, &label]);
                    }
                }
            }
        }
        for VerdictRow { identity, counters } in rows {
            let label = identity.map_or(labels::OTHER, |identity| labels.label(identity));
            let before = seen.entry(identity.map(str::to_owned)).or_default();
            if before.was_reset(counters) {
                before.forget_totals();
            }
            for (cell, total) in counters.cells.iter().enumerate().filter(|(_, total)| **total > 0)
            {
                let Some(CellLabels { verdict: [hook, verdict, reason, mode], fate }) =
                    cell_labels(cell)
                else {
                    continue;
                };
                let last = before.cells.entry(cell).or_default();
                let more = total - *last;
                self.verdicts.with_label_values(&[hook, verdict, reason, mode, label]).inc_by(more);
                self.events.with_label_values(&[fate]).inc_by(more);
                *last = *total;
            }
        }
    }

    /// How many identities have no row of counters of their own in the kernel; to be called after
    /// [`Self::set_verdicts`], which says of those that have one who has a label.
    pub fn set_without_row(&self, identities: usize) {
        let unlabelled = self.rows().labels.unlabelled();
        self.identities_other.set((identities + unlabelled) as i64);
    }

    /// What a layer can enforce on this kernel.
    pub fn set_protection(&self, layer: Layer, protection: Protection) {
        for each in Protection::ALL {
            self.protection
                .with_label_values(&[layer.as_str(), each.as_str()])
                .set(i64::from(each == protection));
        }
    }

    /// How many workloads of each identity a layer holds how far; what is not named counts zero. To be
    /// called after [`Self::set_verdicts`], which says who has a label of its own.
    pub fn set_workload_protection(&self, counts: &[(Layer, Protection, &str, u64)]) {
        let mut state = self.rows();
        let mut held: BTreeMap<(&str, Layer, Protection), u64> = BTreeMap::new();
        for (layer, protection, identity, count) in counts {
            let label = state.labels.known(identity);
            *held.entry((label, *layer, *protection)).or_default() += count;
        }
        let now: BTreeSet<String> = held.keys().map(|(label, ..)| (*label).to_owned()).collect();
        let each = || Layer::ALL.into_iter().flat_map(|l| Protection::ALL.map(|p| (l, p)));
        for label in &now {
            for (layer, protection) in each() {
                let count = held.get(&(label.as_str(), layer, protection)).copied();
                self.workload_protection
                    .with_label_values(&[layer.as_str(), protection.as_str(), label])
                    .set(count.unwrap_or_default() as i64);
            }
        }
        for label in state.protected.difference(&now) {
            for (layer, protection) in each() {
                // A series that is not there needs no removal.
                let _ = self.workload_protection.remove_label_values(&[
                    layer.as_str(),
                    protection.as_str(),
                    label,
                ]);
            }
        }
        state.protected = now;
    }

    /// All workloads by mode and protection; those that are not named count zero.
    pub fn set_workloads(&self, counts: &[(Mode, Protection, u64)]) {
        for mode in Mode::ALL {
            for protection in Protection::ALL {
                let count: u64 = counts
                    .iter()
                    .filter(|(m, p, _)| (*m, *p) == (mode, protection))
                    .map(|(.., count)| count)
                    .sum();
                self.workloads
                    .with_label_values(&[mode.as_str(), protection.as_str()])
                    .set(count as i64);
            }
        }
    }

    /// All grants by state.
    pub fn set_grants(&self, counts: GrantCounts) {
        let GrantCounts { pending, active, standing, expired, revoked } = counts;
        for (state, count) in [
            ("pending", pending),
            ("active", active),
            ("standing", standing),
            ("expired", expired),
            ("revoked", revoked),
        ] {
            self.grants.with_label_values(&[state]).set(count as i64);
        }
    }

    /// What is in the kernel now.
    pub fn set_allowlist(&self, generation: u64, entries: u64) {
        self.generation.set(generation as i64);
        self.allowlist_entries.set(entries as i64);
    }

    /// A change was brought into the kernel.
    pub fn reconciled(&self, took: Duration) {
        self.reconcile_duration.observe(took.as_secs_f64());
    }

    /// A change could not be brought into the kernel.
    pub fn reconcile_failed(&self) {
        self.reconcile_failures.inc();
    }

    /// The kernel half was loaded or adopted.
    pub fn loaded(&self, took: Duration) {
        self.load_duration.observe(took.as_secs_f64());
    }

    /// Whether the container runtime waits for the daemon.
    pub fn set_nri_connected(&self, is_connected: bool) {
        self.nri_connected.set(i64::from(is_connected));
    }

    /// How many manifests are refused now.
    pub fn set_manifest_errors(&self, count: u64) {
        self.manifest_errors.set(count as i64);
    }

    /// How many objects of the cluster found no room.
    pub fn set_cluster_left_out(&self, count: u64) {
        self.cluster_left_out.set(count as i64);
    }

    /// How full a kernel map is. Its name is one of the program's own.
    pub fn set_map(&self, map: &'static str, entries: u64, capacity: u64) {
        self.map_entries.with_label_values(&[map]).set(entries as i64);
        self.map_capacity.with_label_values(&[map]).set(capacity as i64);
    }

    /// Takes over the totals of the audit log.
    pub fn set_audit(&self, totals: AuditTotals) {
        let mut state = self.rows();
        let last = std::mem::replace(&mut state.audit, totals);
        let AuditTotals { written, lost, bytes, write_failures, rotations, failing } = totals;
        let records = |outcome| self.audit_records.with_label_values(&[outcome]);
        records("written").inc_by(written.saturating_sub(last.written));
        records("lost").inc_by(lost.saturating_sub(last.lost));
        self.audit_bytes.inc_by(bytes.saturating_sub(last.bytes));
        self.audit_failures.inc_by(write_failures.saturating_sub(last.write_failures));
        self.audit_rotations.inc_by(rotations.saturating_sub(last.rotations));
        self.audit_failing.set(i64::from(failing));
    }

    /// The control API answered. The route is one of the program's own, never the path.
    pub fn api_answered(&self, route: &'static str, status: u16) {
        self.api_requests.with_label_values(&[route, &status.to_string()]).inc();
    }

    /// What runs, and since when, in seconds since 1970.
    pub fn started(&self, version: &'static str, revision: &'static str, at: f64) {
        self.build_info.with_label_values(&[version, revision]).set(1);
        self.start_time.set(at);
    }

    /// All metrics in Prometheus' text format (see [`CONTENT_TYPE`]).
    ///
    /// # Errors
    /// Never, unless this module is wrong.
    pub fn render(&self) -> Result<String, MetricsError> {
        Ok(TextEncoder::new().encode_to_string(&self.registry.gather())?)
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        // Nothing panics while it holds the lock and leaves the rows half changed.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    /// Takes all totals for zero, and still knows which series there are.
    fn forget_totals(&mut self) {
        self.cells.values_mut().for_each(|total| *total = 0);
    }
}

/// The labels of a cell.
#[derive(Debug, PartialEq, Eq)]
struct CellLabels {
    /// Hook, verdict, reason, mode.
    verdict: [&'static str; 4],
    fate: &'static str,
}

fn cell_labels(cell: usize) -> Option<CellLabels> {
    let (hook, mode, verdict, fate) = Counters::counted_in(cell)?;
    let reason = verdict.reason().map_or("none", Reason::as_str);
    let verdict = [hook.as_str(), verdict.as_str(), reason, mode.as_str()];
    Some(CellLabels { verdict, fate: fate.as_str() })
}

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> Result<C, MetricsError> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn label_names(doc: &MetricDoc) -> Vec<&'static str> {
    doc.labels.iter().map(|label| label.name).collect()
}

fn counter(registry: &Registry, doc: &MetricDoc) -> Result<IntCounter, MetricsError> {
    register(registry, IntCounter::new(doc.name, doc.help)?)
}

fn counters(registry: &Registry, doc: &MetricDoc) -> Result<IntCounterVec, MetricsError> {
    register(registry, IntCounterVec::new(Opts::new(doc.name, doc.help), &label_names(doc))?)
}

fn gauge(registry: &Registry, doc: &MetricDoc) -> Result<IntGauge, MetricsError> {
    register(registry, IntGauge::new(doc.name, doc.help)?)
}

fn gauges(registry: &Registry, doc: &MetricDoc) -> Result<IntGaugeVec, MetricsError> {
    register(registry, IntGaugeVec::new(Opts::new(doc.name, doc.help), &label_names(doc))?)
}

fn histogram(registry: &Registry, doc: &MetricDoc) -> Result<Histogram, MetricsError> {
    let options = HistogramOpts::new(doc.name, doc.help).buckets(SECONDS.to_vec());
    register(registry, Histogram::with_opts(options)?)
}

#[cfg(test)]
mod deployed;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::Write;
    use std::process::{Command, Stdio};

    use agentguard_common::Verdict;
    use agentguard_common::event::Hook;

    use super::*;

    const ALLOW: Verdict = Verdict::Allow;
    const DENY: Verdict = Verdict::Deny(Reason::NotGranted);

    fn counters_of(counts: &[(Hook, Mode, Verdict, u64)]) -> Counters {
        let mut counters = Counters::ZERO;
        for (hook, mode, verdict, count) in counts {
            counters.cells[Counters::cell(*hook, *mode, *verdict, Fate::Logged)] = *count;
        }
        counters
    }

    fn connects(count: u64) -> Counters {
        counters_of(&[(Hook::Connect4, Mode::Enforce, DENY, count)])
    }

    fn row<'a>(identity: &'a str, counters: &'a Counters) -> VerdictRow<'a> {
        VerdictRow { identity: Some(identity), counters }
    }

    /// The value of the one series whose line has all of `parts`.
    fn value(metrics: &Metrics, parts: &[&str]) -> Option<f64> {
        let text = metrics.render().unwrap();
        let mut lines = text
            .lines()
            .filter(|line| !line.starts_with('#') && parts.iter().all(|part| line.contains(part)));
        let line = lines.next()?;
        assert_eq!(lines.next(), None, "more than one series has {parts:?}");
        line.rsplit(' ').next().map(|value| value.parse().unwrap())
    }

    fn filled() -> Metrics {
        let metrics = Metrics::new(128).unwrap();
        let git = counters_of(&[
            (Hook::Connect4, Mode::Enforce, ALLOW, 7),
            (Hook::Connect6, Mode::Audit, DENY, 2),
            (Hook::Exec, Mode::Enforce, Verdict::Deny(Reason::UnnamedFile), 1),
        ]);
        metrics.set_verdicts(&[
            row("spiffe://example.org/git", &git),
            VerdictRow { identity: None, counters: &connects(3) },
        ]);
        metrics.set_protection(Layer::Portable, Protection::Full);
        metrics.set_protection(Layer::Lsm, Protection::None);
        let (git, new) = ("spiffe://example.org/git", "spiffe://example.org/new");
        metrics.set_workload_protection(&[
            (Layer::Portable, Protection::Full, git, 1),
            (Layer::Portable, Protection::Full, git, 1),
            (Layer::Portable, Protection::Partial, git, 1),
            (Layer::Lsm, Protection::None, git, 3),
            (Layer::Portable, Protection::Full, new, 3),
        ]);
        metrics.set_workloads(&[(Mode::Enforce, Protection::Partial, 4)]);
        metrics.set_grants(GrantCounts { active: 2, standing: 1, ..GrantCounts::default() });
        metrics.set_allowlist(9, 120);
        metrics.reconciled(Duration::from_millis(3));
        metrics.reconcile_failed();
        metrics.loaded(Duration::from_millis(400));
        metrics.set_manifest_errors(1);
        metrics.set_cluster_left_out(2);
        metrics.set_nri_connected(true);
        metrics.set_map("DESTINATIONS", 10, 65_536);
        metrics.set_audit(AuditTotals { written: 5, bytes: 4000, ..AuditTotals::default() });
        metrics.api_answered("/v1/grants/{name}", 404);
        metrics.started("0.1.0", "0123abc", 1.7e9);
        metrics
    }

    #[test]
    fn promtool_finds_nothing_to_complain_about() {
        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool is needed: apt-get install -y --no-install-recommends prometheus");
        let text = filled().render().unwrap();
        promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
    }

    #[test]
    fn the_reference_names_what_is_rendered_and_nothing_else() {
        let text = filled().render().unwrap();
        let rendered: BTreeSet<(&str, &str)> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
        let described: BTreeSet<(&str, &str)> =
            ALL.iter().map(|doc| (doc.name, doc.kind.as_str())).collect();
        assert_eq!(rendered, described);
    }

    #[test]
    fn verdicts_are_shown_by_hook_verdict_reason_mode_and_identity() {
        let metrics = filled();
        let git = "identity=\"spiffe://example.org/git\"";
        for (parts, count) in [
            (vec![git, "cgroup/connect4", "verdict=\"allow\"", "reason=\"none\""], 7.0),
            (vec![git, "cgroup/connect6", "reason=\"not_granted\"", "mode=\"audit\""], 2.0),
            (vec![git, "sched_process_exec", "reason=\"unnamed_file\""], 1.0),
            (vec!["identity=\"other\"", "cgroup/connect4"], 3.0),
            (vec!["agentguard_events_total", "logged"], 13.0),
            (vec!["agentguard_events_total", "lost"], 0.0),
            (vec!["agentguard_protection{", "lsm", "none"], 1.0),
            (vec!["agentguard_protection{", "lsm", "full"], 0.0),
            (vec!["workload_protection{", git, "portable", "full"], 2.0),
            (vec!["workload_protection{", git, "portable", "partial"], 1.0),
            (vec!["workload_protection{", git, "portable", "none"], 0.0),
            (vec!["workload_protection{", git, "lsm", "none"], 3.0),
            (vec!["workload_protection{", "identity=\"other\"", "portable", "full"], 3.0),
            (vec!["agentguard_grants{", "standing"], 1.0),
        ] {
            assert_eq!(value(&metrics, &parts), Some(count), "{parts:?}");
        }
    }

    #[test]
    fn totals_are_neither_counted_twice_nor_lost_when_a_row_begins_anew() {
        let metrics = Metrics::new(8).unwrap();
        for (total, shown) in [(5, 5.0), (5, 5.0), (9, 9.0), (2, 11.0), (3, 12.0)] {
            metrics.set_verdicts(&[row("spiffe://a/b", &connects(total))]);
            assert_eq!(value(&metrics, &["spiffe://a/b"]), Some(shown));
            assert_eq!(value(&metrics, &["events_total", "logged"]), Some(shown));
        }
        // A cell that fell shows that the whole row is new, also where others rose.
        let both = |four, six| {
            counters_of(&[
                (Hook::Connect4, Mode::Enforce, DENY, four),
                (Hook::Connect6, Mode::Enforce, DENY, six),
            ])
        };
        metrics.set_verdicts(&[row("spiffe://c/d", &both(10, 1))]);
        metrics.set_verdicts(&[row("spiffe://c/d", &both(2, 4))]);
        assert_eq!(value(&metrics, &["spiffe://c/d", "connect4"]), Some(12.0));
        assert_eq!(value(&metrics, &["spiffe://c/d", "connect6"]), Some(5.0));
    }

    #[test]
    fn series_of_an_identity_that_is_gone_are_removed_and_its_label_is_free() {
        let metrics = Metrics::new(1).unwrap();
        let (a, b) = (connects(5), connects(7));
        metrics.set_verdicts(&[row("spiffe://t/a", &a), row("spiffe://t/b", &b)]);
        assert_eq!(value(&metrics, &["spiffe://t/a"]), Some(5.0));
        assert_eq!(value(&metrics, &["identity=\"other\""]), Some(7.0));
        metrics.set_without_row(2);
        assert_eq!(value(&metrics, &["identities_unlabelled"]), Some(3.0));
        metrics.set_verdicts(&[row("spiffe://t/b", &connects(8))]);
        metrics.set_without_row(0);
        assert_eq!(value(&metrics, &["spiffe://t/a"]), None);
        assert_eq!(value(&metrics, &["identity=\"other\""]), Some(7.0));
        assert_eq!(value(&metrics, &["spiffe://t/b"]), Some(1.0));
        assert_eq!(value(&metrics, &["identities_unlabelled"]), Some(0.0));
    }

    #[test]
    fn series_of_identities_without_workloads_are_removed() {
        let metrics = Metrics::new(1).unwrap();
        let counters = connects(1);
        metrics.set_verdicts(&[row("spiffe://t/a", &counters), row("spiffe://t/b", &counters)]);
        let set = |identities: &[(&str, u64)]| {
            let of_lsm =
                |(identity, count): &(_, u64)| (Layer::Lsm, Protection::Partial, *identity, *count);
            metrics.set_workload_protection(&identities.iter().map(of_lsm).collect::<Vec<_>>());
        };
        let value = |label| value(&metrics, &["workload_protection{", label, "lsm", "partial"]);
        set(&[("spiffe://t/a", 1), ("spiffe://t/b", 2), ("spiffe://t/c", 3)]);
        assert_eq!((value("spiffe://t/a"), value("other")), (Some(1.0), Some(5.0)));
        set(&[("spiffe://t/c", 3)]);
        assert_eq!((value("spiffe://t/a"), value("other")), (None, Some(3.0)));
        set(&[]);
        assert_eq!((value("spiffe://t/a"), value("other")), (None, None));
    }

    #[test]
    fn a_hundred_thousand_identities_make_no_more_series_than_the_bound() {
        let bound = 128;
        let metrics = Metrics::new(bound).unwrap();
        let counters = counters_of(&[
            (Hook::Connect4, Mode::Enforce, ALLOW, 1),
            (Hook::Connect4, Mode::Enforce, DENY, 1),
        ]);
        let names: Vec<String> =
            (0..100_000).map(|number| format!("spiffe://t/agent-{number}")).collect();
        // At once, and then coming and going.
        let rows: Vec<VerdictRow<'_>> = names.iter().map(|name| row(name, &counters)).collect();
        let series = |text: &str| {
            text.lines().filter(|line| line.starts_with("agentguard_verdicts_total")).count()
        };
        metrics.set_verdicts(&rows);
        let text = metrics.render().unwrap();
        assert_eq!(series(&text), (bound + 1) * 2);
        assert_eq!(
            value(&metrics, &["identity=\"other\"", "verdict=\"allow\""]),
            Some((names.len() - bound) as f64)
        );
        for rows in rows.chunks(1000) {
            metrics.set_verdicts(rows);
            assert!(series(&metrics.render().unwrap()) <= (bound + 1) * 2);
        }
        assert!(metrics.render().unwrap().len() < 200_000);
        metrics.set_verdicts(&[]);
        assert_eq!(series(&metrics.render().unwrap()), 2, "only `other` is left");
        assert!(metrics.rows().seen.is_empty());
    }

    #[test]
    fn every_cell_knows_its_labels() {
        for hook in Hook::ALL {
            for mode in Mode::ALL {
                let labels = cell_labels(Counters::cell(hook, mode, DENY, Fate::Lost));
                let verdict = [hook.as_str(), "deny", "not_granted", mode.as_str()];
                assert_eq!(labels, Some(CellLabels { verdict, fate: "lost" }));
            }
        }
    }

    #[test]
    fn no_metric_has_a_label_that_workloads_can_choose_freely() {
        for doc in describe() {
            for label in doc.labels {
                let free = ["address", "ip", "port", "path", "pid", "uid", "pod", "container"];
                assert!(!free.contains(&label.name), "{} has {}", doc.name, label.name);
            }
        }
    }
}
