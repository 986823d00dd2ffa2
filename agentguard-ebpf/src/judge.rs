//! From a request to an action: find whose it is, decide or remember the decision, count, record.

use agentguard_common::abi::CachedVerdict;
use agentguard_common::event::{Class, Hook, RequestKey, RequestKind};
use agentguard_common::stats::{Fate, OTHER};
use agentguard_common::{
    Action, Address, CgroupId, Decision, Destination, Endpoint, FileId, Mode, Mover, Naming, Peer,
    Permission, Reason, Request, Tag, UnixSocket, Verdict, WorkloadId, decide,
};

use crate::kernel::Sock;
use crate::maps::{self, KernelTables};
use crate::record::{self, Origin, Record};
use crate::{diagnostics, kernel};

/// How long a cached verdict needs no other look, in jiffies: 25 to 250 ms, as the kernel was
/// built for 1000 to 100 of them in a second.
const FRESH_JIFFIES: u64 = 25;
/// The longest that can be, in nanoseconds. A verdict that ends sooner is looked at every time.
const FRESH_NANOSECONDS: u64 = 250_000_000;

/// What a hook met, and where.
///
/// A [`Request`] laid flat: every byte of it is written, whatever is asked, because the verifier
/// lets no byte pass that was not, and an enum leaves those of its other variants alone.
pub(crate) struct Inquiry {
    hook: Hook,
    kind: RequestKind,
    protocol: u8,
    port: u16,
    target: [u32; 4],
}

/// Which requests a program judges, known when it is compiled: what it can not meet, the verifier
/// need not follow.
pub(crate) trait Classed {
    const CLASS: Class;
}

pub(crate) struct Destinations;
pub(crate) struct Locals;
pub(crate) struct Execs;
pub(crate) struct Others;
pub(crate) struct Servers;
pub(crate) struct Families;
pub(crate) struct UnixSockets;

impl Classed for Destinations {
    const CLASS: Class = Class::Destination;
}
impl Classed for Locals {
    const CLASS: Class = Class::Local;
}
impl Classed for Execs {
    const CLASS: Class = Class::Exec;
}
impl Classed for Others {
    const CLASS: Class = Class::Other;
}
impl Classed for Servers {
    const CLASS: Class = Class::Serving;
}
impl Classed for Families {
    const CLASS: Class = Class::Family;
}
impl Classed for UnixSockets {
    const CLASS: Class = Class::Unix;
}

/// [`Inquiry::port`] of an exec of a file that has no name.
const UNNAMED: u16 = Naming::Unnamed as u16;
/// [`Inquiry::port`] of an exec that starts a container.
const STARTING: u16 = Naming::Starting as u16;
/// [`Inquiry::protocol`] of a move that the host made.
const BY_HOST: u8 = 1;
/// [`Inquiry::protocol`] where the peer of a unix socket is the workload's own, or has no name; all
/// else is somebody else's.
const OWN: u8 = Peer::Own as u8;
const UNNAMED_PEER: u8 = Peer::Unnamed as u8;

impl Inquiry {
    #[inline(always)]
    const fn new(hook: Hook, kind: RequestKind) -> Self {
        Self { hook, kind, protocol: 0, port: 0, target: [0; 4] }
    }

    /// A connect, send or packet; what could not be read is malformed.
    #[inline(always)]
    pub(crate) fn destination(
        hook: Hook,
        kind: RequestKind,
        destination: Option<Destination>,
    ) -> Self {
        match destination {
            Some(Destination { address, protocol, port }) => {
                // Keeps this a branch: without it the compiler chooses field by field, and reads
                // those of a destination that is not there, which verifiers refuse.
                let port = kernel::barrier(port.into()) as u16;
                Self { protocol, port, target: address.words(), ..Self::new(hook, kind) }
            }
            None => Self::malformed(hook),
        }
    }

    /// A bind or a reply; what could not be read is malformed.
    #[inline(always)]
    pub(crate) fn endpoint(hook: Hook, kind: RequestKind, endpoint: Option<Endpoint>) -> Self {
        match endpoint {
            Some(Endpoint { protocol, port }) => Self { protocol, port, ..Self::new(hook, kind) },
            None => Self::malformed(hook),
        }
    }

    #[inline(always)]
    pub(crate) fn raw_socket(hook: Hook, protocol: u8) -> Self {
        Self { protocol, ..Self::new(hook, RequestKind::RawSocket) }
    }

    #[inline(always)]
    pub(crate) fn exec(hook: Hook, file: &FileId, naming: Naming) -> Self {
        let target = RequestKey::file_words(file);
        Self { port: naming as u16, target, ..Self::new(hook, RequestKind::Exec) }
    }

    #[inline(always)]
    pub(crate) fn leave(hook: Hook, cgroup: CgroupId, mover: Mover) -> Self {
        let protocol = match mover {
            Mover::Workload => 0,
            Mover::Host => BY_HOST,
        };
        let target = [cgroup.0 as u32, (cgroup.0 >> 32) as u32, 0, 0];
        Self { protocol, target, ..Self::new(hook, RequestKind::Leave) }
    }

    #[inline(always)]
    pub(crate) fn family(hook: Hook, family: u16, protocol: u16) -> Self {
        let target = [family.into(), protocol.into(), 0, 0];
        Self { target, ..Self::new(hook, RequestKind::Socket) }
    }

    #[inline(always)]
    pub(crate) fn unix(hook: Hook, kind: RequestKind, socket: &UnixSocket, peer: Peer) -> Self {
        let target = RequestKey::unix_socket_words(socket);
        Self { protocol: peer as u8, target, ..Self::new(hook, kind) }
    }

    #[inline(always)]
    pub(crate) fn malformed(hook: Hook) -> Self {
        Self::new(hook, RequestKind::Malformed)
    }

    /// The request, of which only those of class `C` are possible. A destination is decided alike
    /// for a connect, a send and a packet, and a local port for a bind and a reply.
    #[inline(always)]
    fn request<C: Classed>(&self) -> Request {
        match C::CLASS {
            // No hook asks for the protocol of nothing.
            Class::Destination if self.kind as u8 == RequestKind::Malformed as u8 => {
                Request::Malformed
            }
            Class::Destination => Request::Connect(Destination {
                address: Address::from_words(self.target),
                protocol: self.protocol,
                port: self.port,
            }),
            Class::Local if self.kind as u8 == RequestKind::Malformed as u8 => Request::Malformed,
            Class::Local => Request::Bind(Endpoint { protocol: self.protocol, port: self.port }),
            Class::Exec => {
                let naming = match self.port {
                    UNNAMED => Naming::Unnamed,
                    STARTING => Naming::Starting,
                    _ => Naming::Named,
                };
                Request::Exec(RequestKey::file_of(&self.target), naming)
            }
            Class::Serving if self.kind as u8 == RequestKind::Malformed as u8 => Request::Malformed,
            Class::Serving => {
                Request::Listen(Endpoint { protocol: self.protocol, port: self.port })
            }
            Class::Family => {
                let [family, protocol, ..] = self.target;
                Request::Socket { family: family as u16, protocol: protocol as u16 }
            }
            Class::Unix if self.kind as u8 == RequestKind::Malformed as u8 => Request::Malformed,
            Class::Unix => {
                let peer = match self.protocol {
                    OWN => Peer::Own,
                    UNNAMED_PEER => Peer::Unnamed,
                    _ => Peer::Other,
                };
                Request::UnixConnect(RequestKey::unix_socket_of(&self.target), peer)
            }
            Class::Other if self.kind as u8 == RequestKind::RawSocket as u8 => {
                Request::RawSocket { protocol: self.protocol }
            }
            Class::Other => {
                let mover = if self.protocol == BY_HOST { Mover::Host } else { Mover::Workload };
                Request::Leave(mover)
            }
        }
    }

    #[inline(always)]
    pub(crate) fn target(&self) -> ([u32; 4], u16, u8) {
        (self.target, self.port, self.protocol)
    }

    #[inline(always)]
    pub(crate) fn key<C: Classed>(&self, workload: WorkloadId, tag: &Tag) -> RequestKey {
        RequestKey {
            workload,
            allowlist: tag.allowlist,
            target: self.target,
            port: self.port,
            protocol: self.protocol,
            class: C::CLASS as u8,
            // What has no target must not be taken for something else that has none.
            reserved: match C::CLASS {
                Class::Other => self.kind as u32,
                Class::Destination
                | Class::Local
                | Class::Exec
                | Class::Serving
                | Class::Family
                | Class::Unix => u32::from(self.kind as u8 == RequestKind::Malformed as u8),
            },
        }
    }
}

/// Judges a call on a socket: by the workload whose process calls or, where the caller is a
/// process of the host, by the workload whose socket it is. What a socket that one workload made
/// and another uses sends is judged by its maker too, packet by packet.
#[inline(always)]
pub(crate) fn socket_call<C: Classed>(inquiry: &Inquiry) -> Action {
    let attachment = maps::attachment();
    let current = kernel::current_cgroup();
    let mut workload = attachment.workload;
    if !workload.is_some() || current.0 != attachment.cgroup {
        let caller = caller_in(current);
        if caller.is_some() {
            workload = caller;
        }
    }
    if workload.is_some() { judge::<C>(inquiry, workload) } else { Action::Pass }
}

/// The workload of the calling process; none for a process of the host.
#[inline(always)]
pub(crate) fn caller_in(current: CgroupId) -> WorkloadId {
    match maps::member(current) {
        Some(workload) => workload,
        None => match maps::moved(kernel::current_tgid()) {
            Some(moved) => moved.workload,
            None => WorkloadId::NONE,
        },
    }
}

/// The calling workload or, for a thread of the kernel's own, the one whose process made the socket it
/// works for: before 5.12 those of `io_uring` are in no cgroup but the root.
#[inline(always)]
pub(crate) fn caller_or_maker(sock: Sock) -> WorkloadId {
    let current = kernel::current_cgroup();
    let caller = caller_in(current);
    if caller.is_some() || current != ROOT {
        return caller;
    }
    maps::member(sock.cgroup()).unwrap_or(WorkloadId::NONE)
}

/// The root of the v2 hierarchy is the first node of its file system.
const ROOT: CgroupId = CgroupId(1);

/// Judges a request of a workload that its own process makes.
#[inline(always)]
pub(crate) fn judge<C: Classed>(inquiry: &Inquiry, workload: WorkloadId) -> Action {
    judge_from::<C>(inquiry, workload, &Origin::Caller, 0)
}

/// Judges a packet, on whose way out the calling process is anybody; `folded` like it have passed
/// on its socket since the last look.
#[inline(never)]
pub(crate) fn judge_packet<C: Classed>(
    inquiry: &Inquiry,
    workload: WorkloadId,
    folded: u64,
) -> Action {
    judge_from::<C>(inquiry, workload, &Origin::Nobody, folded)
}

#[inline(always)]
pub(crate) fn judge_from<C: Classed>(
    inquiry: &Inquiry,
    workload: WorkloadId,
    origin: &Origin,
    carried: u64,
) -> Action {
    let Some(tag) = maps::tag(workload) else {
        return deny_without_table::<C>(inquiry, workload, &ROWLESS, origin, carried);
    };
    let key = inquiry.key::<C>(workload, &tag);
    if let Some(cached) = maps::cached(&key)
        && kernel::jiffies() < cached.fresh_until
    {
        cached.folded += 1 + carried;
        let code = cached.verdict as u8;
        record::count_again(&tag, inquiry.hook, code);
        return action_of(code, tag.mode());
    }
    let (code, fate) = judge_afresh::<C>(inquiry, &tag, &key, origin, carried);
    record::count(&tag, inquiry.hook, code, fate);
    action_of(code, tag.mode())
}

/// A table has no room for a task or a cgroup of a workload, so that nothing would hold it.
#[inline(always)]
pub(crate) fn judge_without_room(
    cgroup: CgroupId,
    workload: WorkloadId,
    origin: &Origin,
) -> Action {
    let inquiry = Inquiry::leave(Hook::Leave, cgroup, Mover::Workload);
    let tag = maps::tag_or(workload, ROWLESS);
    deny_without_table::<Others>(&inquiry, workload, &tag, origin, 0)
}

/// What a workload is held to whose cgroup says so, but which has no row.
const ROWLESS: Tag = Tag::new(
    agentguard_common::IdentityId::NONE,
    Mode::Enforce,
    agentguard_common::AllowlistId::NONE,
    agentguard_common::RuleSetId::NONE,
    OTHER,
);

#[inline(always)]
fn deny_without_table<C: Classed>(
    inquiry: &Inquiry,
    workload: WorkloadId,
    tag: &Tag,
    origin: &Origin,
    carried: u64,
) -> Action {
    let Decision { verdict, permission } = Decision::deny(Reason::MissingTable);
    let code = verdict.code();
    let key = inquiry.key::<C>(workload, tag);
    let Inquiry { hook, kind, .. } = *inquiry;
    let now = kernel::now();
    let record = Record { hook, kind, verdict: code, permission, folded: carried, now };
    let fate = record::write(&record, &key, tag, origin);
    record::count(tag, hook, code, fate);
    action_of(code, tag.mode())
}

/// The way that a request takes once in a while: clock, decision, record.
#[inline(always)]
fn judge_afresh<C: Classed>(
    inquiry: &Inquiry,
    tag: &Tag,
    key: &RequestKey,
    origin: &Origin,
    carried: u64,
) -> (u8, Fate) {
    let now = kernel::now();
    let settings = maps::settings();
    let window = settings.aggregation_window;
    let mut folded = carried;
    if let Some(cached) = maps::cached(key) {
        let code = cached.verdict as u8;
        if now.wrapping_sub(cached.logged_at) < window && ends(code, &cached.permission) > now {
            cached.folded += 1 + carried;
            cached.fresh_until =
                fresh_until(code, &cached.permission, cached.logged_at, window, now);
            return (code, Fate::Aggregated);
        }
        folded += cached.folded;
    }
    let decision = decide(&KernelTables, tag, &inquiry.request::<C>(), now);
    let code = kernel::forgotten(decision.verdict.code().into()) as u8;
    let expires_at = kernel::forgotten(decision.permission.expires_at);
    let permission = Permission { expires_at, ..decision.permission };
    if settings.diagnostics != 0 {
        diagnostics::decided(key.workload, code);
    }
    let record =
        Record { hook: inquiry.hook, kind: inquiry.kind, verdict: code, permission, folded, now };
    let fate = record::write(&record, key, tag, origin);
    maps::cache(
        key,
        &CachedVerdict {
            permission,
            logged_at: now,
            fresh_until: fresh_until(code, &permission, now, window, now),
            folded: 0,
            verdict: code.into(),
        },
    );
    (code, fate)
}

/// When a verdict ends by itself, in boot time. The key holds the allow-list's generation, so only
/// the end of a permission can change a verdict; a denial stands until the record's window is over
/// and it is decided afresh.
#[inline(always)]
fn ends(code: u8, permission: &Permission) -> u64 {
    // What needs no permission does not end with one.
    if code == Verdict::Allow.code() && permission.expires_at != 0 {
        permission.expires_at
    } else {
        u64::MAX
    }
}

/// As [`Verdict::action`], for a verdict out of a table: told apart by one comparison, since the
/// verifier follows every arm of a match. Whatever is not plainly allowed is a denial.
#[inline(always)]
pub(crate) fn action_of(code: u8, mode: Mode) -> Action {
    match mode {
        Mode::Enforce if code != Verdict::Allow.code() => Action::Refuse,
        Mode::Enforce | Mode::Audit => Action::Pass,
    }
}

/// Until when, in jiffies, a cached verdict can be given again without a look at the clock.
#[inline(always)]
fn fresh_until(code: u8, permission: &Permission, logged_at: u64, window: u64, now: u64) -> u64 {
    let soon = now + FRESH_NANOSECONDS;
    if logged_at + window > soon && ends(code, permission) > soon {
        kernel::jiffies() + FRESH_JIFFIES
    } else {
        0
    }
}
