//! From a request to an action: find whose it is, decide or remember the decision, count, record.

use agentguard_common::event::{Class, Hook, RequestKey, RequestKind};
use agentguard_common::stats::OTHER;
use agentguard_common::{
    Action, Decision, Mode, Naming, Permission, Reason, Request, Tag, Verdict, WorkloadId, decide,
};

use crate::kernel;
use crate::maps::{self, CachedVerdict, KernelTables};
use crate::record::{self, Fate, Origin, Record};

/// How long a cached verdict needs no other look, in jiffies: 25 to 250 ms, as the kernel was
/// built for 1000 to 100 of them in a second.
const FRESH_JIFFIES: u64 = 25;
/// The longest that can be, in nanoseconds. A verdict that ends sooner is looked at every time.
const FRESH_NANOSECONDS: u64 = 250_000_000;

/// What a hook met, and where.
pub(crate) struct Judgement {
    pub(crate) hook: Hook,
    pub(crate) request: Request,
}

/// Judges a call on a socket: by the workload whose socket it is and, when that is another, by the
/// workload whose process calls.
#[inline(always)]
pub(crate) fn socket_call(judgement: &Judgement) -> Action {
    let attachment = maps::attachment();
    let current = kernel::current_cgroup();
    let owner = attachment.workload;
    let caller = if owner.is_some() && current.0 == attachment.cgroup {
        owner
    } else {
        caller_in(current)
    };
    if owner.is_some() && caller.is_some() && owner != caller {
        // A socket that one workload made and another uses is held to what both may do.
        match judge(judgement, owner) {
            Action::Refuse => Action::Refuse,
            Action::Pass => judge(judgement, caller),
        }
    } else if owner.is_some() {
        judge(judgement, owner)
    } else if caller.is_some() {
        judge(judgement, caller)
    } else {
        Action::Pass
    }
}

/// The workload of the calling process; none for a process of the host.
#[inline(always)]
fn caller_in(current: agentguard_common::CgroupId) -> WorkloadId {
    match maps::member(current) {
        Some(workload) => workload,
        None => maps::moved(kernel::current_tgid()).unwrap_or(WorkloadId::NONE),
    }
}

/// Judges a request of a workload that its own process makes.
#[inline(never)]
pub(crate) fn judge(judgement: &Judgement, workload: WorkloadId) -> Action {
    judge_from(judgement, workload, &Origin::Caller, 0)
}

/// Judges a packet, on whose way out the calling process is anybody; `folded` like it have passed
/// on its socket since the last look.
#[inline(never)]
pub(crate) fn judge_packet(judgement: &Judgement, workload: WorkloadId, folded: u64) -> Action {
    judge_from(judgement, workload, &Origin::Nobody, folded)
}

#[inline(always)]
pub(crate) fn judge_from(
    judgement: &Judgement,
    workload: WorkloadId,
    origin: &Origin,
    carried: u64,
) -> Action {
    let Judgement { hook, request } = judgement;
    let Some(tag) = maps::tag(workload) else {
        // A cgroup says it is a workload's, and the workload has no row.
        let tag = Tag::new(
            agentguard_common::IdentityId::NONE,
            Mode::Enforce,
            agentguard_common::AllowlistId::NONE,
            agentguard_common::RuleSetId::NONE,
            OTHER,
        );
        let key = key_of(workload, &tag, request);
        let decision = Decision::deny(Reason::MissingTable);
        let record =
            Record { hook: *hook, kind: kind_of(request), decision, folded: carried, now: kernel::now() };
        let fate = record::write(&record, &key, &tag, origin);
        record::count(&tag, *hook, decision.verdict, fate);
        return Action::Refuse;
    };
    let key = key_of(workload, &tag, request);
    let cached = maps::cached(&key);
    if let Some(&mut ref mut cached) = cached {
        if kernel::jiffies() < cached.fresh_until {
            cached.folded += 1 + carried;
            let verdict = verdict_of(cached);
            record::count(&tag, *hook, verdict, Fate::Aggregated);
            return verdict.action(tag.mode());
        }
    }
    let verdict = judge_afresh(judgement, &tag, &key, origin, carried);
    verdict.action(tag.mode())
}

/// The way that a request takes once in a while: clock, decision, record.
#[inline(always)]
fn judge_afresh(
    judgement: &Judgement,
    tag: &Tag,
    key: &RequestKey,
    origin: &Origin,
    carried: u64,
) -> Verdict {
    let Judgement { hook, request } = judgement;
    let now = kernel::now();
    let window = maps::aggregation_window();
    let mut folded = carried;
    if let Some(cached) = maps::cached(key) {
        let verdict = verdict_of(cached);
        if holds(verdict, &cached.permission, now) {
            if now.wrapping_sub(cached.logged_at) < window {
                cached.folded += 1 + carried;
                cached.fresh_until =
                    fresh_until(verdict, &cached.permission, cached.logged_at, window, now);
                record::count(tag, *hook, verdict, Fate::Aggregated);
                return verdict;
            }
        }
        folded += cached.folded;
    }
    let decision = decide(&KernelTables, tag, request, now);
    let record = Record { hook: *hook, kind: kind_of(request), decision, folded, now };
    let fate = record::write(&record, key, tag, origin);
    record::count(tag, *hook, decision.verdict, fate);
    let Decision { verdict, permission } = decision;
    maps::cache(
        key,
        &CachedVerdict {
            permission,
            logged_at: now,
            fresh_until: fresh_until(verdict, &permission, now, window, now),
            folded: 0,
            verdict: verdict.code(),
            reserved: [0; 7],
        },
    );
    verdict
}

/// Whether a cached verdict still stands. The key holds the allow-list's generation, so only time
/// can change a verdict.
#[inline(always)]
fn holds(verdict: Verdict, permission: &Permission, now: u64) -> bool {
    match verdict {
        Verdict::Allow => ends(verdict, permission) > now,
        Verdict::Unmanaged => false,
        Verdict::Deny(Reason::MissingTable) => false,
        Verdict::Deny(_) => true,
    }
}

/// When a verdict ends by itself, in boot time.
#[inline(always)]
fn ends(verdict: Verdict, permission: &Permission) -> u64 {
    match verdict {
        // What needs no permission does not end with one.
        Verdict::Allow if permission.expires_at == 0 => u64::MAX,
        Verdict::Allow => permission.expires_at,
        Verdict::Unmanaged | Verdict::Deny(_) => u64::MAX,
    }
}

/// Until when, in jiffies, a cached verdict can be given again without a look at the clock.
#[inline(always)]
fn fresh_until(
    verdict: Verdict,
    permission: &Permission,
    logged_at: u64,
    window: u64,
    now: u64,
) -> u64 {
    let soon = now + FRESH_NANOSECONDS;
    if logged_at + window > soon && ends(verdict, permission) > soon {
        kernel::jiffies() + FRESH_JIFFIES
    } else {
        0
    }
}

#[inline(always)]
fn verdict_of(cached: &CachedVerdict) -> Verdict {
    match Verdict::try_from(cached.verdict) {
        Ok(verdict) => verdict,
        Err(_unknown) => Verdict::Deny(Reason::MissingTable),
    }
}

#[inline(always)]
fn kind_of(request: &Request) -> RequestKind {
    match request {
        Request::Connect(_) => RequestKind::Connect,
        Request::Send(_) => RequestKind::Send,
        Request::Packet(_) => RequestKind::Packet,
        Request::Reply(_) => RequestKind::Reply,
        Request::Bind(_) => RequestKind::Bind,
        Request::RawSocket { .. } => RequestKind::RawSocket,
        Request::Exec(..) => RequestKind::Exec,
        Request::Leave { .. } => RequestKind::Leave,
        Request::Malformed => RequestKind::Malformed,
    }
}

#[inline(always)]
pub(crate) fn key_of(workload: WorkloadId, tag: &Tag, request: &Request) -> RequestKey {
    let mut key = RequestKey {
        workload,
        allowlist: tag.allowlist,
        target: [0; 4],
        port: 0,
        protocol: 0,
        class: Class::Other as u8,
        reserved: 0,
    };
    match request {
        Request::Connect(destination)
        | Request::Send(destination)
        | Request::Packet(destination) => {
            key.class = Class::Destination as u8;
            key.target = destination.address.words();
            key.port = destination.port;
            key.protocol = destination.protocol;
        }
        Request::Bind(endpoint) | Request::Reply(endpoint) => {
            key.class = Class::Local as u8;
            key.port = endpoint.port;
            key.protocol = endpoint.protocol;
        }
        Request::Exec(file, naming) => {
            key.class = Class::Exec as u8;
            key.target = RequestKey::file_words(file);
            key.port = match naming {
                Naming::Named => 0,
                Naming::Unnamed => 1,
            };
        }
        Request::RawSocket { protocol } => {
            key.port = RequestKind::RawSocket as u16;
            key.protocol = *protocol;
        }
        Request::Leave { .. } => key.port = RequestKind::Leave as u16,
        Request::Malformed => key.port = RequestKind::Malformed as u16,
    }
    key
}
