//! Tables that are full: what finds no room is denied, and what is full is said by name, with its size and
//! what makes room.

use std::{fs, net::IpAddr, path::Path};

use agentguard::allowlist::{
    Block, EgressPermit, Permit,
    compile::{Rows, compile},
};
use agentguard_common::{
    AllowlistId, FileId, IdentityId, Mode, Protocol, Reason, RuleSetId, Tag, UnixNameId,
    UnixSocket, Verdict, WorkloadId, allowlist::UnixName, event::Hook,
};

use agentguard_tests::wait_until;

use crate::fixture::{Fixture, SCARCE, WORKLOAD, cgroup_id, move_to, port, standing};
use crate::worker::Worker;

const CONNECT: &str = "connect udp 127.0.0.1:9";
/// A workload beside the fixture's.
const OTHER: WorkloadId = WorkloadId(2);

fn rows(fixture: &Fixture, permit: Permit) -> Rows {
    let (allowlist, first) =
        (fixture.datapath.highest().0.0 + 1, fixture.datapath.highest().1.0 + 1);
    compile(&[permit]).unwrap().rows(AllowlistId(allowlist), RuleSetId(first)).unwrap()
}

/// So many hosts, each with rules of its own.
fn hosts(number: u16) -> Permit {
    let host = |host: u16| EgressPermit {
        blocks: vec![Block { cidr: IpAddr::from([192, 0, 2, host as u8]).into(), except: vec![] }],
        ports: vec![port(Protocol::Tcp, host)],
    };
    Permit { egress: (1..=number).map(host).collect(), ..standing() }
}

/// So many hosts with the same rules.
fn hosts_alike(number: u16) -> Permit {
    let block =
        |host: u16| Block { cidr: IpAddr::from([192, 0, 2, host as u8]).into(), except: vec![] };
    let ports = vec![port(Protocol::Tcp, 1)];
    let egress = vec![EgressPermit { blocks: (1..=number).map(block).collect(), ports }];
    Permit { egress, ..standing() }
}

fn files(number: u64) -> Permit {
    let file = |inode| FileId { inode, device: 1, generation: 0 };
    Permit { executables: (1..=number).map(file).collect(), ..standing() }
}

fn sockets(number: u64) -> Permit {
    let socket = |directory| UnixSocket { directory, device: 1, name: UnixNameId(1) };
    Permit { unix_sockets: (1..=number).map(socket).collect(), ..standing() }
}

#[track_caller]
fn assert_says(said: &str, table: &str, capacity: u32, key: &str) {
    for part in [
        format!("table {table} is full"),
        format!("room for {capacity} rows"),
        format!("datapath.maps.{key} larger"),
    ] {
        assert!(said.contains(&part), "{part} is not in: {said}");
    }
}

#[test]
fn an_allow_list_that_finds_no_room_is_not_in_force_in_part() {
    let mut fixture = Fixture::with(SCARCE);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    let entries = |fixture: &Fixture, key: &str| {
        fixture.datapath.fill().into_iter().find(|fill| fill.table == key)
    };
    for (permit, table, key, capacity) in [
        (hosts_alike(9), "DESTINATIONS", "destinations", SCARCE.destinations),
        (hosts(9), "RULES", "rules", SCARCE.rules),
        (files(9), "EXECUTABLES", "executables", SCARCE.executables),
        (sockets(3), "UNIX_SOCKETS", "unix_sockets", SCARCE.unix_sockets),
    ] {
        let (rows, before) = (rows(&fixture, permit), entries(&fixture, key));
        let error = fixture.datapath.load_allowlist(&rows).unwrap_err();
        assert_says(&error.to_string(), table, capacity, key);
        assert_eq!(entries(&fixture, key), before, "{table}: nothing of it is left");
        assert_eq!(worker.told(CONNECT), "EPERM", "{table}");
        assert_eq!(worker.told("run /bin/true"), fixture.refused_exec().0, "{table}");
    }
}

#[test]
fn a_workload_that_finds_no_room_for_its_tag_is_denied_everything() {
    let mut fixture = Fixture::with(SCARCE);
    fixture.permit(Mode::Enforce, &[]);
    let held_to_nothing =
        Tag::new(IdentityId(1), Mode::Audit, AllowlistId::NONE, RuleSetId::NONE, 1);
    fixture.datapath.switch(OTHER, held_to_nothing).unwrap();
    let third = WorkloadId(3);
    let error = fixture.datapath.switch(third, held_to_nothing).unwrap_err();
    assert_says(&error.to_string(), "WORKLOADS", SCARCE.workloads, "workloads");
    let mut worker = fixture.worker();
    fixture.datapath.capture(&fixture.cgroup, third).unwrap();
    // Also in audit mode: nothing says that it is.
    assert_eq!(worker.told(CONNECT), "EPERM");
    assert_eq!(worker.told("run /bin/true"), fixture.refused_exec().0);
    fixture.datapath.release(cgroup_id(&fixture.cgroup), third).unwrap();
    fixture.datapath.forget(OTHER).unwrap();
}

#[test]
fn a_name_of_a_unix_socket_that_finds_no_room_has_no_number() {
    let mut fixture = Fixture::with(SCARCE);
    let names = ["one", "two", "three"].map(|name| UnixName::path(name.as_bytes()).unwrap());
    for (name, number) in names.iter().zip(1..).take(2) {
        fixture.datapath.name_unix_socket(name, UnixNameId(number)).unwrap();
    }
    let error = fixture.datapath.name_unix_socket(&names[2], UnixNameId(3)).unwrap_err();
    assert_says(&error.to_string(), "UNIX_NAMES", SCARCE.unix_names, "unix_names");
    assert!(fixture.datapath.unix_names().iter().all(|(name, _)| *name != names[2]));
    for name in &names {
        fixture.datapath.forget_unix_name(name).unwrap();
    }
}

#[test]
fn programs_that_run_containers_beyond_the_room_for_them_are_told_of() {
    let mut fixture = Fixture::with(SCARCE);
    let many = (1..=65).map(|inode| FileId { inode, device: 1, generation: 0 }).collect();
    let error = fixture.datapath.set_runtimes(&many).unwrap_err().to_string();
    for part in ["table RUNTIMES is full", "room for 64 rows", "containers.runtime_programs"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
}

/// What workloads make by themselves until there is no room: how many of it were denied as such.
fn without_room(fixture: &Fixture) -> u64 {
    let counters = fixture.counters();
    let cells = counters.iter();
    cells
        .filter(|(hook, _, verdict, _)| {
            *hook == Hook::Leave && *verdict == Verdict::Deny(Reason::MissingTable)
        })
        .map(|(.., count)| count)
        .sum()
}

#[test]
fn a_process_that_makes_threads_until_the_table_is_full_is_ended() {
    let mut fixture = Fixture::with(SCARCE);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    assert_eq!(worker.told(&format!("threads {}", 2 * SCARCE.tasks)), "killed");
    assert!(without_room(&fixture) > 0);
}

#[test]
fn what_finds_no_room_is_let_live_in_audit_mode_and_told_of() {
    let mut fixture = Fixture::with(SCARCE);
    let mut worker = fixture.worker();
    fixture.attach(Mode::Audit, &[]);
    assert_eq!(fixture.datapath.full_tables(), [""; 0]);
    assert_eq!(worker.told(&format!("threads {}", 2 * SCARCE.tasks)), "ok");
    assert!(without_room(&fixture) > u64::from(SCARCE.tasks));
    let full = fixture.datapath.full_tables();
    assert_eq!(full.len(), 1, "{full:?}");
    assert_says(&full[0], "TASKS", SCARCE.tasks, "tasks");
}

#[test]
fn a_child_that_finds_no_room_does_not_get_out() {
    let mut fixture = Fixture::with(SCARCE);
    let outside = fixture.outside();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    // Some find room among the tasks; for the others, there is room among those who are followed.
    let number = SCARCE.tasks + SCARCE.tasks / 2;
    let told = worker.told(&format!("children-leave {number} {}", outside.display()));
    assert_eq!(told, format!("{number} killed, 0 refused, 0 free"));
    assert!(without_room(&fixture) > 0);
}

#[test]
fn whoever_finds_no_room_when_the_host_brings_or_moves_it_is_held_or_ended() {
    let mut fixture = Fixture::with(SCARCE);
    let outside = fixture.outside();
    fixture.attach(Mode::Enforce, &[]);
    let mut moved: Vec<_> = (0..=SCARCE.tasks).map(|_| Sleeper::start()).collect();
    let (last, others) = moved.split_last_mut().unwrap();
    for sleeper in others {
        move_to(&fixture.cgroup, sleeper.pid());
        move_to(&outside, sleeper.pid());
    }
    move_to(&fixture.cgroup, last.pid());
    let full = fixture.datapath.full_tables();
    assert_eq!(full.len(), 2, "{full:?}");
    assert_says(&full[0], "TASKS", SCARCE.tasks, "tasks");
    assert_says(&full[1], "MOVED", SCARCE.tasks, "tasks");
    assert!(without_room(&fixture) > 0);
    if fixture.datapath.ends_others() {
        wait_until("what there was no room for has ended", || last.has_ended());
    }
    let mut worker = fixture.worker();
    assert_eq!(
        worker.told(CONNECT),
        if fixture.datapath.ends_others() { "killed" } else { "EPERM" }
    );
}

#[test]
fn a_cgroup_that_is_brought_has_a_place_though_others_made_cgroups_until_there_was_none() {
    let mut fixture = Fixture::with(SCARCE);
    fixture.attach(Mode::Enforce, &[]);
    for name in ["one", "two", "three"] {
        fs::create_dir(fixture.cgroup.join(name)).unwrap();
    }
    let full = fixture.datapath.full_tables();
    assert_eq!(full.len(), 1, "{full:?}");
    assert_says(&full[0], "CGROUPS", SCARCE.cgroups, "cgroups");
    // One that has cgroups already, of which one place is left over.
    let outside = fixture.outside();
    let below = outside.join("below");
    fs::create_dir(&below).unwrap();
    let tag = Tag::new(IdentityId(1), Mode::Enforce, AllowlistId::NONE, RuleSetId::NONE, 1);
    fixture.datapath.switch(OTHER, tag).unwrap();
    fixture.datapath.capture(&outside, OTHER).unwrap();
    for cgroup in [&outside, &below] {
        assert_eq!(fixture.datapath.workload_of(cgroup_id(cgroup)), Some(OTHER));
        let mut worker = Worker::start();
        move_to(cgroup, worker.pid());
        assert_eq!(worker.told(CONNECT), "EPERM");
        assert_eq!(worker.told("run /bin/true"), fixture.refused_exec().0);
    }
    // The reserve has an end too, and nothing says otherwise.
    let more = outside.join("more");
    fs::create_dir(&more).unwrap();
    let error = fixture.datapath.capture(&outside, OTHER).unwrap_err().to_string();
    assert!(error.contains("table CGROUPS is full"), "{error}");
    fixture.datapath.release(cgroup_id(&outside), OTHER).unwrap();
    fixture.datapath.forget(OTHER).unwrap();
    // What goes makes room, for those to come first.
    fs::remove_dir(fixture.cgroup.join("one")).unwrap();
    fixture.datapath.keep_reserve().unwrap();
    let cgroups = |datapath: &agentguard::datapath::Datapath| {
        let fill = datapath.fill();
        fill.iter().find(|fill| fill.table == "cgroups").map(|fill| (fill.entries, fill.capacity))
    };
    assert_eq!(cgroups(&fixture.datapath), Some((1, 2)));
    assert!(is_member(&fixture, &fixture.cgroup));
}

fn is_member(fixture: &Fixture, cgroup: &Path) -> bool {
    fixture.datapath.workload_of(cgroup_id(cgroup)) == Some(WORKLOAD)
}

/// A process of one thread; dropped, it is killed.
struct Sleeper(std::process::Child);

impl Sleeper {
    fn start() -> Self {
        Self(std::process::Command::new("sleep").arg("60").spawn().unwrap())
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _ended_already = self.0.wait();
    }
}
