use agentguard_common::allowlist::NEVER;
use proptest::prelude::*;

use super::*;
use crate::scope::ScopeDocument;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn id(text: &str) -> GrantId {
    text.parse().unwrap()
}

fn identity() -> SpiffeId {
    "spiffe://example.org/agent".parse().unwrap()
}

/// A grant in a window of seconds; no end makes it standing.
fn grant(name: &str, start: Option<i64>, end: Option<i64>) -> GrantDocument {
    GrantDocument {
        id: id(name),
        subject: "spiffe://example.org/".parse().unwrap(),
        scopes: vec!["x:read".parse().unwrap()],
        not_before: start.map(at),
        expiry: end.map_or(Expiry::Never, |end| Expiry::At(at(end))),
        granted_by: "team".to_owned(),
        reason: "test".to_owned(),
    }
}

fn catalogue() -> Catalogue {
    let scope = ScopeDocument {
        name: "x".parse().unwrap(),
        scope: "x:read".parse().unwrap(),
        description: "a scope".to_owned(),
        egress: Vec::new(),
        exec: vec!["/bin/sh".parse().unwrap()],
        unix_sockets: Vec::new(),
        listen: Vec::new(),
    };
    Catalogue::new([scope]).unwrap()
}

fn store() -> GrantStore {
    GrantStore::new(Clock::started_at(at(0)))
}

fn add(store: &mut GrantStore, document: GrantDocument) -> Result<(), AddError> {
    store.add(document, Source::Api { uid: 1000 }, &catalogue())
}

fn revoke(store: &mut GrantStore, name: &str, second: i64) -> Result<(), RevokeError> {
    let (by, reason) = ("admin".to_owned(), "leak".to_owned());
    store.revoke(&id(name), by, reason, at(second)).map(drop)
}

fn word(store: &GrantStore, name: &str, second: i64) -> &'static str {
    match store.state(&id(name), at(second)) {
        None => "none",
        Some(State::Pending) => "pending",
        Some(State::Active) => "active",
        Some(State::Expired) => "expired",
        Some(State::Revoked(_)) => "revoked",
    }
}

#[test]
fn a_grant_is_active_within_its_window_only() {
    let mut store = store();
    add(&mut store, grant("a", Some(10), Some(20))).unwrap();
    let cases = [(9, "pending"), (10, "active"), (19, "active"), (20, "expired")];
    for (second, expected) in cases {
        assert_eq!(word(&store, "a", second), expected, "{second}");
        let active = usize::from(expected == "active");
        assert_eq!(store.of(&identity(), at(second)).count(), active, "{second}");
    }
    let stranger = "spiffe://example.com/agent".parse().unwrap();
    assert_eq!(store.of(&stranger, at(10)).count(), 0);
    assert_eq!(store.next_change(at(9)), Some(at(10)));
    assert_eq!(store.next_change(at(10)), Some(at(20)));
    assert_eq!(store.next_change(at(20)), None);
}

#[test]
fn a_grant_that_can_not_be_added_changes_nothing() {
    let mut store = store();
    add(&mut store, grant("a", None, Some(20))).unwrap();
    assert_eq!(add(&mut store, grant("a", None, None)), Err(AddError::IdTaken(id("a"))));
    let scope: ScopeName = "x:write".parse().unwrap();
    let unknown = GrantDocument { scopes: vec![scope.clone()], ..grant("b", None, None) };
    let refused = AddError::UnknownScope { grant: id("b"), scope };
    assert_eq!(add(&mut store, unknown), Err(refused));
    assert_eq!(store.grants().len(), 1);
}

#[test]
fn only_what_is_not_over_can_be_revoked() {
    let mut store = store();
    add(&mut store, grant("a", Some(10), Some(20))).unwrap();
    add(&mut store, grant("b", None, Some(5))).unwrap();
    assert_eq!(revoke(&mut store, "c", 1), Err(RevokeError::Unknown(id("c"))));
    assert_eq!(revoke(&mut store, "b", 5), Err(RevokeError::AlreadyOver(id("b"))));
    assert_eq!(revoke(&mut store, "a", 1), Ok(()));
    assert_eq!(revoke(&mut store, "a", 2), Err(RevokeError::AlreadyOver(id("a"))));
    assert_eq!(word(&store, "a", 15), "revoked");
    assert_eq!(word(&store, "a", 25), "revoked");
    assert_eq!(store.next_change(at(6)), None);
}

#[test]
fn a_revoked_manifest_stays_revoked_until_it_is_gone_and_comes_back_changed() {
    let mut store = store();
    let (first, other) = (grant("a", None, Some(20)), grant("a", None, Some(30)));
    store.replace_manifests(vec![first.clone()]);
    revoke(&mut store, "a", 1).unwrap();
    for documents in [vec![first.clone()], vec![other.clone()], vec![], vec![first.clone()]] {
        let present = !documents.is_empty();
        store.replace_manifests(documents);
        assert_eq!(word(&store, "a", 2), if present { "revoked" } else { "none" });
    }
    // It was back for a while, so editing it does not lift the revocation.
    store.replace_manifests(vec![other.clone()]);
    assert_eq!(word(&store, "a", 2), "revoked");
    store.replace_manifests(vec![]);
    store.replace_manifests(vec![other]);
    assert_eq!(word(&store, "a", 2), "active");
}

#[test]
fn replacing_manifests_says_what_changed() {
    let mut store = store();
    add(&mut store, grant("api", None, None)).unwrap();
    let set = |ends: &[(&str, i64)]| {
        ends.iter().map(|(name, end)| grant(name, None, Some(*end))).collect::<Vec<_>>()
    };
    store.replace_manifests(set(&[("a", 1), ("b", 1), ("c", 1)]));
    let documents = set(&[("d", 1), ("b", 2), ("c", 1), ("api", 1), ("d", 2)]);
    let changes = store.replace_manifests(documents.clone());
    let expected = Changes {
        added: vec![id("d")],
        changed: vec![id("b")],
        removed: vec![id("a")],
        refused: vec![id("api"), id("d")],
    };
    assert_eq!(changes, expected);
    assert_eq!(store.get(&id("api")).unwrap().document.expiry, Expiry::Never);
    assert!(store.replace_manifests(documents).is_empty());
}

#[test]
fn the_end_in_boot_time_stays_until_the_clock_is_set() {
    let mut store = store();
    add(&mut store, grant("a", None, Some(20))).unwrap();
    add(&mut store, grant("b", None, None)).unwrap();
    assert_eq!(store.get(&id("a")).unwrap().boot_expiry, 20_000_000_000);
    store.set_clock(Clock::started_at(at(5)));
    assert_eq!(store.get(&id("a")).unwrap().boot_expiry, 15_000_000_000);
    assert_eq!(store.get(&id("b")).unwrap().boot_expiry, NEVER);
}

#[test]
fn what_is_long_over_is_forgotten_but_not_its_revocation() {
    let mut store = store();
    let keep = Duration::from_secs(10);
    store.replace_manifests(vec![grant("file", None, Some(5))]);
    add(&mut store, grant("old", None, Some(5))).unwrap();
    add(&mut store, grant("revoked", None, Some(50))).unwrap();
    add(&mut store, grant("active", None, Some(100))).unwrap();
    revoke(&mut store, "revoked", 6).unwrap();
    assert_eq!(store.prune(at(14), keep), []);
    assert_eq!(store.prune(at(16), keep), [id("old"), id("revoked")]);
    let again = add(&mut store, grant("revoked", None, Some(50)));
    assert_eq!(again, Err(AddError::Revoked(id("revoked"))));
    assert_eq!(store.prune(at(60), keep), []);
    // It has expired by now, so that adding it again gives nothing.
    assert_eq!(store.snapshot(), {
        let mut expected = GrantStore::new(Clock::started_at(at(0)));
        add(&mut expected, grant("active", None, Some(100))).unwrap();
        expected.snapshot()
    });
    add(&mut store, grant("revoked", None, Some(70))).unwrap();
    assert_eq!(word(&store, "revoked", 60), "active");
    assert_eq!(store.prune(Timestamp::MIN, Duration::MAX), []);
}

#[test]
fn a_snapshot_brings_back_grants_and_revocations_through_json() {
    let mut store = store();
    let file = grant("file", None, None);
    store.replace_manifests(vec![file.clone()]);
    add(&mut store, grant("a", Some(1), Some(20))).unwrap();
    store.add(grant("b", None, None), Source::Exec { uid: 7 }, &catalogue()).unwrap();
    revoke(&mut store, "file", 1).unwrap();
    revoke(&mut store, "b", 2).unwrap();
    let text = serde_json::to_string(&store.snapshot()).unwrap();

    let mut next = GrantStore::new(Clock::started_at(at(0)));
    next.restore(serde_json::from_str(&text).unwrap()).unwrap();
    next.replace_manifests(vec![file]);
    assert_eq!(next.grants, store.grants);
    assert_eq!(next.revocations, store.revocations);
}

#[test]
fn a_revoked_manifest_that_went_while_the_daemon_was_down_is_gone() {
    let mut before = store();
    before.replace_manifests(vec![grant("a", None, Some(20))]);
    revoke(&mut before, "a", 1).unwrap();
    let mut store = store();
    store.restore(before.snapshot()).unwrap();
    store.replace_manifests(vec![]);
    store.replace_manifests(vec![grant("a", None, Some(30))]);
    assert_eq!(word(&store, "a", 2), "active");
}

#[test]
fn a_damaged_snapshot_restores_nothing() {
    let mut whole = store();
    add(&mut whole, grant("a", None, Some(20))).unwrap();
    add(&mut whole, grant("b", None, None)).unwrap();
    let text = serde_json::to_string(&whole.snapshot()).unwrap();
    let cases = [
        ("\"version\":1", "\"version\":2"),
        ("\"id\":\"b\"", "\"id\":\"B\""),
        ("spiffe://", "http://"),
        ("\"standing\":true", "\"standing\":false"),
        ("[\"x:read\"]", "[]"),
    ];
    for (from, to) in cases {
        let damaged = text.replacen(from, to, 1);
        assert_ne!(damaged, text);
        let mut store = store();
        assert!(store.restore(serde_json::from_str(&damaged).unwrap()).is_err(), "{to}");
        assert_eq!(store.grants().len(), 0, "{to}");
    }
}

/// What can happen to a store; grants are told apart by one of three ids and their end.
#[derive(Clone, Debug)]
enum Step {
    Replace(BTreeMap<usize, Option<i64>>),
    Add(usize, Option<i64>),
    Revoke(usize),
    Advance(i64),
    Restart,
}

const NAMES: [&str; 3] = ["a", "b", "c"];

fn step() -> impl Strategy<Value = Step> {
    let end = || prop::option::of(1..12_i64);
    prop_oneof![
        prop::collection::btree_map(0..3_usize, end(), 0..3).prop_map(Step::Replace),
        (0..3_usize, end()).prop_map(|(name, end)| Step::Add(name, end)),
        (0..3_usize).prop_map(Step::Revoke),
        (1..4_i64).prop_map(Step::Advance),
        Just(Step::Restart),
    ]
}

/// One id by itself, as the rules say it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    /// The end, and whether it is a manifest's.
    present: Option<(Option<i64>, bool)>,
    revoked: Option<Option<i64>>,
    gone_since: bool,
}

impl Model {
    fn appear(&mut self, end: Option<i64>, is_manifest: bool) {
        if self.gone_since && self.revoked != Some(end) {
            self.revoked = None;
        }
        self.gone_since = false;
        self.present = Some((end, is_manifest));
    }

    fn word(&self, now: i64) -> &'static str {
        match (self.present, self.revoked) {
            (None, _) => "none",
            (Some(_), Some(_)) => "revoked",
            (Some((Some(end), _)), None) if end <= now => "expired",
            (Some(_), None) => "active",
        }
    }
}

proptest! {
    #[test]
    fn the_store_follows_the_rules_whatever_happens(steps in prop::collection::vec(step(), 1..40)) {
        let mut store = store();
        let mut models: [Model; 3] = Default::default();
        let mut now = 0;
        for step in steps {
            match step {
                Step::Replace(wanted) => {
                    for (index, model) in models.iter_mut().enumerate() {
                        match (wanted.get(&index), model.present) {
                            (Some(end), Some((_, true))) => model.present = Some((*end, true)),
                            (Some(end), None) => model.appear(*end, true),
                            (None, Some((_, true))) => {
                                model.present = None;
                                model.gone_since = true;
                            }
                            (_, Some((_, false))) | (None, None) => {}
                        }
                    }
                    let document = |(name, end): (usize, Option<i64>)| grant(NAMES[name], None, end);
                    store.replace_manifests(wanted.into_iter().map(document).collect());
                }
                Step::Add(name, end) => {
                    let added = add(&mut store, grant(NAMES[name], None, end)).is_ok();
                    let model = &mut models[name];
                    let may = model.present.is_none() && model.revoked != Some(end);
                    prop_assert_eq!(added, may);
                    if may {
                        model.appear(end, false);
                    }
                }
                Step::Revoke(name) => {
                    let revoked = revoke(&mut store, NAMES[name], now).is_ok();
                    let model = &mut models[name];
                    prop_assert_eq!(revoked, model.word(now) == "active");
                    if revoked {
                        model.revoked = model.present.map(|(end, _)| end);
                    }
                }
                Step::Advance(seconds) => now += seconds,
                Step::Restart => {
                    let manifests = store.grants().filter(|grant| grant.source == Source::Manifest);
                    let manifests = manifests.map(|grant| grant.document.clone()).collect();
                    let mut next = GrantStore::new(Clock::started_at(at(0)));
                    next.restore(store.snapshot()).unwrap();
                    next.replace_manifests(manifests);
                    store = next;
                }
            }
            let mut active = 0;
            for (name, model) in NAMES.iter().zip(&models) {
                prop_assert_eq!(word(&store, name, now), model.word(now));
                active += usize::from(model.word(now) == "active");
            }
            prop_assert_eq!(store.of(&identity(), at(now)).count(), active);
            let counts = store.counts(at(now));
            let Counts { pending, active: counted, expired, revoked, standing } = counts;
            prop_assert_eq!((counted, pending), (active, 0));
            prop_assert_eq!(counted + pending + expired + revoked, store.grants().len());
            prop_assert!(standing <= active);
            // Nothing changes by itself before the moment that was announced.
            let quiet_until = store.next_change(at(now)).map_or(now + 20, |next| next.as_second());
            for second in now..quiet_until {
                prop_assert_eq!(store.counts(at(second)), counts);
            }
        }
    }
}
