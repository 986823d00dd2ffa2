//! Every verdict is counted, and told of, folded or lost: exactly.

use std::ops::ControlFlow;
use std::thread;

use agentguard_common::{Mode, event::Hook};

use crate::fixture::{Fixture, SMALL};

const THREADS: u64 = 4;
const EACH: u64 = 300_000;

/// Refused connects from all threads at once, with rings that hold next to nothing.
fn flood(kind: &str) -> (Fixture, agentguard_common::stats::Counters) {
    let sizes = agentguard::datapath::Sizes { denied_ring: 4096, allowed_ring: 4096, ..SMALL };
    let mut fixture = Fixture::with(sizes);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    let all = THREADS * EACH;
    assert_eq!(worker.told(&format!("flood {kind} {THREADS} {EACH}")), all.to_string());
    let counters = fixture.counters();
    let connects: u64 =
        counters.iter().filter(|cell| cell.0 == Hook::Connect4).map(|cell| cell.3).sum();
    assert_eq!(connects, all);
    assert!(counters.reconciles());
    (fixture, counters)
}

#[test]
fn a_flood_of_identical_requests_is_folded_and_counted_exactly() {
    let (_fixture, counters) = flood("identical");
    assert!(counters.aggregated > counters.logged);
}

#[test]
fn a_flood_of_distinct_requests_is_lost_in_part_and_counted_exactly() {
    let (fixture, counters) = flood("distinct");
    assert!(counters.lost > 0);
    let mut read = 0;
    let mut rings = fixture.datapath.rings().unwrap();
    let mut take = |record: Result<_, _>| {
        read += u64::from(record.is_ok());
        ControlFlow::Continue(())
    };
    // What is not taken stays, and is there the next time.
    assert_eq!(rings.drain(1000, |_record| ControlFlow::Break(())), 0);
    while rings.drain(1000, &mut take) > 0 {}
    assert_eq!(read, counters.logged);
    assert!(rings.may_have_lost() && !rings.may_have_lost());
}

#[test]
fn counters_that_are_read_while_they_count_reconcile() {
    let mut fixture = Fixture::with(SMALL);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    let mut decided = Vec::new();
    thread::scope(|scope| {
        let flood = scope.spawn(|| worker.told(&format!("flood identical {THREADS} {EACH}")));
        while !flood.is_finished() {
            let counters = fixture.counters();
            assert!(
                counters.reconciles(),
                "{} decided = {} logged + {} aggregated + {} lost",
                counters.decided(),
                counters.logged,
                counters.aggregated,
                counters.lost
            );
            decided.push(counters.decided());
        }
        assert_eq!(flood.join().unwrap(), (THREADS * EACH).to_string());
    });
    assert!(decided.is_sorted(), "counters only grow");
    decided.dedup();
    assert!(decided.len() > 100, "read {} times while they counted", decided.len());
}
