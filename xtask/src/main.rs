//! The project's own commands: `cargo xtask <command>`.
//!
//! Its one job is the command line; each command is one module. A command says what it does,
//! stops at the first thing that fails, and names the remedy. Nothing here is part of what
//! is shipped, and nothing that is shipped knows of it.

mod bench;
mod chart;
mod ci;
mod counting;
mod demo;
mod dist;
mod docs;
mod guard;
mod image;
mod interrupt;
mod kubernetes;
mod netns;
mod object;
mod oci;
#[path = "../../tests/harness/promise.rs"]
#[cfg_attr(not(test), expect(dead_code, reason = "the tests read what this program writes"))]
mod promise;
mod run;
mod runtimes;
mod setup;
mod suites;
mod test;
mod tidy;
#[path = "../../agentguard/build/toolchain.rs"]
mod toolchain;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's own commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Find or install what building, testing and the demo need, and check this kernel
    Setup(setup::Arguments),
    /// Show the main job in a terminal, in network namespaces of its own
    Demo(demo::Arguments),
    /// Run every test
    Test(test::Arguments),
    /// Run the tests on every kernel of the matrix, in virtual machines
    Vm(vm::Arguments),
    /// Run the tests in a Kubernetes cluster of one node on this machine
    E2eKubernetes(kubernetes::Arguments),
    /// Measure what the guard costs, against no agent and an empty program
    Bench(bench::Arguments),
    /// Check form: formatting, lints, documentation, licences, module edges
    Ci,
    /// Check the module edges, where `unsafe` stands, and that generated documents are fresh
    Tidy,
    /// Write the generated documents: schemas, reference pages, the API description
    Docs(docs::Arguments),
    /// Build the kernel half and say where it lies
    Object,
    /// Build a release with completions and manual pages into `target/dist`
    Dist,
    /// Build a Debian package of the release into `target/debian`
    Deb(dist::DebArguments),
    /// Check the Helm chart, and render the plain manifests from it
    Chart(chart::Arguments),
    /// Build the container image into `target/image`, with its bill of materials
    Image(image::Arguments),
    /// The measured side of `bench`: waits for a line on stdin, then runs the loops
    #[command(hide = true)]
    BenchWorker(bench::WorkerArguments),
}

fn main() -> ExitCode {
    match execute(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        // The text names the thing and the remedy; where in xtask it arose helps nobody.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<()> {
    match command {
        Command::Setup(arguments) => setup::setup(arguments.purpose),
        Command::Demo(arguments) => demo::demo(&arguments),
        Command::Test(arguments) => test::test(&arguments),
        Command::Vm(arguments) => vm::vm(&arguments),
        Command::E2eKubernetes(arguments) => kubernetes::e2e(&arguments),
        Command::Bench(arguments) => bench::bench(&arguments),
        Command::Ci => ci::ci(),
        Command::Tidy => tidy::tidy(),
        Command::Docs(arguments) => docs::docs(&arguments),
        Command::Object => object::object().map(|path| println!("{}", path.display())),
        Command::Dist => dist::dist(),
        Command::Deb(arguments) => dist::deb(&arguments),
        Command::Chart(arguments) => chart::chart(&arguments),
        Command::Image(arguments) => image::image(&arguments),
        Command::BenchWorker(arguments) => bench::work(&arguments),
    }
}
