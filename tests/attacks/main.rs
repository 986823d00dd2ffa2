//! Programs that try to get out of a workload, one subcommand for each way of the threat model.
//!
//! Each prints one JSON line, `{"attack", "outcome", "errno", "detail"}`, and exits with 0 when it
//! *worked* (it reached the target and has the proof), 1 when it was refused, and 2 when the set-up
//! was broken, so that a broken set-up never reads as a refusal. Every loop and wait is bounded: by three
//! seconds where only a refusal ends it, by what a busy machine may need where it is to work.
//!
//! Must not know: whether there is a guard, and how it refuses. One thread, except where a way out
//! is a race; so `fork` is safe wherever it is used.

mod child;
mod e1_paths;
mod e2_aliases;
mod e4_unnamed;
mod e5_scripts;
mod e7_storm;
mod e8_privilege;
mod enter;
mod g3_flood;
mod g4_hostile;
mod g5_exhaust;
mod helper;
mod n10_flow;
mod n11_rewrite;
mod n12_metadata;
mod n14_listen;
mod n16_network;
mod n1_connect;
mod n1_source_route;
mod n2_alias;
mod n3_datagram;
mod n4_fast_open;
mod n5_io_uring;
mod n6_ping;
mod n6_protocol;
mod n7_family;
mod n8_foreign_socket;
mod n9_lend;
mod outcome;
mod own_mounts;
mod passing;
mod payload;
mod serve;
mod sockets;
mod t1_nesting;
mod t2_move;
mod t3_detach;
mod t4_unix;
mod transport;
mod unix;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::outcome::{Attempt, report};

#[derive(Parser)]
#[command(name = "agentguard-attack", about = "Tries to get out of a workload")]
struct Arguments {
    #[command(subcommand)]
    attack: Attack,
}

#[derive(Subcommand)]
enum Attack {
    /// Connect to an address, port or protocol.
    N1Connect(n1_connect::Arguments),
    /// Send to a granted peer by way of another host.
    N1SourceRoute(n1_source_route::Arguments),
    /// Reach an IPv4 address by another form of it.
    N2Alias(n2_alias::Arguments),
    /// Send datagrams in every way there is.
    N3Datagram(n3_datagram::Arguments),
    /// Send data with the first packet of TCP.
    N4FastOpen(n4_fast_open::Arguments),
    /// Let the kernel's own rings make the calls.
    N5IoUring(n5_io_uring::Arguments),
    /// Ping another host than the one that the socket is connected to.
    N6Ping(n6_ping::Arguments),
    /// Use what travels over IP and is neither TCP nor UDP.
    N6Protocol(n6_protocol::Arguments),
    /// Use sockets of another kind.
    N7Family(n7_family::Arguments),
    /// Use a connected socket that comes from elsewhere.
    N8ForeignSocket(n8_foreign_socket::Arguments),
    /// Hand a socket to a helper outside, which takes it where the workload may not go.
    N9Lend(n9_lend::Arguments),
    /// Keep a flow going.
    N10Flow(n10_flow::Arguments),
    /// Rewrite the address while the call that carries it runs.
    N11Rewrite(n11_rewrite::Arguments),
    /// Ask the cloud's metadata service.
    N12Metadata(n12_metadata::Arguments),
    /// Let others come.
    N14Listen(n14_listen::Arguments),
    /// Make a network of its own.
    N16Network(n16_network::Arguments),
    /// Run a file by every spelling of its path.
    E1Paths(e1_paths::Arguments),
    /// Run a file by an alias of it.
    E2Aliases(e2_aliases::Arguments),
    /// Run a file that has no name, or one the workload made.
    E4Unnamed(e4_unnamed::Arguments),
    /// Run a script, or what interprets it.
    E5Scripts(e5_scripts::Arguments),
    /// Run a file by many at once.
    E7Storm(e7_storm::Arguments),
    /// Run a file that gives privileges.
    E8Privilege(e8_privilege::Arguments),
    /// Connect from inside a nested container.
    T1Nesting(t1_nesting::Arguments),
    /// Connect from another cgroup.
    T2Move(t2_move::Arguments),
    /// Connect from a process that shed its ancestry or its namespaces.
    T3Detach(t3_detach::Arguments),
    /// Reach a unix socket outside.
    T4Unix(t4_unix::Arguments),
    /// Drown the record of a denial.
    G3Flood(g3_flood::Arguments),
    /// Put what is no text into the record.
    G4Hostile(g4_hostile::Arguments),
    /// Fill up what the guard keeps.
    G5Exhaust(g5_exhaust::Arguments),
    /// The interpreter of a script: proves that the script ran.
    Interpret(e5_scripts::Interpret),
    /// The interpreter of a script: proves that the interpreter ran.
    InterpretAs(e5_scripts::Interpret),
    /// The program that must not run: proves that it did, and which file it was.
    Payload(payload::Arguments),
    /// A process outside the workload that lends it a connected socket.
    HelperLend(helper::Lend),
    /// A process outside the workload that lends it a connected unix socket.
    HelperLendUnix(helper::LendUnix),
    /// A server outside the workload.
    Serve(serve::Arguments),
    /// A process outside the workload that uses the workload's socket.
    HelperUse(helper::Use),
    /// Run a command in a network namespace and a cgroup.
    Enter(enter::Arguments),
}

fn main() -> ExitCode {
    if let Some(attempt) = e5_scripts::run_for_a_format() {
        return report("interpret", &attempt);
    }
    let (name, attempt): (&str, Attempt) = match Arguments::parse().attack {
        Attack::N1Connect(arguments) => ("n1-connect", n1_connect::run(&arguments)),
        Attack::N1SourceRoute(arguments) => ("n1-source-route", n1_source_route::run(&arguments)),
        Attack::N2Alias(arguments) => ("n2-alias", n2_alias::run(&arguments)),
        Attack::N3Datagram(arguments) => ("n3-datagram", n3_datagram::run(&arguments)),
        Attack::N4FastOpen(arguments) => ("n4-fast-open", n4_fast_open::run(&arguments)),
        Attack::N5IoUring(arguments) => ("n5-io-uring", n5_io_uring::run(&arguments)),
        Attack::N6Ping(arguments) => ("n6-ping", n6_ping::run(&arguments)),
        Attack::N6Protocol(arguments) => ("n6-protocol", n6_protocol::run(&arguments)),
        Attack::N7Family(arguments) => ("n7-family", n7_family::run(&arguments)),
        Attack::N8ForeignSocket(arguments) => {
            ("n8-foreign-socket", n8_foreign_socket::run(&arguments))
        }
        Attack::N9Lend(arguments) => ("n9-lend", n9_lend::run(&arguments)),
        Attack::N10Flow(arguments) => ("n10-flow", n10_flow::run(&arguments)),
        Attack::N11Rewrite(arguments) => ("n11-rewrite", n11_rewrite::run(&arguments)),
        Attack::N12Metadata(arguments) => ("n12-metadata", n12_metadata::run(&arguments)),
        Attack::N14Listen(arguments) => ("n14-listen", n14_listen::run(&arguments)),
        Attack::N16Network(arguments) => ("n16-network", n16_network::run(&arguments)),
        Attack::E1Paths(arguments) => ("e1-paths", e1_paths::run(&arguments)),
        Attack::E2Aliases(arguments) => ("e2-aliases", e2_aliases::run(&arguments)),
        Attack::E4Unnamed(arguments) => ("e4-unnamed", e4_unnamed::run(&arguments)),
        Attack::E5Scripts(arguments) => ("e5-scripts", e5_scripts::run(&arguments)),
        Attack::E7Storm(arguments) => ("e7-storm", e7_storm::run(&arguments)),
        Attack::E8Privilege(arguments) => ("e8-privilege", e8_privilege::run(&arguments)),
        Attack::T1Nesting(arguments) => ("t1-nesting", t1_nesting::run(&arguments)),
        Attack::T2Move(arguments) => ("t2-move", t2_move::run(&arguments)),
        Attack::T3Detach(arguments) => ("t3-detach", t3_detach::run(&arguments)),
        Attack::T4Unix(arguments) => ("t4-unix", t4_unix::run(&arguments)),
        Attack::G3Flood(arguments) => ("g3-flood", g3_flood::run(&arguments)),
        Attack::G4Hostile(arguments) => ("g4-hostile", g4_hostile::run(&arguments)),
        Attack::G5Exhaust(arguments) => ("g5-exhaust", g5_exhaust::run(&arguments)),
        Attack::Interpret(arguments) => ("interpret", e5_scripts::interpret(&arguments)),
        Attack::InterpretAs(arguments) => ("interpret-as", e5_scripts::interpret_as(&arguments)),
        Attack::Payload(arguments) => ("payload", payload::run(&arguments)),
        Attack::HelperLend(arguments) => ("helper-lend", helper::lend(&arguments)),
        Attack::HelperLendUnix(arguments) => ("helper-lend-unix", helper::lend_unix(&arguments)),
        Attack::Serve(arguments) => ("serve", serve::run(&arguments)),
        Attack::HelperUse(arguments) => ("helper-use", helper::use_lent(&arguments)),
        Attack::Enter(arguments) => ("enter", Err(enter::run(&arguments))),
    };
    report(name, &attempt)
}
