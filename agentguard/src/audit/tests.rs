//! The log as a whole: what is appended comes back, and what is done to the files shows.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;

use agentguard_common::event::{Event, Hook, RequestKey, RequestKind};
use agentguard_common::{Mode, Reason, Verdict};
use proptest::prelude::*;
use zerocopy::FromZeros;

use super::record::{
    Actor, ActorSource, Ancestor, Container, GrantChange, GrantRecord, Inherited, Layer,
    LayerProtection, ManifestErrorRecord, Missing, Outcome, Pod, Process, ProcessStart,
    ProtectionWord, Request, StartRecord, StopRecord, VerdictRecord, Word, Workload,
    WorkloadChange, WorkloadRecord,
};
use super::verify::{FaultKind, Start};
use super::*;

const SMALL: Limits = Limits { max_file_bytes: Limits::MIN_FILE_BYTES, max_files: 3 };

fn open(path: &Path) -> AuditLog {
    open_with(path, Options::QUEUE)
}

fn open_with(path: &Path, queue: usize) -> AuditLog {
    let output = Output::File { path: path.to_owned(), limits: SMALL };
    AuditLog::open(Options { output, queue }, "node-1").unwrap()
}

fn workload(name: impl AsRef<[u8]>) -> Workload {
    Workload {
        identity: Some("spiffe://example.org/agent".into()),
        name: Text::new(name),
        cgroup_id: 4711,
        cgroup: Some("/kubepods/pod1/c1".into()),
        unit: None,
        container: Some(Container {
            id: "c1".into(),
            name: Some("agent".into()),
            image: Some("registry.example/agent:1".into()),
        }),
        pod: Some(Pod { namespace: "default".into(), name: "agent-0".into(), uid: "u-1".into() }),
    }
}

fn verdict(verdict: Verdict, mode: Mode, text: impl AsRef<[u8]>) -> RecordBody {
    let event = Event {
        kind: RequestKind::Connect as u8,
        pid: 42,
        tid: 43,
        uid: 1000,
        comm: *b"python3\0leftover",
        key: RequestKey {
            target: [0, 0, 0xffff_u32.to_be(), 0xc000_0201_u32.to_be()],
            port: 443,
            protocol: 6,
            ..RequestKey::default()
        },
        ..Event::new_zeroed()
    };
    let start = ProcessStart { time: Timestamp::UNIX_EPOCH, boot_ns: 7 };
    let parent = Ancestor { pid: 1, start: Some(start), executable: Some(Text::new(&text)) };
    let process =
        Process { start: Some(start), executable: Some(Text::new(&text)), ..Process::of(&event) }
            .with_parents(std::iter::repeat_n(parent, 20));
    RecordBody::Verdict(Box::new(VerdictRecord {
        boot_ns: u64::MAX,
        workload: workload(&text),
        process,
        request: Request::of(&event, None).unwrap(),
        outcome: Outcome::new(verdict, mode),
        scope: Some("github:read".into()),
        grant: None,
        allowlist_generation: 3,
        hook: Word(Hook::Connect4),
        layer: Layer::Portable,
        folded: 12,
    }))
}

/// A request of a kind, as the kernel records it with a name.
fn requested(kind: RequestKind, key: RequestKey, name: &[u8]) -> Request {
    let name_length = u8::try_from(name.len()).unwrap();
    let event = Event { kind: kind as u8, key, name_length, ..Event::new_zeroed() };
    let mut path = [0xff; agentguard_common::event::PATH_BYTES];
    path[..name.len()].copy_from_slice(name);
    Request::of(&event, Some(&path)).unwrap()
}

fn denied(text: impl AsRef<[u8]>) -> RecordBody {
    verdict(Verdict::Deny(Reason::NotGranted), Mode::Enforce, text)
}

/// A denied request of any kind.
fn asked(request: Request) -> RecordBody {
    let RecordBody::Verdict(record) = denied("/usr/bin/curl") else { unreachable!() };
    RecordBody::Verdict(Box::new(VerdictRecord { request, ..*record }))
}

fn serving() -> RequestKey {
    RequestKey { port: 8080, protocol: 6, ..RequestKey::default() }
}

fn family(family: u32, protocol: u32) -> RequestKey {
    RequestKey { target: [family, protocol, 0, 0], ..RequestKey::default() }
}

fn peer(code: u8) -> RequestKey {
    RequestKey { protocol: code, ..RequestKey::default() }
}

fn stop(why: impl AsRef<[u8]>) -> RecordBody {
    RecordBody::Stop(StopRecord { why: Text::new(why), protection_stays: true })
}

/// One record of every kind that callers append.
fn one_of_each() -> Vec<RecordBody> {
    let missing = vec![Missing { what: "unix sockets".into(), why: "kernel 5.15".into() }];
    vec![
        denied("/usr/bin/curl"),
        verdict(Verdict::Deny(Reason::Expired), Mode::Audit, "/usr/bin/git"),
        verdict(Verdict::Allow, Mode::Enforce, "/usr/bin/git"),
        RecordBody::Start(StartRecord {
            version: "0.1.0".into(),
            kernel: "6.1.0".into(),
            adopted: true,
            protection: vec![LayerProtection {
                layer: Layer::Lsm,
                protection: ProtectionWord::Partial,
                missing: missing.clone(),
            }],
        }),
        asked(requested(RequestKind::Listen, serving(), b"")),
        asked(requested(RequestKind::Accept, serving(), b"")),
        asked(requested(RequestKind::Socket, family(40, 1), b"")),
        asked(requested(RequestKind::UnixConnect, peer(2), b"/run/docker.sock\0")),
        asked(requested(RequestKind::UnixSend, peer(0), b"\0a\nb\0")),
        stop("SIGTERM"),
        RecordBody::Grant(Box::new(GrantRecord {
            change: GrantChange::Revoked,
            grant: "g-1".into(),
            subject: "spiffe://example.org/*".into(),
            scopes: Text::list(["github:read"]),
            not_before: None,
            expires_at: Some(Timestamp::UNIX_EPOCH),
            granted_by: Some("alice".into()),
            why: Some("incident 7".into()),
            by: Some(Actor {
                source: ActorSource::Api,
                name: "/usr/bin/agentguard".into(),
                uid: Some(0),
                pid: Some(99),
            }),
        })),
        RecordBody::Workload(Box::new(WorkloadRecord {
            change: WorkloadChange::Added,
            workload: workload("agent"),
            mode: Word(Mode::Audit),
            protection: ProtectionWord::Partial,
            missing,
            inherited: vec![Inherited { descriptor: 3, closed: true }],
        })),
        RecordBody::ManifestError(ManifestErrorRecord {
            source: "/etc/agentguard/manifests/a.yaml".into(),
            line: Some(3),
            column: None,
            message: "unknown field `ports`".into(),
        }),
        RecordBody::Loss(LossRecord {
            cause: LossCause::RingBuffer,
            allowed: 0,
            denied: 0,
            other: 5,
            since: Timestamp::UNIX_EPOCH,
            until: Timestamp::UNIX_EPOCH,
            error: None,
        }),
    ]
}

async fn write(path: &Path, records: impl IntoIterator<Item = RecordBody>) -> Head {
    let log = open(path);
    for record in records {
        log.append(record);
    }
    log.flush().await.unwrap();
    log.close().await.unwrap();
    log.counts().head
}

fn kinds(report: &VerifyReport) -> Vec<FaultKind> {
    report.faults.iter().map(|fault| fault.kind.clone()).collect()
}

fn loss(body: &RecordBody) -> Option<&LossRecord> {
    if let RecordBody::Loss(loss) = body { Some(loss) } else { None }
}

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn every_kind_of_record_comes_back_as_it_was_appended_and_fits_the_schema() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    write(&path, one_of_each()).await;
    let schema = serde_json::to_value(schemars::schema_for!(Record)).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    let written = lines(&path);
    assert_eq!(written.len(), one_of_each().len());
    for (line, body) in written.iter().zip(one_of_each()) {
        let record = chain::parse(line).unwrap();
        assert_eq!(record.body, body);
        assert_eq!(record.node.as_str(), "node-1");
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        schema.validate(&value).unwrap_or_else(|error| panic!("{error}\n{line}"));
        // RFC 3339 in UTC with nine digits.
        assert_eq!(value["time"].as_str().unwrap().len(), "2026-01-01T00:00:00.123456789Z".len());
    }
}

#[test]
fn a_unix_socket_is_told_by_the_name_its_server_bound() {
    use agentguard_common::Peer;
    let other = Peer::Other as u8;
    let long = [b'n'; 108];
    let long_text = "n".repeat(108);
    for (name, code, path, abstract_name, whose) in [
        (&b"/run/a.sock\0"[..], other, Some("/run/a.sock"), None, "other"),
        (b"/run/a.sock", other, Some("/run/a.sock"), None, "other"),
        (b"a\x1b.sock\0", Peer::Own as u8, Some("a\\x1b.sock"), None, "own"),
        (b"\0tool", other, None, Some("tool"), "other"),
        (b"\0a\0b\0", other, None, Some("a\\x00b\\x00"), "other"),
        (b"\0", other, None, Some(""), "other"),
        (b"", Peer::Unnamed as u8, None, None, "unnamed"),
        (&long, other, Some(&long_text), None, "other"),
    ] {
        for (kind, action) in
            [(RequestKind::UnixConnect, "unix_connect"), (RequestKind::UnixSend, "unix_send")]
        {
            let value = serde_json::to_value(requested(kind, peer(code), name)).unwrap();
            let expected = serde_json::json!({
                "action": action, "path": path, "abstract": abstract_name, "peer": whose,
            });
            assert_eq!(value, expected);
        }
    }
}

#[test]
fn families_are_told_by_name_and_those_without_one_by_number() {
    for (number, name) in [(40, "AF_VSOCK"), (17, "AF_PACKET"), (999, "AF/999")] {
        let request = requested(RequestKind::Socket, family(number, 3), b"");
        let value = serde_json::to_value(request).unwrap();
        let expected = serde_json::json!({"action": "socket", "family": name, "protocol": 3});
        assert_eq!(value, expected);
    }
}

#[tokio::test]
async fn a_verdict_says_what_was_asked_what_was_decided_and_what_was_done() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    write(&path, one_of_each()).await;
    let value: serde_json::Value = serde_json::from_str(&lines(&path)[1]).unwrap();
    assert_eq!(value["kind"], "verdict");
    assert_eq!(value["verdict"], "deny");
    assert_eq!(value["reason"], "expired");
    assert_eq!(value["mode"], "audit");
    assert_eq!(value["refused"], false, "audit mode denies without refusing");
    assert_eq!(value["hook"], "cgroup/connect4");
    assert_eq!(value["grant"], serde_json::Value::Null);
    assert_eq!(value["request"]["action"], "connect");
    assert_eq!(value["request"]["address"], "192.0.2.1");
    assert_eq!(value["request"]["protocol"], "TCP");
    assert_eq!(value["process"]["comm"], "python3");
    assert_eq!(value["process"]["parents"].as_array().unwrap().len(), Process::MAX_PARENTS);
    let value: serde_json::Value = serde_json::from_str(&lines(&path)[0]).unwrap();
    assert_eq!(value["refused"], true);
}

#[tokio::test]
async fn a_line_is_checked_with_standard_tools_as_documented() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    write(&path, [stop("one"), denied(b"\xff\n\"\\,\"hash\":\"".as_slice()), stop("three")]).await;
    let script = r#"
        line=$(sed -n 2p audit.log)
        printf '%s' "${line%,\"hash\":*}" | sha256sum | cut -d' ' -f1
        sed -n '1,2s/.*"hash":"\([0-9a-f]*\)"}$/\1/p' audit.log
        sed -n '2s/.*"prev":"\([0-9a-f]*\)".*/\1/p' audit.log
    "#;
    let output =
        Command::new("sh").arg("-c").arg(script).current_dir(directory.path()).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let [sum, first, second, prev]: [&str; 4] =
        output.lines().collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(sum, second);
    assert_eq!(prev, first);
}

#[tokio::test]
async fn the_chain_goes_on_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    write(&path, [stop("first"), stop("second")]).await;
    let head = write(&path, [stop("third")]).await;
    let report = verify(&path, Some(head)).unwrap();
    assert_eq!(kinds(&report), []);
    assert_eq!((report.records, report.start, report.head), (3, Start::Beginning, Some(head)));
}

#[tokio::test]
async fn a_log_has_one_writer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let log = open(&path);
    let output = Output::File { path: path.clone(), limits: SMALL };
    let second = AuditLog::open(Options { output: output.clone(), queue: 8 }, "node-1");
    assert!(matches!(second, Err(OpenError::Locked(_))));
    log.close().await.unwrap();
    assert!(AuditLog::open(Options { output, queue: 8 }, "node-1").is_ok());
}

#[tokio::test]
async fn half_a_line_left_by_a_crash_is_closed_off_and_said() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    write(&path, [stop("first"), stop("second")]).await;
    let whole = fs::read(&path).unwrap();
    let second = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    for cut in [second + 1, second + 20, whole.len() - 2] {
        fs::write(&path, &whole[..cut]).unwrap();
        assert_eq!(kinds(&verify(&path, None).unwrap()), [FaultKind::Torn]);
        write(&path, [stop("third")]).await;
        let report = verify(&path, None).unwrap();
        assert_eq!(kinds(&report), []);
        assert_eq!((report.recovered, report.records), (1, 3));
        let lines = lines(&path);
        assert_eq!(lines[1].as_bytes(), &whole[second..cut], "what was left stays");
        let RecordBody::Recovered(recovered) = chain::parse(&lines[2]).unwrap().body else {
            panic!("no `recovered` record in {lines:?}");
        };
        assert_eq!(recovered.torn_bytes, (cut - second) as u64);
        // The torn line can not be exchanged for another.
        let mut forged = lines.clone();
        forged[1].push('x');
        fs::write(&path, forged.join("\n") + "\n").unwrap();
        assert_eq!(kinds(&verify(&path, None).unwrap()), [FaultKind::Malformed]);
    }
    // Only the newline is missing: the record is whole, and nothing has to be recovered.
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    write(&path, [stop("third")]).await;
    let report = verify(&path, None).unwrap();
    assert_eq!((kinds(&report), report.recovered, report.records), (vec![], 0, 3));
}

#[tokio::test]
async fn crash_after_crash_is_closed_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    write(&path, [stop("first")]).await;
    for _ in 0..3 {
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"seq\":2,\"ti\n\n{\"seq\"");
        fs::write(&path, bytes).unwrap();
        write(&path, [stop("next")]).await;
    }
    let report = verify(&path, None).unwrap();
    assert_eq!((kinds(&report), report.recovered), (vec![], 3));
}

/// Of one decision, as a daemon wrote it.
fn decided(boot_ns: u64) -> VerdictRecord {
    let RecordBody::Verdict(record) = denied("/usr/bin/curl") else { unreachable!() };
    VerdictRecord { boot_ns, ..*record }
}

#[tokio::test]
async fn the_last_verdict_is_found_wherever_it_stands() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let last = |log: &AuditLog| log.last_verdict().unwrap();
    let last_of = async |path: &Path| {
        let log = open(path);
        let found = last(&log);
        log.close().await.unwrap();
        found
    };
    let verdict = |boot_ns| RecordBody::Verdict(Box::new(decided(boot_ns)));
    write(&path, [stop("first")]).await;
    assert_eq!(last_of(&path).await, None, "there is none");
    write(&path, [verdict(1), verdict(2), stop("second")]).await;
    assert_eq!(last_of(&path).await, Some(decided(2)), "from before it was opened");
    let log = open(&path);
    assert_eq!(log.write_at(Timestamp::now(), &verdict(3), || true), Ok(()));
    assert_eq!(last(&log), Some(decided(3)));
    // More of other kinds than a file holds.
    for _ in 0..1500 {
        log.append(stop("x".repeat(2000)));
    }
    log.flush().await.unwrap();
    assert!(log.counts().rotations > 0, "{:?}", log.counts());
    assert_eq!(last(&log), Some(decided(3)), "in a file before the newest");
    log.close().await.unwrap();
    assert_eq!(last(&log), None, "a closed log is not read");
    write(&path, [verdict(4)]).await;
    // A line that was not written whole is none; one that lacks its newline alone is whole.
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(last_of(&path).await, Some(decided(4)));
    fs::write(&path, &whole[..whole.len() - 2]).unwrap();
    assert_eq!(last_of(&path).await, Some(decided(3)));
    // What is searched is bounded.
    let mut long = fs::read(&path).unwrap();
    long.extend(b"{}\n".repeat(4 << 20));
    fs::write(&path, long).unwrap();
    assert_eq!(last_of(&path).await, None);
}

#[test]
fn the_same_decision_is_known_whatever_was_looked_up_meanwhile() {
    let known = decided(7);
    let process = Process { start: None, executable: None, ..known.process.clone() };
    let workload = Workload { name: "gone".into(), pod: None, ..known.workload.clone() };
    let later = VerdictRecord { scope: None, process, workload, ..known.clone() };
    assert!(known != later && known.is_of_one_decision_with(&later));
    let others = [
        VerdictRecord { boot_ns: 8, ..known.clone() },
        VerdictRecord { hook: Word(Hook::Connect6), ..known.clone() },
        VerdictRecord { request: Request::Leave, ..known.clone() },
        VerdictRecord { allowlist_generation: 4, ..known.clone() },
        VerdictRecord { folded: 13, ..known.clone() },
        VerdictRecord { outcome: Outcome::new(Verdict::Allow, Mode::Enforce), ..known.clone() },
        VerdictRecord {
            process: Process { comm: "other".into(), ..known.process.clone() },
            ..known.clone()
        },
        VerdictRecord { process: Process { tid: 44, ..known.process.clone() }, ..known.clone() },
        VerdictRecord {
            workload: Workload { cgroup_id: 1, ..known.workload.clone() },
            ..known.clone()
        },
    ];
    for other in others {
        assert!(!known.is_of_one_decision_with(&other), "{other:?}");
    }
}

/// The bound holds, or the log takes no more and says so; after a restart too.
#[tokio::test]
async fn what_can_not_be_removed_stops_the_log_until_it_can() {
    async fn until(log: &AuditLog, is_it: impl Fn(&Counts) -> bool) {
        let begin = Instant::now();
        while !is_it(&log.counts()) {
            assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", log.counts());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let log = open(&path);
    log.append(denied("before"));
    log.flush().await.unwrap();
    // A directory by the name of the oldest file: it can not be removed as one.
    let stays = directory.path().join(format!("audit.log.{:020}", 0));
    fs::create_dir(&stays).unwrap();
    for _ in 0..900 {
        log.append(denied("\\".repeat(2000)));
    }
    until(&log, |counts| counts.failing).await;
    log.close().await.unwrap();

    let log = open(&path);
    log.append(denied("after"));
    until(&log, |counts| counts.failing).await;
    fs::remove_dir(&stays).unwrap();
    until(&log, |counts| !counts.failing && counts.queued == 0).await;
    log.close().await.unwrap();
    let report = verify(&path, None).unwrap();
    assert_eq!(kinds(&report), []);
    assert!(report.files.len() <= SMALL.max_files as usize, "{:?}", report.files);
}

#[tokio::test]
async fn rotation_keeps_the_bound_on_disk_and_the_chain() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let bound = SMALL.max_file_bytes * u64::from(SMALL.max_files);
    let mut seen = 0;
    let mut written = 0;
    let mut log = open(&path);
    for round in 0..40 {
        for _ in 0..30 {
            log.append(denied("\\".repeat(2000)));
        }
        log.flush().await.unwrap();
        if round % 7 == 0 {
            written += log.counts().written;
            log.close().await.unwrap();
            log = open(&path);
        }
        let sizes = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect::<Vec<_>>();
        assert!(sizes.iter().all(|size| *size <= SMALL.max_file_bytes), "{sizes:?}");
        assert!(sizes.len() <= SMALL.max_files as usize);
        seen = seen.max(sizes.iter().sum());
        let report = verify(directory.path(), Some(log.counts().head)).unwrap();
        assert_eq!(kinds(&report), []);
    }
    written += log.counts().written;
    assert!(seen <= bound && seen > bound / 2, "{seen} of {bound}");
    let report = verify(&path, None).unwrap();
    assert_eq!(report.start, Start::RotatedAway);
    assert_eq!(report.head.unwrap().seq, written);
    assert_eq!(report.files.len(), SMALL.max_files as usize);

    // The oldest kept file taken away by somebody else shows; a file of the log by itself is fine.
    let oldest = report.files[0].clone();
    let part = verify(&report.files[1], None).unwrap();
    assert_eq!((kinds(&part), part.start), (vec![], Start::NotGiven));
    fs::remove_file(oldest).unwrap();
    let report = verify(&path, None).unwrap();
    assert!(matches!(kinds(&report)[..], [FaultKind::MissingStart { .. }]), "{report:?}");
}

#[tokio::test]
async fn a_log_that_is_moved_away_is_begun_anew_and_the_gap_shows() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let log = open(&path);
    log.append(stop("first"));
    log.flush().await.unwrap();
    fs::remove_file(&path).unwrap();
    log.append(stop("second"));
    log.flush().await.unwrap();
    assert_eq!(log.counts().written, 3);
    let report = verify(&path, None).unwrap();
    assert_eq!((report.first_seq, report.records), (Some(2), 2));
    assert_eq!(kinds(&report), [FaultKind::MissingStart { from: 1, to: 1 }]);
    // Neither a restart nor what is written later covers it.
    log.close().await.unwrap();
    write(&path, [stop("third")]).await;
    let report = verify(&path, None).unwrap();
    assert_eq!(kinds(&report), [FaultKind::MissingStart { from: 1, to: 1 }]);
}

#[tokio::test]
async fn faults_are_named_by_file_and_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let head = write(&path, (1..=6).map(|number| stop(number.to_string()))).await;
    let whole = lines(&path);
    let check = |lines: &[&str], faults: &[(u64, FaultKind)]| {
        fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        let report = verify(&path, Some(head)).unwrap();
        let found: Vec<_> =
            report.faults.iter().map(|fault| (fault.line, fault.kind.clone())).collect();
        assert_eq!(found, faults);
        assert!(report.faults.iter().all(|fault| fault.file == path));
    };
    let [a, b, c, d, e, f] = whole.iter().map(String::as_str).collect::<Vec<_>>()[..] else {
        panic!("six lines");
    };
    check(&[a, b, c, d, e, f], &[]);
    check(&[a, b, d, e, f], &[(3, FaultKind::Missing { from: 3, to: 3 })]);
    check(&[a, e, f], &[(2, FaultKind::Missing { from: 2, to: 4 })]);
    check(&[b, c, d, e, f], &[(1, FaultKind::MissingStart { from: 1, to: 1 })]);
    check(&[a, b, c, d, e], &[(0, FaultKind::MissingEnd { seq: 6 })]);
    check(&[a, b, d, c, e, f], &[(4, FaultKind::Reordered { seq: 3, after: 4 })]);
    check(&[a, b, c, c, d, e, f], &[(4, FaultKind::Duplicated { seq: 3 })]);
    check(&[a, b, c, d, e, f, a], &[(7, FaultKind::Duplicated { seq: 1 })]);
    let changed = c.replace("\"why\":\"3\"", "\"why\":\"4\"");
    check(&[a, b, &changed, d, e, f], &[(3, FaultKind::Changed { seq: 3 })]);
    check(&[a, b, "", c, d, e, f], &[(3, FaultKind::Malformed)]);
    // A record with a hash of its own in the place of another.
    let (cut, _) = changed.rsplit_once(",\"hash\":").unwrap();
    let forged = format!("{cut},\"hash\":\"{}\"}}", Hash::of(cut.as_bytes()));
    check(&[a, b, &forged, d, e, f], &[(4, FaultKind::Unlinked { seq: 4 })]);
}

#[tokio::test]
async fn subscribers_get_the_lines_that_are_in_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let log = open(&path);
    let mut subscriber = log.subscribe();
    log.append(stop("first"));
    log.append(denied("second"));
    log.flush().await.unwrap();
    for line in lines(&path) {
        assert_eq!(&*subscriber.recv().await.unwrap(), line);
    }
}

/// A stream that takes nothing until it is told to.
struct Gate(mpsc::Receiver<()>, Arc<Mutex<Vec<u8>>>);

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Once the other end is gone, the gate is open.
        let _ = self.0.recv();
        self.1.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_reader_that_stands_still_blocks_only_who_waits_and_nothing_is_lost_unsaid() {
    let (open, gate) = mpsc::channel();
    let written = Arc::new(Mutex::new(Vec::new()));
    let log = AuditLog::to_stream(Gate(gate, Arc::clone(&written)), "node-1", 100).unwrap();
    let before = Instant::now();
    for _ in 0..1000 {
        log.append(stop("flood"));
    }
    assert!(before.elapsed() < Duration::from_secs(5));
    let lost = log.counts().lost;
    assert_eq!(lost, 900, "one in the writer's hand is queued, too");
    let waiting = log.clone();
    let waits = std::thread::spawn(move || {
        waiting.write_at(Timestamp::now(), &denied("x"), || panic!("writing does not fail"))
    });
    std::thread::sleep(Duration::from_millis(200));
    assert!(!waits.is_finished());
    assert_eq!(log.counts().lost, lost);
    drop(open);
    assert_eq!(waits.join().unwrap(), Ok(()));
    log.flush().await.unwrap();
    log.close().await.unwrap();
    assert_eq!(log.write_at(Timestamp::now(), &denied("late"), || false), Err(NotWritten));
    let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
    let records: Vec<Record> = text.lines().map(|line| chain::parse(line).unwrap()).collect();
    let last = records.last().unwrap();
    assert_eq!(last.body.class(), Class::Denied, "what was appended before comes before");
    assert_eq!(records.iter().filter(|record| record.body.class() == Class::Denied).count(), 1);
    let losses: Vec<&LossRecord> = records.iter().filter_map(|record| loss(&record.body)).collect();
    assert_eq!(losses.iter().map(|loss| loss.other).sum::<u64>(), lost);
    assert!(losses.iter().all(|loss| loss.denied == 0 && loss.cause == LossCause::Queue));
}

/// Runs the test of this name again inside a mount namespace of its own, with a file system of
/// 2 MiB at the working directory. The namespace takes its mounts with it when it ends.
fn on_a_small_disk(name: &str) {
    let directory = tempfile::tempdir().unwrap();
    let namespace = if nix::unistd::geteuid().is_root() { "-m" } else { "-Urm" };
    let script =
        r#"mount -t tmpfs -o size=2m none "$1" && cd "$1" && exec "$2" --exact "$3" --nocapture"#;
    let output = Command::new("unshare")
        .args([namespace, "--propagation", "private", "sh", "-c", script, "sh"])
        .arg(directory.path())
        .arg(std::env::current_exe().unwrap())
        .arg(name)
        .env("AGENTGUARD_TEST_SMALL_DISK", "1")
        .output()
        .expect("`unshare` of util-linux is needed to test a full disk");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "the mount is gone");
}

#[test]
fn a_full_disk_is_counted_retried_and_said_once_it_has_room_again() {
    if std::env::var_os("AGENTGUARD_TEST_SMALL_DISK").is_none() {
        on_a_small_disk(
            "audit::tests::a_full_disk_is_counted_retried_and_said_once_it_has_room_again",
        );
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let path = Path::new("audit.log");
        fs::write("ballast", vec![0; 1 << 20]).unwrap();
        let log = open_with(path, 200);
        // Limits would allow 3 MiB, and there is less than one.
        for _ in 0..60 {
            for _ in 0..100 {
                log.append(denied("x".repeat(900)));
            }
            if log.flush().await.is_err() {
                break;
            }
        }
        let full = log.counts();
        assert!(full.failing && full.write_failures > 0, "{full:?}");
        for _ in 0..500 {
            log.append(denied("after"));
        }
        assert!(log.counts().lost >= 300);
        assert!(matches!(log.flush().await, Err(FlushError::Failing(_))));
        let torn = verify(path, None).unwrap();
        assert_eq!(kinds(&torn), [], "no half line is left");
        let lost = log.counts().lost;
        let now = Timestamp::now();
        let asked = std::cell::Cell::new(0);
        let gives_up = || {
            asked.set(asked.get() + 1);
            asked.get() == 2
        };
        assert_eq!(log.write_at(now, &denied("x".repeat(900)), gives_up), Err(NotWritten));
        assert_eq!((asked.get(), log.counts().lost), (2, lost), "who has it has it still");

        fs::remove_file("ballast").unwrap();
        let waited = Instant::now();
        while log.counts().failing {
            assert!(waited.elapsed() < Duration::from_secs(10), "{:?}", log.counts());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(log.write_at(now, &denied("x".repeat(900)), || true), Ok(()));
        log.flush().await.unwrap();
        log.close().await.unwrap();
        let counts = log.counts();
        assert!(!counts.failing && counts.queued == 0, "{counts:?}");
        let report = verify(path, Some(counts.head)).unwrap();
        assert_eq!(kinds(&report), []);
        assert_eq!(report.records, counts.written);
        let said: u64 = lines(path)
            .iter()
            .filter_map(|line| Some(loss(&chain::parse(line).unwrap().body)?.denied))
            .sum();
        assert_eq!(said, counts.lost);
    });
}

#[test]
fn limits_that_can_not_be_kept_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let open = |limits| {
        AuditLog::open(
            Options { output: Output::File { path: path.clone(), limits }, queue: 8 },
            "node-1",
        )
    };
    let error = open(Limits { max_file_bytes: 1000, ..SMALL }).err().unwrap();
    assert_eq!(error.to_string(), "audit.max_file_bytes is 1000; the least is 1048576");
    let error = open(Limits { max_files: 1, ..SMALL }).err().unwrap();
    assert_eq!(error.to_string(), "audit.max_files is 1; the least is 2");
}

/// What somebody does to the file of a log with some lines.
#[derive(Clone, Debug)]
enum Tampering {
    Change { at: prop::sample::Index, to: u8 },
    Remove { line: prop::sample::Index },
    Duplicate { line: prop::sample::Index, to: prop::sample::Index },
    Swap { line: prop::sample::Index, with: prop::sample::Index },
    Truncate { at: prop::sample::Index },
}

fn tampering() -> impl Strategy<Value = Tampering> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, to)| Tampering::Change { at, to }),
        1 => index().prop_map(|line| Tampering::Remove { line }),
        1 => (index(), index()).prop_map(|(line, to)| Tampering::Duplicate { line, to }),
        1 => (index(), index()).prop_map(|(line, with)| Tampering::Swap { line, with }),
        1 => index().prop_map(|at| Tampering::Truncate { at }),
    ]
}

/// The bytes of a log after tampering.
fn tamper(bytes: &[u8], tampering: &Tampering) -> Vec<u8> {
    let mut lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
    match tampering {
        Tampering::Change { at, to } => {
            let mut bytes = bytes.to_vec();
            let at = at.index(bytes.len());
            bytes[at] = *to;
            return bytes;
        }
        Tampering::Truncate { at } => return bytes[..at.index(bytes.len())].to_vec(),
        Tampering::Remove { line } => {
            lines.remove(line.index(lines.len()));
        }
        Tampering::Duplicate { line, to } => {
            let line = lines[line.index(lines.len())];
            lines.insert(to.index(lines.len()), line);
        }
        Tampering::Swap { line, with } => {
            let (line, with) = (line.index(lines.len()), with.index(lines.len()));
            lines.swap(line, with);
        }
    }
    lines.concat()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn hostile_text_breaks_neither_line_nor_chain(
        texts in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..2000),
                "(\n|\r|\\x1b\\[2J|\",\"hash\":\"|\u{202e}|\\\\|\0|.){0,40}".prop_map(String::into_bytes),
            ],
            1..8,
        ),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.log");
        let bodies: Vec<RecordBody> =
            texts.iter().flat_map(|text| [denied(text), stop(text)]).collect();
        let head = block_on(write(&path, bodies.clone()));
        let report = verify(&path, Some(head)).unwrap();
        prop_assert_eq!(kinds(&report), vec![]);
        let text = fs::read_to_string(&path).unwrap();
        prop_assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
        let read: Vec<RecordBody> =
            text.lines().map(|line| chain::parse(line).unwrap().body).collect();
        prop_assert_eq!(read, bodies);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_done_to_a_log_shows(tampering in tampering()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.log");
        let mut head = Head::EMPTY;
        let mut log = String::new();
        for body in one_of_each() {
            let (line, next) =
                chain::line(&head, Timestamp::UNIX_EPOCH, &"node-1".into(), &body).unwrap();
            log.push_str(&line);
            log.push('\n');
            head = next;
        }
        let after = tamper(log.as_bytes(), &tampering);
        fs::write(&path, &after).unwrap();
        let report = verify(&path, Some(head)).unwrap();
        prop_assert_eq!(report.is_intact(), after == log.as_bytes(), "{:?}", report);
    }
}
