//! `cargo xtask test`: every test, with its own set-up.
//!
//! Its one job is to run them in the right order with what they need, and to close with one
//! honest line. Unit, property and documentation tests of the crates run in parallel; those
//! in `tests/` own the kernel's state while they run and go one after the other, against a
//! daemon of the same build: on this kernel, then on every kernel of the matrix.

use std::{
    env,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    counting::{Reader, Total},
    dist::{daemon_binary, next_daemon_binary, static_agent_binary},
    promise::Promise,
    run::{cargo, heading, run},
    setup::{self, Purpose},
    suites::{self, Suite},
    vm,
};

/// What attacks are made by and every kernel has on which the tests run: without it they would prove less.
const THIS_KERNEL_HAS: &str = "io-uring-send veth";

/// Arguments of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Leave out the tests that load programs into a kernel, and say so
    #[arg(long)]
    without_kernel: bool,
    /// Leave out the kernel matrix, and say so; the tests still run on this kernel
    #[arg(long)]
    without_vms: bool,
    /// What this kernel must give beyond the portable layer; what it then lacks fails the run
    #[arg(long, value_delimiter = ',', value_name = "PROMISE", value_parser = promise)]
    this_kernel_gives: Vec<Promise>,
    /// What attacks are made by and this kernel has, as `sctp`; what it then lacks fails the run
    #[arg(long, value_delimiter = ',', value_name = "FACILITY")]
    this_kernel_has: Vec<String>,
}

fn promise(name: &str) -> Result<Promise> {
    Promise::ALL
        .into_iter()
        .find(|promise| promise.as_str() == name)
        .with_context(|| format!("one of: {}", suites::names_of(&Promise::ALL)))
}

/// Runs every test.
///
/// # Errors
///
/// The set-up or a build fails, a test fails, a kernel gives less than it is promised to, or a test
/// was ignored: a test that is not run proves nothing, and must not look as if it did.
pub(crate) fn test(arguments: &Arguments) -> Result<()> {
    let begin = Instant::now();
    setup::setup(if arguments.without_kernel {
        Purpose::Build
    } else if arguments.without_vms {
        Purpose::Test
    } else {
        Purpose::Vm
    })?;
    // All at once: cargo chooses the features of what is shared by what is built together, and
    // would build it again for each part.
    heading("build");
    let build = || {
        run(&mut cargo(&["test", "--locked", "--no-run"]))?;
        static_agent_binary()?;
        let next = next_daemon_binary()?;
        Ok((next, daemon_binary()?))
    };
    let filter = arguments.filter.as_deref();
    let rows = vm::Wanted::everywhere(filter);
    let has_matrix = !arguments.without_kernel && !arguments.without_vms;
    let (next, daemon) =
        if has_matrix { vm::beside_machines(&rows, false, build)? } else { build()? };

    let mut total = Total::default();
    heading("crates");
    let mut crates = cargo(&["test", "--locked", "--no-fail-fast"]);
    crates.args(["--lib", "--bins", "--test", "control_api", "--"]).args(filter);
    total += counted(&mut crates)?;
    let mut examples = cargo(&["test", "--locked", "--no-fail-fast", "--doc", "--"]);
    total += counted(examples.args(filter))?;

    let mut matrix = None;
    if !arguments.without_kernel {
        let suites = suites::build()?;
        let promises = [suites::THIS_KERNEL, &arguments.this_kernel_gives].concat();
        let has = [THIS_KERNEL_HAS, &arguments.this_kernel_has.join(" ")].join(" ");
        total += on_this_kernel(&suites, &promises, &has, filter, &daemon, &next)?;
        if has_matrix {
            let daemons = vm::Daemons { this: &daemon, next: &next, packages: None };
            matrix = Some(vm::matrix(&suites, daemons, &rows)?);
        }
    }

    let Total { passed, failed, ignored, not_promised, inapplicable, broken: _ } = total;
    let seconds = begin.elapsed().as_secs();
    println!("\ntests: {passed} passed, {failed} failed, {ignored} ignored, in {seconds} s");
    if not_promised > 0 {
        println!("{not_promised} not run here: they need what this kernel is not promised to give");
    }
    if inapplicable > 0 {
        println!(
            "{inapplicable} named above could not be made: this kernel lacks what they attack by"
        );
    }
    if let Some(matrix) = &matrix {
        println!("{}", matrix.closing_line());
    }
    if arguments.without_kernel {
        println!("the tests that need a kernel were left out, as was asked");
    } else if arguments.without_vms {
        println!("the kernel matrix was left out, as was asked");
    }
    if !total.is_good() || matrix.is_some_and(|matrix| !matrix.is_good()) {
        bail!("not every test passed");
    }
    if passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// Runs the test programs one after the other: each owns the kernel's state meanwhile.
fn on_this_kernel(
    suites: &[Suite],
    promises: &[Promise],
    facilities: &str,
    filter: Option<&str>,
    daemon: &Path,
    next: &Path,
) -> Result<Total> {
    heading(&format!("this kernel, which is to give: {}", suites::names_of(promises)));
    let mut total = Total::default();
    for suite in suites {
        let selection =
            suite.select(promises, |test| filter.is_none_or(|part| test.contains(part)));
        for test in &selection.not_promised {
            println!("test {}: {test} ... not promised by this kernel", suite.name);
            total.not_promised += 1;
        }
        if !selection.run.is_empty() {
            println!("\n     Running {}", suite.name);
            let mut command = selection.command(promises, facilities, daemon);
            total += counted(command.env("AGENTGUARD_NEXT_BIN", next))?;
        }
    }
    Ok(total)
}

/// Runs a program that runs tests, shows what it prints, and adds up its closing lines.
fn counted(command: &mut Command) -> Result<Total> {
    let name = command.get_program().to_string_lossy().into_owned();
    // Colours would hide the closing lines from the reader below; a terminal asks for them.
    command.stdout(Stdio::piped()).env("CARGO_TERM_COLOR", "never");
    if env::var_os("CI").is_some() {
        command.stdin(Stdio::null());
    }
    let mut child = command.spawn().with_context(|| format!("{name}: cannot be started"))?;
    let stdout = child.stdout.take().with_context(|| format!("{name}: no standard output"))?;
    let mut reader = Reader::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.with_context(|| format!("{name}: its output cannot be read"))?;
        println!("{line}");
        reader.line(&line);
    }
    let mut total = reader.total();
    if !child.wait()?.success() {
        total.broken += 1;
    }
    Ok(total)
}
