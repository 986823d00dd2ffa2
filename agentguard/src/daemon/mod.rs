//! The composition root: puts the parts together and keeps them running.
//!
//! Order of a start: kernel half (loaded or adopted), what an earlier daemon left, manifests,
//! identity sources, then the control socket. A daemon that stops takes nothing with it: what it
//! put in force stays, until `agentguard uninstall`.

mod cluster;
pub mod confine;
mod container_files;
mod containers;
mod custom_resources;
pub mod doctor;
pub mod engine;
mod host;
mod last_good;
mod launch;
mod lock;
mod losses;
mod manifests;
mod names;
mod nri;
mod privileges;
mod recent;
mod service;
mod standalone;
mod state;
mod supervisor;
mod uninstall;
mod unix_names;
mod witness;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agentguard_common::Layer;
use agentguard_common::abi::Settings;
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

pub use self::service::protection_view;
pub use self::standalone::{Ended, LAUNCH, exec_standalone, launch};
pub use self::uninstall::uninstall;

use self::containers::Containers;
use self::engine::{Cgroups, Engine, missing_of, protection_of};
use self::lock::Locks;
use self::names::Names;
use self::service::{Daemon, Shared};
use self::witness::{Denials, Witness};
use crate::api::server::{self, BindError, Limits};
use crate::audit::record::{LayerProtection, RecordBody, StartRecord, StopRecord};
use crate::audit::text::Text;
use crate::audit::{AuditLog, OpenError, PATIENCE, record};
use crate::config::value::Listen;
use crate::config::{Configuration, HostError, Require};
use crate::datapath::{Datapath, LoadError, Options, Protection, Sizes};
use crate::fault;
use crate::grant::clock::{Clock, ClockError};
use crate::identity::cgroup::CgroupSource;
use crate::metrics::{Metrics, MetricsError};
use crate::runtimes::RuntimeError;

/// How often what is due is looked for; what the kernel ends by itself does not wait for it.
const TICK: Duration = Duration::from_millis(200);

/// The daemon does not start, or breaks off.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Audit(#[from] OpenError),
    #[error(transparent)]
    State(#[from] state::StateError),
    #[error(transparent)]
    Clock(#[from] ClockError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("{address} can not be listened on: {source}; set metrics.listen")]
    Listen { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Lock(#[from] lock::LockError),
    #[error(transparent)]
    ContainerRuntime(#[from] RuntimeError),
    #[error("the directory {path} can not be made: {source}")]
    Directory { path: PathBuf, source: io::Error },
    #[error(
        "this kernel does not give what `require: {require}` asks for: {missing}; see agentguard doctor, or require less"
    )]
    NotEnough { require: &'static str, missing: String },
    #[error(
        "{path} is on no BPF file system of the host's, so that protection would end with this container; mount one on the node (mount -t bpf bpf /sys/fs/bpf) and give the container that directory"
    )]
    OwnPins { path: PathBuf },
    #[error("the runtime can not be set up: {0}")]
    Runtime(io::Error),
    #[error(
        "a part of the daemon broke off: {0}; it ends, to be started again by what started it (systemd, kubelet), and what is in force stays in force; see the log, and report it"
    )]
    BrokeOff(String),
    #[error("this needs root: run it with sudo, or as a system service")]
    NotRoot,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
///
/// Why it did not start.
pub fn run(configuration: Configuration) -> Result<(), DaemonError> {
    require_root()?;
    host::see_cgroups();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(DaemonError::Runtime)?;
    runtime.block_on(serve(configuration))
}

fn require_root() -> Result<(), DaemonError> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(DaemonError::NotRoot) }
}

async fn serve(configuration: Configuration) -> Result<(), DaemonError> {
    let started = Instant::now();
    let node = configuration.node_name()?.to_string();
    let watches = cluster::begin(&configuration, node).await;
    let parts = set_up(configuration, watches.as_ref(), started)?;
    let Parts { shared, sources, witness, stop, lines, _locks } = parts;
    let cancel = CancellationToken::new();
    let socket = server::bind(shared.configuration.api.socket.as_ref())?;
    let tcp = match shared.configuration.metrics.listen {
        Listen::Off => None,
        Listen::At(address) => Some(
            TcpListener::bind(address)
                .await
                .map_err(|source| DaemonError::Listen { address, source })?,
        ),
    };
    let daemon = Arc::new(Daemon(Arc::clone(&shared)));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(outlive_file_limits());
    if let Some(denials) = watches.as_ref().and_then(|watches| watches.denials.clone()) {
        tasks.spawn(cluster::tell_pods(denials, lines.resubscribe()));
    }
    tasks.spawn(keep_recent(Arc::clone(&shared), lines));
    tasks.spawn(tick(Arc::clone(&shared)));
    tasks.spawn(manifests::watch(Arc::clone(&shared), sources));
    tasks.spawn(containers::watch(Arc::clone(&shared)));
    if let Some(watches) = watches {
        tasks.spawn(cluster::report(Arc::clone(&shared), Arc::clone(&watches.objects)));
        tasks.spawn(cluster::follow(Arc::clone(&shared), watches));
    }
    containers::follow_runtimes(&shared, &mut tasks)?;
    nri::follow_runtime(&shared, &mut tasks);
    let mut servers = tokio::task::JoinSet::new();
    servers.spawn(server::serve_control(
        socket,
        Arc::clone(&daemon),
        Limits::default(),
        cancel.clone(),
    ));
    if let Some(tcp) = tcp {
        servers.spawn(server::serve_metrics(tcp, daemon, Limits::default(), cancel.clone()));
    }
    fault::point("start.listening");
    shared.ready.store(true, Ordering::Release);
    tracing::info!(
        milliseconds = started.elapsed().as_millis() as u64,
        socket = %shared.configuration.api.socket,
        "ready"
    );
    supervisor::ready();
    let (why, ended) = tokio::select! {
        why = stopped() => (why, Ok(())),
        what = broke_off(&mut tasks) => ("a part broke off", Err(DaemonError::BrokeOff(what))),
    };
    tracing::info!(why, "stopping; what is in force stays in force");
    supervisor::stopping();
    cancel.cancel();
    while servers.join_next().await.is_some() {}
    tasks.shutdown().await;
    stop.store(true, Ordering::Release);
    end_witness(witness).await;
    shared.engine().look_for_losses();
    if let Err(error) = shared.audit.flush().await {
        tracing::error!(%error, "the last audit records are not written yet");
    }
    shared.engine().note_losses_written();
    save(&shared);
    shared
        .audit
        .append(RecordBody::Stop(StopRecord { why: Text::new(why), protection_stays: true }));
    if let Err(error) = shared.audit.close().await {
        tracing::error!(%error, "the last audit records may not be written");
    }
    ended
}

/// Waits until one of the daemon's parts panics. Without it the rest would go on by what it said at
/// last, as if nothing changed any more. One that ends otherwise has nothing left to do.
async fn broke_off(tasks: &mut tokio::task::JoinSet<()>) -> String {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            return error.to_string();
        }
    }
    std::future::pending().await
}

/// What runs once everything is in force.
struct Parts {
    shared: Arc<Shared>,
    sources: manifests::Sources,
    witness: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    /// Every line of the audit log since the start.
    lines: Lines,
    _locks: Locks,
}

type Lines = tokio::sync::broadcast::Receiver<Arc<str>>;

fn set_up(
    configuration: Configuration,
    watches: Option<&cluster::Watches>,
    started: Instant,
) -> Result<Parts, DaemonError> {
    for path in [&configuration.state_directory, &configuration.runtime_directory] {
        make_directory(path.as_ref(), 0o755)?;
    }
    let mut locks = Locks::default();
    locks.take(configuration.state_directory.as_ref())?;
    let pins: &Path = configuration.pin_directory.as_ref();
    if pins.exists() {
        locks.take(pins)?;
    }
    let node = configuration.node_name()?.to_string();
    let cgroups = Cgroups::of(&configuration)?;
    let metrics = Metrics::new(configuration.metrics.max_identities.get() as usize)?;
    metrics.started(
        env!("CARGO_PKG_VERSION"),
        option_env!("AGENTGUARD_REVISION").unwrap_or("unknown"),
        Timestamp::now().as_second() as f64,
    );
    if !host::keeps_pins(pins) {
        return Err(DaemonError::OwnPins { path: pins.to_owned() });
    }
    let load = Instant::now();
    let datapath = Datapath::open(&Options {
        pin_directory: configuration.pin_directory.to_path_buf(),
        sizes: sizes(&configuration),
        settings: settings(&configuration),
    })?;
    fault::point("start.opened");
    metrics.loaded(load.elapsed());
    if !locks.holds(pins) {
        locks.take(pins)?;
    }
    let datapath = check_required(configuration.require, datapath)?;
    let audit = AuditLog::open(configuration.audit.options(), &node)?;
    let saved = state::load(configuration.state_directory.as_ref())?;
    let names = Arc::new(Names::restore(saved.names.clone()));
    record_start(&audit, &datapath);
    let denials = Arc::new(Denials::default());
    let stop = Arc::new(AtomicBool::new(false));
    let clock = Clock::read()?;
    tell_kept_sizes(&datapath, &configuration);
    confine::remove_abandoned(&cgroups.exec_parent, &saved.exec_cgroups());
    let mut engine =
        Engine::new(datapath, cgroups, audit.clone(), Arc::clone(&names), clock, host::root());
    // Before the rings are read: what was recorded while no daemon was there has its names again.
    engine.restore(saved).map_err(|source| state::StateError::Grants {
        path: state::file(configuration.state_directory.as_ref()),
        source,
    })?;
    if let Some(watches) = watches {
        engine.take_cluster(watches.known.clone());
    }
    fault::point("start.restored");
    let lines = audit.subscribe();
    let witness = start_witness(&engine, &audit, &denials, &stop)?;
    pump_diagnostics(&mut engine, &stop);
    let shared = Arc::new(Shared {
        engine: Mutex::new(engine),
        node,
        metrics,
        audit,
        denials,
        recent: recent::Recent::default(),
        started,
        ready: AtomicBool::new(false),
        cluster: watches.map(cluster::Watches::health),
        saving: Mutex::new(None),
        containers: Arc::new(Containers::new(&configuration)),
        configuration,
    });
    if let Some(watches) = watches {
        watches.introduce(&shared.containers);
    }
    let custom_resources = watches.map(|watches| watches.custom_resources(&shared));
    containers::expect_runtimes(&shared.containers, &shared.configuration);
    let mut sources = manifests::Sources::new(&shared, custom_resources);
    manifests::load_documents(&shared, &mut sources);
    fault::point("start.manifests");
    {
        let mut engine = shared.engine();
        let is_whole = engine.resume();
        fault::point("start.resumed");
        engine.take_over(is_whole)?;
    }
    fault::point("start.others");
    containers::tell_runtimes(&shared);
    // Only now: what is new would be unknown to an earlier build in force.
    manifests::scan(&shared, &mut sources);
    manifests::let_go_unselected(&shared, &mut sources);
    save(&shared);
    fault::point("start.saved");
    Ok(Parts { shared, sources, witness, stop, lines, _locks: locks })
}

/// Starts the thread that reads the kernel's records.
fn start_witness(
    engine: &Engine,
    audit: &AuditLog,
    denials: &Arc<Denials>,
    stop: &Arc<AtomicBool>,
) -> Result<JoinHandle<()>, DaemonError> {
    let rings = engine.datapath.rings()?;
    let mut witness = Witness {
        names: Arc::clone(&engine.names),
        processes: engine.datapath.processes()?,
        audit: audit.clone(),
        denials: Arc::clone(denials),
        clock: engine.clock,
        may_have_lost: Arc::clone(&engine.may_have_lost),
        ends_others: engine.datapath.ends_others(),
        reads_procfs: host::has_the_machines_pids(),
    };
    let stop = Arc::clone(stop);
    std::thread::Builder::new()
        .name("witness".to_owned())
        .spawn(move || witness.run(rings, &stop))
        .map_err(DaemonError::Runtime)
}

/// Waits for the reader of records, but not for ever: what it writes to may be a pipe that nobody reads.
/// What it has not written is in the rings still, for as long as those are there.
async fn end_witness(witness: JoinHandle<()>) {
    let begin = Instant::now();
    while !witness.is_finished() {
        if begin.elapsed() > PATIENCE {
            tracing::error!(
                "the last records of the kernel are not in the audit log; see what blocks its output"
            );
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    if witness.join().is_err() {
        tracing::error!("the reader of records broke off");
    }
}

/// Hands what the kernel programs say of themselves to the log.
fn pump_diagnostics(engine: &mut Engine, stop: &Arc<AtomicBool>) {
    let Some(mut diagnostics) = engine.datapath.take_diagnostics() else { return };
    let stop = Arc::clone(stop);
    let pump = move || {
        while !stop.load(Ordering::Acquire) {
            if let Err(error) = diagnostics.pump(Duration::from_millis(500)) {
                tracing::error!(%error, "the datapath's diagnostics can not be read");
                return;
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("diagnostics".to_owned()).spawn(pump) {
        tracing::error!(%error, "the datapath's diagnostics are not read");
    }
}

/// Whether the kernel gives what is required of it; where it does not, nothing of this start is left.
/// What no kernel gives to this version is no reason: `status` says it.
fn check_required(require: Require, datapath: Datapath) -> Result<Datapath, DaemonError> {
    let (require, layers): (_, &[Layer]) = match require {
        Require::Full => ("full", &[Layer::Portable, Layer::Lsm]),
        Require::Portable => ("portable", &[Layer::Portable]),
        Require::None => ("none", &[]),
    };
    let missing = |layer: &Layer| Protection::missing_doors(datapath.states(), *layer);
    let missing: Vec<String> = layers.iter().flat_map(missing).collect();
    if missing.is_empty() {
        return Ok(datapath);
    }
    datapath.abandon()?;
    Err(DaemonError::NotEnough { require, missing: missing.join("; ") })
}

fn record_start(audit: &AuditLog, datapath: &Datapath) {
    let layer = |layer: Layer, word: record::Layer| {
        let states = datapath.states();
        let (protection, _) = protection_of(&Protection::of_layer(states, layer));
        // Also of a layer that is missing whole: why, hook by hook.
        let missing = Protection::missing_doors(states, layer);
        let missing = missing.iter().map(|what| missing_of(what)).collect();
        LayerProtection { layer: word, protection, missing }
    };
    let mut lsm = layer(Layer::Lsm, record::Layer::Lsm);
    // What no door closes is what the layers together leave open.
    lsm.missing.extend(datapath.gaps().iter().map(|gap| record::Missing {
        what: Text::new(gap),
        why: Text::new("open by the nature of the hooks in force"),
    }));
    let kernel = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    audit.append(RecordBody::Start(StartRecord {
        version: Text::new(env!("CARGO_PKG_VERSION")),
        kernel: Text::new(kernel),
        adopted: datapath.adopted(),
        protection: vec![layer(Layer::Portable, record::Layer::Portable), lsm],
    }));
}

/// Says which tables keep the size that an earlier start gave them.
fn tell_kept_sizes(datapath: &Datapath, configuration: &Configuration) {
    match datapath.kept_sizes(&sizes(configuration)) {
        Ok(kept) => {
            for (key, has, asked) in kept {
                tracing::warn!(
                    key,
                    has,
                    asked,
                    "a table keeps the size it was made with until agentguard uninstall"
                );
            }
        }
        Err(error) => tracing::error!(%error, "it is not known how large the tables are"),
    }
}

async fn stopped() -> &'static str {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return "signals can not be received";
    };
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// A file that may not grow is a failed write, and not the daemon's end, which the signal of the
/// limit is to a process that has no handler for it.
async fn outlive_file_limits() {
    let kind = SignalKind::from_raw(nix::sys::signal::Signal::SIGXFSZ as i32);
    let Ok(mut exceeded) = signal(kind) else { return };
    while exceeded.recv().await.is_some() {}
}

/// Looks for what is due, and saves what has changed.
async fn tick(shared: Arc<Shared>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let shared = Arc::clone(&shared);
        let ticked = tokio::task::spawn_blocking(move || {
            shared.engine().tick();
            save(&shared);
        });
        match ticked.await {
            Ok(()) => supervisor::alive(),
            Err(_panicked) => tracing::error!("what was due was not done; going on"),
        }
    }
}

fn save(shared: &Shared) {
    let mut failure = shared.saving.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(state) = shared.engine().take_changes() else { return };
    match state::save(shared.configuration.state_directory.as_ref(), &state) {
        Ok(()) => {
            if failure.take().is_some() {
                tracing::info!("a restart would know the latest changes again");
            }
        }
        Err(error) => {
            // It is tried again at every tick, and said once.
            if failure.is_none() {
                tracing::error!(%error, "a restart would not know the latest changes");
            }
            *failure = Some(error.to_string());
            shared.engine().mark_unsaved();
        }
    }
}

async fn keep_recent(shared: Arc<Shared>, mut lines: Lines) {
    use tokio::sync::broadcast::error::RecvError;
    loop {
        match lines.recv().await {
            Ok(line) => shared.recent.keep(line),
            Err(RecvError::Lagged(missed)) => {
                tracing::debug!(missed, "records are in the log, but not among the recent ones");
            }
            Err(RecvError::Closed) => return,
        }
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), DaemonError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|source| DaemonError::Directory { path: path.to_owned(), source })
}

/// The sizes of the kernel's tables.
pub(crate) fn sizes(configuration: &Configuration) -> Sizes {
    let datapath = &configuration.datapath;
    let maps = &datapath.maps;
    Sizes {
        workloads: maps.workloads.get(),
        cgroups: maps.cgroups.get(),
        destinations: maps.destinations.get(),
        rules: maps.rules.get(),
        executables: maps.executables.get(),
        unix_sockets: maps.unix_sockets.get(),
        unix_names: maps.unix_names.get(),
        tasks: maps.tasks.get(),
        verdicts: maps.verdict_cache.get(),
        counters: configuration.metrics.max_identities.get() + 1,
        denied_ring: datapath.denied_ring_bytes.get(),
        allowed_ring: datapath.events_ring_bytes.get(),
    }
}

pub(crate) fn settings(configuration: &Configuration) -> Settings {
    let window = configuration.datapath.aggregation_window.get();
    Settings {
        aggregation_window: u64::try_from(window.as_nanos()).unwrap_or(u64::MAX),
        diagnostics: 0,
        reserved: 0,
    }
}

/// Where a standalone `exec` keeps its pins, beside those of a daemon.
pub(crate) fn standalone_pins(configuration: &Configuration, pid: u32) -> PathBuf {
    let mut name = configuration.pin_directory.to_path_buf().into_os_string();
    name.push(format!("-exec-{pid}"));
    name.into()
}

pub(crate) use crate::datapath::uninstall as remove_pins;

/// The source of workloads that `Workload` manifests select.
pub(crate) fn cgroup_source(shared: &Shared) -> CgroupSource {
    CgroupSource::new(shared.engine().cgroup_root().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_breaks_off_is_told_from_one_that_is_done() {
        let patience = Duration::from_millis(100);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async {});
        let goes_on = tokio::time::timeout(patience, broke_off(&mut tasks)).await;
        assert!(goes_on.is_err(), "{goes_on:?}");
        tasks.spawn(std::future::pending());
        tasks.spawn(async { panic!("of no use") });
        let told = tokio::time::timeout(patience * 100, broke_off(&mut tasks)).await;
        assert!(told.unwrap().contains("panicked"));
    }
}
