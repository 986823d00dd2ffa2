//! `cargo xtask bench`: what the guard costs.
//!
//! Its one job is honest figures: each variant runs in every round, in an order shuffled
//! anew, and what is compared are pairs of one round. One variant is there twice: when the
//! two differ, or when the machine was too busy to tell, no figure is reported. What each
//! loop does is in [`loops`]; how samples become figures is in [`figures`].
//!
//! Absolute times mean nothing beyond this machine and this run. The differences do: against
//! no agent at all, and against programs that are attached and do nothing, which is the price
//! the kernel takes from any guard.

mod figures;
mod loops;

use std::{
    collections::BTreeMap,
    env, fs,
    fs::File,
    hash::{BuildHasher as _, RandomState},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr},
};

use crate::{
    dist::release_daemon,
    guard::{Ending, Guard},
    interrupt,
    netns::Namespace,
    object::empty_object,
    run::{heading, output},
    setup::{self, Purpose, cgroup_root},
};
use figures::Samples;
use loops::Loop;

/// How many destinations the measured allow-list has.
const ENTRIES: u16 = 10_000;

/// How many times each loop runs in one round; the best counts.
const REPEATS: u32 = 3;

/// Below the cgroup root; where measured processes go.
const CGROUP: &str = "agentguard-bench";

/// The workload that the measured process is in.
const WORKLOAD: &str = "bench";

/// Where everything of a run lies.
const DIRECTORY: &str = "/run/agentguard-bench";

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many rounds; fewer than 21 are refused
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u16).range(21..))]
    rounds: u16,
    /// Show figures also where this machine was too busy to tell, and say which those are
    #[arg(long)]
    busy: bool,
    /// Compare no agent and empty programs only; the daemon is not built
    #[arg(long)]
    floor: bool,
}

/// Arguments of the measured process.
#[derive(Debug, clap::Args)]
pub(crate) struct WorkerArguments {
    /// Be the other side: listen, receive, and accept until stdin ends
    #[arg(long)]
    serve: bool,
}

/// What is compared: what stands in the kernel, and where the measured process stands to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Variant {
    NoAgent,
    /// The same once more, to know what chance does.
    NoAgentAgain,
    EmptyOnOwn,
    EmptyOnForeign,
    GuardOnWorkload,
    GuardOnUntagged,
}

impl Variant {
    const FLOOR: &[Self] =
        &[Self::NoAgent, Self::NoAgentAgain, Self::EmptyOnOwn, Self::EmptyOnForeign];
    const ALL: &[Self] = &[
        Self::NoAgent,
        Self::NoAgentAgain,
        Self::EmptyOnOwn,
        Self::EmptyOnForeign,
        Self::GuardOnWorkload,
        Self::GuardOnUntagged,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::NoAgent => "no agent",
            Self::NoAgentAgain => "no agent, again",
            Self::EmptyOnOwn => "empty program, own cgroup",
            Self::EmptyOnForeign => "empty program, foreign cgroup",
            Self::GuardOnWorkload => "agentguard, workload",
            Self::GuardOnUntagged => "agentguard, untagged process",
        }
    }

    /// The cgroup of the measured process.
    fn cgroup(self) -> &'static str {
        match self {
            Self::NoAgent | Self::NoAgentAgain | Self::EmptyOnOwn | Self::GuardOnWorkload => "own",
            Self::EmptyOnForeign | Self::GuardOnUntagged => "foreign",
        }
    }
}

/// Measures and reports.
///
/// # Errors
///
/// The set-up or a build fails, or the machine was too busy for figures that mean something.
pub(crate) fn bench(arguments: &Arguments) -> Result<()> {
    setup::setup(Purpose::Demo)?;
    interrupt::defer()?;
    heading("build");
    let empty = empty_object()?;
    let bench = Bench::new(&empty)?;
    let directory = Path::new(DIRECTORY);
    let guard = if arguments.floor {
        None
    } else {
        let daemon = match env::var_os("AGENTGUARD_BIN") {
            Some(binary) => PathBuf::from(binary),
            None => release_daemon()?,
        };
        let manifests = directory.join("manifests");
        let guard = Guard::new(&daemon, &directory.join("guard"), &manifests, &bench.namespace)?;
        fs::create_dir_all(&manifests)?;
        fs::write(manifests.join("bench.yaml"), manifest())?;
        Some(guard)
    };
    let variants = if guard.is_some() { Variant::ALL } else { Variant::FLOOR };

    heading(&format!("{} rounds of {} variants", arguments.rounds, variants.len()));
    let mut samples = Samples::default();
    'rounds: for round in 1..=arguments.rounds {
        for variant in shuffled(variants) {
            let measured = interrupt::check().and_then(|()| bench.measure(variant, guard.as_ref()));
            if interrupt::check().is_err() && arguments.busy && round > 1 {
                print!(" rounds, then interrupted");
                break 'rounds;
            }
            for (name, nanoseconds) in measured? {
                samples.add(&name, variant, nanoseconds);
            }
        }
        print!("\r{round}");
        std::io::stdout().flush()?;
    }
    println!();
    let figures = samples.report(variants, arguments.busy);
    print!("{}", figures.text);
    ensure!(
        figures.refused.is_empty() || arguments.busy,
        "not reported, this machine was too busy to tell: {}; run it again when it is idle",
        figures.refused.join("; ")
    );
    Ok(())
}

/// The measured side: waits until it is where it belongs, then runs every loop.
///
/// # Errors
///
/// A loop meets an error; a figure of something that did not happen is worth nothing.
pub(crate) fn work(arguments: &WorkerArguments) -> Result<()> {
    if arguments.serve {
        return loops::serve();
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).context("no line to begin at")?;
    let mut best = BTreeMap::new();
    for each in Loop::ALL {
        for _ in 0..REPEATS {
            let nanoseconds = each.run(ENTRIES).with_context(|| each.name().to_owned())?;
            let entry = best.entry(each.name()).or_insert(nanoseconds);
            *entry = nanoseconds.min(*entry);
        }
    }
    println!("{}", serde_json::to_string(&best)?);
    Ok(())
}

/// What all rounds share.
struct Bench {
    // Dropped in this order: first who runs inside, then the namespace.
    _server: Ending,
    namespace: Namespace,
    cgroup: PathBuf,
    empty: PathBuf,
}

impl Bench {
    fn new(empty: &Path) -> Result<Self> {
        let cgroup = cgroup_root()?.join(CGROUP);
        for name in ["own", "foreign"] {
            fs::create_dir_all(cgroup.join(name))
                .with_context(|| format!("{}: cannot be made", cgroup.display()))?;
        }
        let namespace = Namespace::new("agentguard-bench")?;
        let mut serve = Command::new(env::current_exe()?);
        serve.args(["bench-worker", "--serve"]);
        let mut server = namespace
            .inside(&serve)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the other side cannot be started")?;
        let stdout = server.stdout.take().context("the other side has no standard output")?;
        let server = Ending(server);
        let mut ready = String::new();
        BufReader::new(stdout).read_line(&mut ready)?;
        ensure!(ready == "ready\n", "the other side did not start; see above");
        Ok(Self { _server: server, namespace, cgroup, empty: empty.to_owned() })
    }

    /// Puts the variant into the kernel, measures one round, and takes it out again.
    fn measure(
        &self,
        variant: Variant,
        guard: Option<&Guard<'_>>,
    ) -> Result<BTreeMap<String, f64>> {
        match (variant, guard) {
            (Variant::NoAgent | Variant::NoAgentAgain, _) => self.worker(variant),
            (Variant::EmptyOnOwn | Variant::EmptyOnForeign, _) => {
                let _attached = self.attach_empty()?;
                self.worker(variant)
            }
            (Variant::GuardOnWorkload | Variant::GuardOnUntagged, guard) => {
                let guard = guard.context("no daemon was set up for this variant")?;
                let daemon = guard.start()?;
                guard.wait_for_workload(WORKLOAD)?;
                let measured = self.worker(variant);
                drop(daemon);
                output(&mut guard.command(&["uninstall"]))?;
                measured
            }
        }
    }

    /// Attaches each empty program to the cgroup `own`; dropping the value detaches them.
    fn attach_empty(&self) -> Result<Ebpf> {
        let mut empty = Ebpf::load_file(&self.empty)
            .with_context(|| format!("{}: cannot be loaded", self.empty.display()))?;
        let own = File::open(self.cgroup.join("own"))?;
        for name in ["empty_connect4", "empty_sendmsg4"] {
            let program: &mut CgroupSockAddr = empty
                .program_mut(name)
                .with_context(|| format!("no program {name}"))?
                .try_into()?;
            program.load()?;
            program.attach(&own, CgroupAttachMode::Single)?;
        }
        let egress: &mut CgroupSkb =
            empty.program_mut("empty_egress").context("no program empty_egress")?.try_into()?;
        egress.load()?;
        egress.attach(&own, CgroupSkbAttachType::Egress, CgroupAttachMode::Single)?;
        Ok(empty)
    }

    /// Runs the loops in a process of its own, in the cgroup of the variant.
    fn worker(&self, variant: Variant) -> Result<BTreeMap<String, f64>> {
        let mut worker = Command::new(env::current_exe()?);
        worker.arg("bench-worker");
        let mut child = self
            .namespace
            .inside(&worker)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map(Ending)
            .context("the measured process cannot be started")?;
        let procs = self.cgroup.join(variant.cgroup()).join("cgroup.procs");
        fs::write(&procs, child.0.id().to_string())
            .with_context(|| format!("{}: the process cannot be moved", procs.display()))?;
        let mut stdin = child.0.stdin.take().context("the worker has no standard input")?;
        stdin.write_all(b"go\n")?;
        let stdout = child.0.stdout.take().context("the worker has no standard output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let status = child.0.wait()?;
        ensure!(status.success(), "{}: the measured process: {status}", variant.name());
        serde_json::from_str(&line).context("the measured process gave no figures")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for directory in [self.cgroup.join("own"), self.cgroup.join("foreign"), self.cgroup.clone()]
        {
            if let Err(error) = fs::remove_dir(&directory) {
                eprintln!("{} is left over: {error}", directory.display());
            }
        }
        // Without the daemon there is none.
        let _ = fs::remove_dir_all(DIRECTORY);
    }
}

/// A workload with one grant of 10,000 destinations, which are those of the loops.
fn manifest() -> String {
    let mut egress = String::new();
    for index in 0..ENTRIES {
        egress.push_str(&format!("        - ipBlock: {{cidr: {}/32}}\n", loops::cold(index)));
    }
    format!(
        "apiVersion: agentguard.dev/v1alpha1\n\
         kind: Scope\n\
         metadata:\n  name: bench\n\
         spec:\n  scope: bench:all\n  description: What the benchmark does\n  \
         egress:\n    - to:\n{egress}      ports:\n        - {{protocol: UDP, port: {port}}}\n    \
         - to:\n        - ipBlock: {{cidr: 127.0.0.1/32}}\n      ports:\n        \
         - {{protocol: UDP, port: {port}}}\n        - {{protocol: TCP, port: {port}}}\n  \
         exec:\n    - path: /usr/bin/**\n\
         ---\n\
         apiVersion: agentguard.dev/v1alpha1\n\
         kind: Grant\n\
         metadata:\n  name: bench\n\
         spec:\n  subject: {{spiffeId: spiffe://example.org/bench}}\n  scopes: [bench:all]\n  \
         expiresAt: never\n  grantedBy: bench\n  reason: bench\n\
         ---\n\
         apiVersion: agentguard.dev/v1alpha1\n\
         kind: Workload\n\
         metadata:\n  name: {WORKLOAD}\n\
         spec:\n  select: {{cgroup: /{CGROUP}/own}}\n  spiffeId: spiffe://example.org/bench\n  \
         mode: enforce\n",
        port = loops::PORT,
    )
}

/// The variants in an order that nobody chose.
fn shuffled(variants: &[Variant]) -> Vec<Variant> {
    let state = RandomState::new();
    let mut order: Vec<_> = variants.to_vec();
    order.sort_by_key(|variant| state.hash_one(*variant as u8));
    order
}
