//! Who belongs to a workload, and what happens to those that leave.

use std::{fs, path::PathBuf, process::Command};

use agentguard::datapath::Datapath;
use agentguard_common::Mode;
use nix::{
    sys::wait::{Id, WaitPidFlag, waitid},
    unistd::Pid,
};

use agentguard_tests::wait_until;

use crate::fixture::{Fixture, SCARCE, WORKLOAD, cgroup_id, move_to};
use crate::worker::Worker;

const CONNECT: &str = "connect udp 127.0.0.1:9";

#[test]
fn a_process_that_moves_itself_out_is_killed() {
    let mut fixture = Fixture::new();
    let outside = fixture.outside();
    let mut worker = fixture.worker();
    let out = format!("move {}", outside.display());
    assert_eq!(worker.told(&out), "ok", "before");
    move_to(&fixture.cgroup, worker.pid());
    // It was there before the cgroup was captured.
    fixture.attach(Mode::Enforce, &[]);
    assert_eq!(worker.told(&out), "killed", "attached");
    let mut worker = fixture.worker();
    fixture.detach();
    assert_eq!(worker.told(&out), "ok", "detached");
}

#[test]
fn a_process_that_moves_itself_out_in_audit_mode_keeps_its_tag() {
    let mut fixture = Fixture::new();
    let outside = fixture.outside();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Audit, &[]);
    assert_eq!(worker.told(&format!("move {}", outside.display())), "ok");
    assert_eq!(fixture.datapath.moved()[0].0, worker.pid());
}

#[test]
fn a_process_that_has_ended_is_not_remembered_when_it_is_moved() {
    let mut fixture = Fixture::new();
    fixture.attach(Mode::Enforce, &[]);
    let before = fixture.entries("tasks");
    let outside = fixture.outside();
    for _ in 0..20 {
        let mut ended = Command::new("/bin/true").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(ended.id()).unwrap());
        // Nobody has waited for it, so that its number is its own still.
        waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        move_to(&fixture.cgroup, ended.id());
        move_to(&outside, ended.id());
        move_to(&fixture.cgroup, ended.id());
        ended.wait().unwrap();
    }
    wait_until("nobody has the addresses of what has ended", || {
        fixture.entries("tasks") == before && fixture.datapath.moved().is_empty()
    });
}

#[test]
fn a_first_thread_that_ended_leaves_its_tag_to_nobody() {
    let mut fixture = Fixture::new();
    fixture.attach(Mode::Audit, &[]);
    let before = fixture.entries("tasks");
    let mut worker = Worker::start();
    assert_eq!(worker.told("end-leader"), "ok");
    // The kernel speaks of the first thread alone, though it has ended.
    move_to(&fixture.cgroup, worker.pid());
    assert_eq!(fixture.entries("tasks"), before + 1);
    // The thread that runs the program takes the first one's place, which ended long ago.
    assert_eq!(worker.told("become /bin/true"), "exit status: 0");
    wait_until("nobody has the addresses of what has ended", || fixture.entries("tasks") == before);
}

#[test]
fn of_births_and_ends_that_interrupt_each_other_none_is_missed() {
    /// A kernel leaves out a hook for a task that runs while another was preempted in it; with so many on
    /// one processor, some are.
    const THREADS: usize = 40;
    const EACH: usize = 15;

    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    let before = fixture.entries("tasks");
    for round in 0..3 {
        assert_eq!(worker.told(&format!("bear {THREADS} {EACH}")), "ok", "round {round}");
        // The threads that made them have ended.
        wait_until("each child has its tag, and nobody else", || {
            fixture.entries("tasks") == before + THREADS * EACH
        });
        assert_eq!(worker.told("bury"), "ok", "round {round}");
        wait_until("nobody has the addresses of what has ended", || {
            fixture.entries("tasks") == before
        });
    }
}

/// What needs a kernel that lets a program end a task other than its own.
mod end_others {
    use super::*;

    #[test]
    fn a_child_born_in_another_cgroup_is_killed() {
        let mut fixture = Fixture::new();
        let outside = fixture.outside();
        let mut worker = fixture.worker();
        let clone = format!("clone-into {}", outside.display());
        assert_eq!(worker.told(&clone), "lives", "before");
        fixture.attach(Mode::Enforce, &[]);
        let fate = worker.told(&clone);
        assert_eq!(fate, "killed", "attached: {:?}", fixture.counters().iter().collect::<Vec<_>>());
        fixture.detach();
        assert_eq!(worker.told(&clone), "lives", "detached");
    }
}

/// A process of a workload in a cgroup outside of it, into which the host moved it.
fn moved_by_the_host() -> (Fixture, PathBuf, Worker) {
    let mut fixture = Fixture::new();
    let outside = fixture.outside();
    let worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    move_to(&outside, worker.pid());
    (fixture, outside, worker)
}

#[test]
fn a_process_that_the_host_moves_keeps_its_tag_and_the_hooks_follow() {
    let (mut fixture, outside, mut worker) = moved_by_the_host();
    let moved = fixture.datapath.moved();
    assert_eq!(moved.len(), 1);
    assert_eq!((moved[0].0, moved[0].1.cgroup), (worker.pid(), cgroup_id(&outside).0));
    fixture.datapath.follow(&outside).unwrap();
    assert_eq!(worker.told(CONNECT), "EPERM");
    assert_eq!(worker.told("run /bin/true"), fixture.refused_exec().0);
    // Its neighbours there are nobody's.
    let mut neighbour = Worker::start();
    move_to(&outside, neighbour.pid());
    assert_eq!(neighbour.told(CONNECT), "ok");
    assert_eq!(neighbour.told("run /bin/true"), "ok");
    move_to(&fixture.cgroup, worker.pid());
    assert!(fixture.datapath.moved().iter().all(|(process, _)| *process != worker.pid()));
    assert_eq!(worker.told(CONNECT), "EPERM");
}

/// A fixture and a cgroup outside of it, which had hooks for a process that was moved there and has none any
/// more.
fn without_hooks_again() -> (Fixture, PathBuf) {
    let (mut fixture, outside, mut worker) = moved_by_the_host();
    fixture.datapath.follow(&outside).unwrap();
    assert!(fixture.datapath.follows(cgroup_id(&outside)));
    assert_eq!(worker.told(CONNECT), "EPERM");
    drop(worker);
    let is_needed = |datapath: &Datapath, cgroup| datapath.workload_of(cgroup).is_some();
    assert!(fixture.datapath.prune(is_needed).unwrap() > 0, "nobody needs them there");
    (fixture, outside)
}

#[test]
fn a_cgroup_whose_hooks_are_gone_is_not_taken_for_one_that_has_them() {
    let (mut fixture, outside) = without_hooks_again();
    assert!(!fixture.datapath.follows(cgroup_id(&outside)));
    let mut worker = fixture.worker();
    move_to(&outside, worker.pid());
    fixture.datapath.follow(&outside).unwrap();
    assert_eq!(worker.told(CONNECT), "EPERM");
}

mod lsm {
    use agentguard_tests::{Layer, requires};

    use super::*;

    #[test]
    fn what_comes_to_where_hooks_were_is_judged_before_they_are_back() {
        requires(Layer::Lsm);
        let (fixture, outside) = without_hooks_again();
        let mut worker = fixture.worker();
        move_to(&outside, worker.pid());
        assert_eq!(worker.told(CONNECT), "EPERM");
    }
}

#[test]
fn a_moved_process_keeps_its_tag_until_its_last_thread_ends() {
    let (mut fixture, outside, mut worker) = moved_by_the_host();
    fixture.datapath.follow(&outside).unwrap();
    assert_eq!(worker.told(CONNECT), "EPERM", "moved");
    assert_eq!(worker.told("end-leader"), "ok");
    assert_eq!(worker.told(CONNECT), "EPERM", "without its first thread");
    assert_eq!(fixture.datapath.moved()[0].0, worker.pid());
    drop(worker);
    wait_until("it is forgotten with its last thread", || fixture.datapath.moved().is_empty());
}

#[test]
fn a_child_cgroup_is_born_with_its_parents_tag_and_forgotten_when_it_goes() {
    let mut fixture = Fixture::new();
    fixture.attach(Mode::Enforce, &[]);
    let child = fixture.cgroup.join("child");
    fs::create_dir(&child).unwrap();
    let id = cgroup_id(&child);
    assert!(fixture.datapath.cgroups().contains(&(id, WORKLOAD)));
    let mut worker = Worker::start();
    assert_eq!(worker.told(CONNECT), "ok");
    move_to(&child, worker.pid());
    assert_eq!(worker.told(CONNECT), "EPERM");
    // Inside the workload it moves as it likes.
    assert_eq!(worker.told(&format!("move {}", fixture.cgroup.display())), "ok");
    fs::remove_dir(&child).unwrap();
    assert!(fixture.datapath.cgroups().iter().all(|(cgroup, _)| *cgroup != id));
}

#[test]
fn whoever_makes_cgroups_until_the_table_is_full_is_stopped_and_counted() {
    let mut fixture = Fixture::with(SCARCE);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    let make = |name| format!("mkdir {}", fixture.cgroup.join(name).display());
    assert_eq!(worker.told(&make("one")), "ok");
    assert_eq!(worker.told(&make("two")), "killed");
    let denied: Vec<_> = fixture
        .counters()
        .iter()
        .filter(|cell| cell.0 == agentguard_common::event::Hook::Leave)
        .map(|cell| (cell.2, cell.3))
        .collect();
    let reason = agentguard_common::Reason::MissingTable;
    assert_eq!(denied, [(agentguard_common::Verdict::Deny(reason), 1)]);
}

#[test]
fn a_moved_process_is_nobodys_when_its_workload_goes() {
    let (mut fixture, outside, mut worker) = moved_by_the_host();
    fixture.datapath.follow(&outside).unwrap();
    assert_eq!(worker.told(CONNECT), "EPERM", "moved");
    fixture.detach();
    assert!(fixture.datapath.moved().is_empty(), "its row goes with its workload");
    assert_eq!(worker.told(CONNECT), "ok", "nobody's");
    assert_eq!(worker.told("run /bin/true"), "ok", "nobody's");
}

#[test]
fn the_host_may_make_cgroups_when_the_table_is_full_and_what_comes_into_them_is_held() {
    let mut fixture = Fixture::with(SCARCE);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    for name in ["one", "two", "three"] {
        let child = fixture.cgroup.join(name);
        fs::create_dir(&child).unwrap();
        move_to(&child, worker.pid());
        assert_eq!(worker.told(CONNECT), "EPERM", "moved to {name}");
        let mut newcomer = Worker::start();
        move_to(&child, newcomer.pid());
        assert_eq!(newcomer.told(CONNECT), "EPERM", "come to {name}");
    }
}
