//! A way out of the threat model, and its three runs.
//!
//! Without the guard it must work, or the other runs prove nothing; in audit mode it works and is
//! recorded; in enforce mode it is refused and recorded, unless `status` has said before that this
//! kernel leaves it open.

use std::{
    iter,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    Attack, Facility, Guard, Layer, Mode, Outcome, Programs, Report, Running, World, attack_binary,
    can_be_attacked_by,
    guard::{BASE_SCOPE, eventually},
    requires,
    server::{Protocol, Reach},
};

/// In which the servers take what has arrived.
const SETTLE: Duration = Duration::from_millis(50);

/// How the harness sees, without asking the attack, that it worked.
#[derive(Clone, Debug)]
pub enum Proof {
    /// A connection or bytes arrived at a server of the server side.
    Reached(Protocol, SocketAddr),
    /// Bytes arrived there; the connection is not the attack's doing.
    Sent(Protocol, SocketAddr),
    /// A packet that names this address arrived at the server side, which is watched.
    Arrived(IpAddr),
    /// A connection or bytes arrived at a server on the client side's loopback.
    ReachedLocally(Protocol, SocketAddr),
    /// The forbidden program ran.
    Ran(Programs),
    /// A helper outside was spoken to: it says so.
    Heard,
    /// Nothing outside can see it: what the attack says counts.
    OwnWord,
}

/// The record that the attack leaves.
#[derive(Clone, Debug)]
pub enum Recorded {
    /// A request was denied.
    Denied {
        /// One of these words is the request's action.
        actions: &'static [&'static str],
        /// What the request contains.
        target: String,
    },
    /// A request was denied because it could not be read.
    Malformed,
    /// The workload came with a socket from before, at this descriptor.
    Inherited(i32),
}

/// One attack with all it needs.
#[derive(Debug)]
pub struct WayOut {
    pub attack: Attack,
    pub proof: Proof,
    pub recorded: Recorded,
    pub layer: Layer,
    /// The word by which `status` says that this kernel leaves it open.
    pub gap: Option<&'static str>,
    /// Whether it lives on elsewhere where the kernel cannot end it.
    pub lives_on: bool,
    /// What runs outside the workload meanwhile.
    pub helpers: Vec<Running>,
    /// What the workload is granted besides: scopes and what they permit.
    pub scopes: Vec<(&'static str, Value)>,
    /// More keys of the guard's configuration.
    pub configuration: Value,
}

impl WayOut {
    /// An attack that is to reach `to`.
    #[must_use]
    pub fn network(attack: Attack, protocol: Protocol, to: SocketAddr) -> Self {
        Self {
            attack,
            proof: Proof::Reached(protocol, to),
            recorded: Recorded::Denied {
                actions: &["connect", "send", "packet"],
                target: to.ip().to_canonical().to_string(),
            },
            layer: Layer::Portable,
            gap: None,
            lives_on: false,
            helpers: Vec::new(),
            scopes: Vec::new(),
            configuration: json!({}),
        }
    }

    /// An attack that is to reach a unix socket of `helper`, which was bound as `name`.
    #[must_use]
    pub fn unix(attack: Attack, helper: Running, name: &str) -> Self {
        Self {
            attack,
            proof: Proof::Heard,
            recorded: Recorded::Denied {
                actions: &["unix_connect", "unix_send"],
                target: name.to_owned(),
            },
            layer: Layer::Portable,
            gap: None,
            lives_on: false,
            helpers: vec![helper],
            scopes: Vec::new(),
            configuration: json!({}),
        }
    }

    /// An attack that is to run the forbidden one of `programs`.
    #[must_use]
    pub fn exec(attack: Attack, programs: &Programs) -> Self {
        let attack = attack
            .option("program", programs.forbidden())
            .option("token", programs.token())
            .option("scratch", programs.scratch());
        Self {
            attack,
            proof: Proof::Ran(programs.clone()),
            recorded: Recorded::Denied { actions: &["exec"], target: String::new() },
            layer: Layer::Portable,
            gap: None,
            lives_on: false,
            helpers: Vec::new(),
            scopes: Vec::new(),
            configuration: json!({}),
        }
    }

    /// The same with another proof.
    #[must_use]
    pub fn proved_by(mut self, proof: Proof) -> Self {
        self.proof = proof;
        self
    }

    /// The same with another record.
    #[must_use]
    pub fn recorded_as(mut self, actions: &'static [&'static str], target: &str) -> Self {
        self.recorded = Recorded::Denied { actions, target: target.to_owned() };
        self
    }

    /// The same, recorded as a request that could not be read.
    #[must_use]
    pub fn recorded_as_malformed(mut self) -> Self {
        self.recorded = Recorded::Malformed;
        self
    }

    /// The same, recorded by the socket that it found at the launch.
    #[must_use]
    pub fn recorded_as_inherited(mut self, descriptor: i32) -> Self {
        self.recorded = Recorded::Inherited(descriptor);
        self
    }

    /// The same with a helper outside.
    #[must_use]
    pub fn with_helper(mut self, helper: Running) -> Self {
        self.helpers.push(helper);
        self
    }

    /// The same by a workload that is granted one scope more.
    #[must_use]
    pub fn granted(mut self, scope: &'static str, permits: Value) -> Self {
        self.scopes.push((scope, permits));
        self
    }

    /// The same against a guard with more keys in its configuration.
    #[must_use]
    pub fn configured(mut self, configuration: Value) -> Self {
        self.configuration = configuration;
        self
    }

    /// The same, open on kernels of which `status` says so.
    #[must_use]
    pub const fn or_gap(mut self, word: &'static str) -> Self {
        self.gap = Some(word);
        self
    }

    /// The same, by a process that lives on in another cgroup where the kernel cannot end it. There
    /// it is held by the LSM layer or, as `status` says, by nothing for a moment.
    #[must_use]
    pub const fn or_living_on(mut self) -> Self {
        self.lives_on = true;
        self
    }

    fn worked(&self, world: &World) -> bool {
        match &self.proof {
            Proof::Reached(protocol, to) => {
                world.servers().reach(*protocol, *to) != Reach::default()
            }
            Proof::Sent(protocol, to) => world.servers().reach(*protocol, *to).bytes > 0,
            Proof::Arrived(address) => world.servers().arrived(*address) > 0,
            Proof::ReachedLocally(protocol, to) => {
                world.local_servers().reach(*protocol, *to) != Reach::default()
            }
            Proof::Ran(programs) => programs.payload_ran(),
            Proof::Heard => self
                .helpers
                .iter()
                .any(|helper| helper.stdout().lines().any(|line| line.starts_with("heard "))),
            Proof::OwnWord => true,
        }
    }
}

/// The first run.
///
/// # Panics
///
/// When the attack does not work: it would prove nothing about a guard.
#[track_caller]
pub fn works_without_the_guard(needs: &[Facility], way_out: impl FnOnce(&mut World) -> WayOut) {
    if !can_be_attacked_by(needs) {
        return;
    }
    requires(Layer::Portable);
    let mut world = World::new();
    let mut way_out = way_out(&mut world);
    let report = way_out.attack.run_without_the_guard(&world);
    assert_worked(&way_out, &world, &report);
}

/// The second run.
///
/// # Panics
///
/// When the attack does not work, or leaves no record though `status` does not say that it would.
#[track_caller]
pub fn is_recorded_in_audit_mode(needs: &[Facility], way_out: impl FnOnce(&mut World) -> WayOut) {
    if !can_be_attacked_by(needs) {
        return;
    }
    let mut guarded = Guarded::start(way_out);
    let left_open = guarded.is_left_open();
    let report = guarded.run(Mode::Audit);
    assert_worked(&guarded.way_out, &guarded.world, &report);
    // Where no hook sees it, nothing can record it.
    if !left_open {
        guarded.assert_recorded(Mode::Audit);
    }
}

/// The third run.
///
/// # Panics
///
/// When the attack works though `status` does not say so, or leaves no record.
#[track_caller]
pub fn is_refused_in_enforce_mode(needs: &[Facility], way_out: impl FnOnce(&mut World) -> WayOut) {
    if !can_be_attacked_by(needs) {
        return;
    }
    let mut guarded = Guarded::start(way_out);
    let left_open = guarded.is_left_open();
    if left_open {
        guarded.way_out.attack = guarded.way_out.attack.patient();
    }
    let report = guarded.run(Mode::Enforce);
    if left_open {
        assert_worked(&guarded.way_out, &guarded.world, &report);
        return;
    }
    let lives_on = guarded.way_out.lives_on && guarded.status_says(LIVES_ON);
    if lives_on && guarded.status_says(UNJUDGED) {
        // Who is first is not for a test to say. That it is recorded, and as let through, is.
        assert_ne!(report.outcome, Outcome::Error, "{report:?}");
        guarded.assert_is_recorded(&guarded.way_out.recorded, Mode::Enforce, false);
        return;
    }
    assert_eq!(report.outcome, Outcome::Refused, "{report:?}");
    guarded.guard.assert_chain_is_whole();
    guarded.assert_is_recorded(&guarded.way_out.recorded, Mode::Enforce, !lives_on);
    // What an attack says of itself, it has just said.
    if matches!(guarded.way_out.proof, Proof::OwnWord) {
        return;
    }
    // By now the servers have taken what had been on its way.
    thread::sleep(SETTLE);
    assert!(
        !guarded.way_out.worked(&guarded.world),
        "the attack worked without noticing: {report:?}"
    );
}

const IDENTITY: &str = "spiffe://agentguard.test/attacker";
/// Where the kernel does not end a task that is not the caller, and where nothing else holds it.
const LIVES_ON: &str = "not ended before it runs on";
const UNJUDGED: &str = "before its new cgroup has hooks is not judged";

struct Guarded {
    // The guard goes before the network and the cgroups it guards.
    guard: Guard,
    way_out: WayOut,
    world: World,
}

impl Guarded {
    #[track_caller]
    fn start(way_out: impl FnOnce(&mut World) -> WayOut) -> Self {
        let mut world = World::new();
        let way_out = way_out(&mut world);
        requires(way_out.layer);
        let mut programs = vec![attack_binary()];
        if let Proof::Ran(of) = &way_out.proof {
            programs.push(of.granted());
        }
        let guard = Guard::start_as(&world, &programs, &way_out.configuration, &way_out.scopes);
        Self { guard, way_out, world }
    }

    #[track_caller]
    fn run(&mut self, mode: Mode) -> Report {
        let Self { guard, way_out, world } = self;
        let scopes: Vec<&str> =
            iter::once(BASE_SCOPE).chain(way_out.scopes.iter().map(|(scope, _)| *scope)).collect();
        way_out.attack.run_as_workload(world, guard, IDENTITY, &scopes, mode)
    }

    /// Whether `status` says, before the attack, that this kernel leaves it open.
    #[track_caller]
    fn is_left_open(&self) -> bool {
        self.way_out.gap.is_some_and(|word| self.status_says(word))
    }

    #[track_caller]
    fn status_says(&self, word: &str) -> bool {
        mentions(&self.guard.status()["gaps"], word)
    }

    #[track_caller]
    fn assert_recorded(&self, mode: Mode) {
        self.guard.assert_chain_is_whole();
        self.assert_is_recorded(&self.way_out.recorded, mode, mode == Mode::Enforce);
    }

    #[track_caller]
    fn assert_is_recorded(&self, recorded: &Recorded, mode: Mode, enforced: bool) {
        let refused = if enforced { "refused" } else { "let through" };
        let what = format!("{recorded:?} in {} mode, {refused}", mode.as_str());
        self.guard.recorded(&what, |record| {
            let by_attacker =
                record["mode"] == mode.as_str() && record["workload"]["identity"] == IDENTITY;
            by_attacker
                && match recorded {
                    Recorded::Denied { actions, target } => {
                        let action = record["request"]["action"].as_str().unwrap_or_default();
                        record["kind"] == "verdict"
                            && record["verdict"] == "deny"
                            && record["refused"] == enforced
                            && actions.contains(&action)
                            && mentions(&record["request"], target)
                    }
                    Recorded::Malformed => {
                        record["kind"] == "verdict"
                            && record["verdict"] == "deny"
                            && record["refused"] == enforced
                            && record["reason"] == "malformed"
                    }
                    Recorded::Inherited(descriptor) => {
                        let socket = json!({"descriptor": descriptor, "closed": enforced});
                        record["kind"] == "workload"
                            && record["inherited"]
                                .as_array()
                                .is_some_and(|all| all.contains(&socket))
                    }
                }
        });
    }
}

/// Whether a text anywhere in `value` contains `word`, or a number is it.
fn mentions(value: &Value, word: &str) -> bool {
    match value {
        Value::String(text) => text.contains(word),
        Value::Array(values) => values.iter().any(|value| mentions(value, word)),
        Value::Object(fields) => fields.values().any(|value| mentions(value, word)),
        Value::Number(number) => number.to_string() == word,
        Value::Null | Value::Bool(_) => false,
    }
}

#[track_caller]
fn assert_worked(way_out: &WayOut, world: &World, report: &Report) {
    assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
    // The servers see it a moment later.
    let seen = eventually(|| way_out.worked(world));
    assert!(seen, "no trace of what the attack says it did: {report:?}");
}

/// Makes three tests of each way out: a module of that name, with one test for each run. Behind
/// `needs` stands what a kernel may lack, so that it cannot be attacked in that way.
#[macro_export]
macro_rules! ways_out {
    ($($(#[$doc:meta])* $name:ident $(needs [$($facility:expr),+])?: $build:expr;)+) => {$(
        $(#[$doc])*
        mod $name {
            use super::*;

            #[test]
            fn works_without_the_guard() {
                $crate::works_without_the_guard(&[$($($facility),+)?], $build);
            }

            #[test]
            fn is_recorded_in_audit_mode() {
                $crate::is_recorded_in_audit_mode(&[$($($facility),+)?], $build);
            }

            #[test]
            fn is_refused_in_enforce_mode() {
                $crate::is_refused_in_enforce_mode(&[$($($facility),+)?], $build);
            }
        }
    )+};
}
