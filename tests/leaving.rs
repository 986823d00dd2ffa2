//! The ways out by leaving the workload: rows T1, T2 and T3 of the threat model.

use std::net::SocketAddr;

use agentguard_tests::{
    Attack, Protocol, WayOut, World,
    address::{DATABASE, GRANTED_PORT},
    ways_out,
};

const FORBIDDEN: SocketAddr = SocketAddr::new(DATABASE, GRANTED_PORT);

fn from(name: &str, how: &str) -> WayOut {
    let attack = Attack::new(name)
        .option("to", FORBIDDEN.to_string())
        .option("protocol", "tcp")
        .option("how", how);
    WayOut::network(attack, Protocol::Tcp, FORBIDDEN)
}

ways_out! {
    /// T1
    child_cgroup: |_| from("t1-nesting", "child-cgroup");
    cgroup_namespace: |_| from("t1-nesting", "cgroup-namespace");
    sandbox_inside: |_| from("t1-nesting", "sandbox");
}

/// T2
fn moved(how: &str, world: &World) -> WayOut {
    let mut way_out = from("t2-move", how);
    way_out.attack = way_out.attack.option("cgroup", world.cgroup().child("outside"));
    way_out.recorded_as(&["leave"], "")
}

/// T2: who leaves is not who asks. Not every kernel ends it before it runs on.
fn other_moved(how: &str, world: &World) -> WayOut {
    moved(how, world).or_living_on()
}

ways_out! {
    /// T2
    moving_itself_to_another_cgroup: |world| moved("itself", world);
    moving_a_child_to_another_cgroup: |world| other_moved("child", world);
    having_a_child_born_in_another_cgroup: |world| other_moved("birth", world);
}

ways_out! {
    /// T3
    session_of_its_own: |_| from("t3-detach", "setsid");
    double_fork: |_| from("t3-detach", "double-fork");
    process_below_init: |_| from("t3-detach", "reparent");
    user_namespace: |_| from("t3-detach", "unshare-user");
    mount_namespace: |_| from("t3-detach", "unshare-mount");
    pid_namespace: |_| from("t3-detach", "unshare-pid");
    ipc_namespace: |_| from("t3-detach", "unshare-ipc");
    uts_namespace: |_| from("t3-detach", "unshare-uts");
    own_cgroup_namespace: |_| from("t3-detach", "unshare-cgroup");
    time_namespace: |_| from("t3-detach", "unshare-time");
}
