//! Every verdict is counted, and told of, folded or lost: exactly.

use std::ops::ControlFlow;
use std::thread;

use agentguard_common::stats::{Counters, Fate};
use agentguard_common::{Mode, event::Hook};

use crate::fixture::{Fixture, SMALL};

const THREADS: u64 = 4;
const EACH: u64 = 300_000;

fn connects(counters: &Counters) -> u64 {
    counters.iter().filter(|kind| kind.0 == Hook::Connect4).map(|kind| kind.3).sum()
}

/// Refused connects from all threads at once, with rings that hold next to nothing.
fn flood(kind: &str) -> (Fixture, Counters) {
    let sizes = agentguard::datapath::Sizes { denied_ring: 4096, allowed_ring: 4096, ..SMALL };
    let mut fixture = Fixture::with(sizes);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    let all = THREADS * EACH;
    assert_eq!(worker.told(&format!("flood {kind} {THREADS} {EACH}")), all.to_string());
    let counters = fixture.counters();
    assert_eq!(connects(&counters), all);
    (fixture, counters)
}

#[test]
fn a_flood_of_identical_requests_is_folded_and_counted_exactly() {
    let (_fixture, counters) = flood("identical");
    assert!(counters.of(Fate::Aggregated) > counters.of(Fate::Logged));
}

#[test]
fn a_flood_of_distinct_requests_is_lost_in_part_and_counted_exactly() {
    let (fixture, counters) = flood("distinct");
    assert!(counters.of(Fate::Lost) > 0);
    let mut read = 0;
    let mut rings = fixture.datapath.rings().unwrap();
    let mut take = |record: Result<_, _>| {
        read += u64::from(record.is_ok());
        ControlFlow::Continue(())
    };
    // What is not taken stays, and is there the next time.
    assert_eq!(rings.drain(1000, |_record| ControlFlow::Break(())), 0);
    while rings.drain(1000, &mut take) > 0 {}
    assert_eq!(read, counters.of(Fate::Logged));
    assert!(rings.may_have_lost() && !rings.may_have_lost());
}

#[test]
fn counters_that_are_read_while_they_count_reconcile() {
    let mut fixture = Fixture::with(SMALL);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    let mut last = fixture.counters();
    let mut changes = 0;
    let mut look = || {
        let counters = fixture.counters();
        let fates = Fate::ALL.map(|fate| counters.of(fate));
        assert_eq!(counters.decided(), fates.iter().sum::<u64>(), "{fates:?}");
        let grew = last.cells.iter().zip(&counters.cells).all(|(before, now)| before <= now);
        assert!(grew, "every counter only grows");
        changes += usize::from(counters.decided() > last.decided());
        last = counters;
    };
    thread::scope(|scope| {
        let flood = scope.spawn(|| worker.told(&format!("flood identical {THREADS} {EACH}")));
        while !flood.is_finished() {
            look();
        }
        assert_eq!(flood.join().unwrap(), (THREADS * EACH).to_string());
    });
    look();
    assert_eq!(connects(&last), THREADS * EACH);
    assert!(changes > 100, "read {changes} times while they counted");
}
