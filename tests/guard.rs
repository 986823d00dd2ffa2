//! Attacks on the guard itself: rows G3 and G4 of the threat model.

use std::net::SocketAddr;

use agentguard_tests::{
    Attack, Protocol, WayOut, World,
    address::{DATABASE, OTHER_PORT},
    ways_out,
};

const FORBIDDEN: SocketAddr = SocketAddr::new(DATABASE, OTHER_PORT);

fn flood(how: &str) -> WayOut {
    let attack = Attack::new("g3-flood")
        .option("to", FORBIDDEN.to_string())
        .option("how", how)
        .option("count", "20000");
    WayOut::network(attack, Protocol::Udp, FORBIDDEN).recorded_as(&["send"], "5432")
}

ways_out! {
    /// G3
    flood_of_one_request: |_| flood("identical");
    flood_of_many_requests: |_| flood("distinct");
}

/// Reading the audit log checks that each line is one object without control characters.
fn hostile(how: &str, world: &World) -> WayOut {
    WayOut::exec(Attack::new("g4-hostile").option("how", how), &world.programs())
}

ways_out! {
    /// G4
    hostile_arguments: |world| hostile("argv", world);
    hostile_path: |world| hostile("path", world);
    hostile_thread_name: |world| hostile("comm", world);
    huge_arguments: |world| hostile("huge-argv", world);
    huge_path: |world| hostile("huge-path", world);
}
