//! The command line: one binary, one file per command.
//!
//! Its one job is to turn arguments into calls of the control API or of [`Backend`], and answers
//! into what people and programs read. It must not know how anything is enforced. Single-threaded.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod audit;
pub mod backend;
mod check;
mod diagnostics;
mod doctor;
mod events;
mod exec;
pub mod exit;
mod explain;
mod generate;
mod grant;
mod grants;
mod inherited;
mod oci_hook;
pub mod output;
mod refresh;
mod revoke;
mod run;
mod status;
mod uninstall;
mod workloads;

use crate::api::client::{Client, DEFAULT_SOCKET};
use backend::Backend;
use exit::{Exit, Failure};
use output::{Colour, Console, Format};

/// Holds AI-agent workloads to their granted scopes in the Linux kernel.
#[derive(Debug, Parser)]
#[command(
    name = "agentguard",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Exit status: 0 done; 1 it failed; 2 usage; 65 an invalid manifest; 69 no daemon; \
                  77 not permitted; 78 an invalid configuration. exec gives the command's own \
                  status, 126 not executable, 127 not found, 128+n for signal n."
)]
pub struct Cli {
    /// The daemon's control socket [default: /run/agentguard/agentguard.sock]
    #[arg(long, global = true, value_name = "PATH", env = "AGENTGUARD_SOCKET")]
    socket: Option<PathBuf>,

    /// The configuration file [default: /etc/agentguard/agentguard.yaml, if it is there]
    #[arg(long, global = true, value_name = "FILE", env = "AGENTGUARD_CONFIG")]
    config: Option<PathBuf>,

    /// The form of what is shown
    #[arg(long, global = true, value_enum, value_name = "FORM", default_value_t)]
    output: Format,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Arguments),
    Exec(exec::Arguments),
    Status(status::Arguments),
    Workloads(workloads::Arguments),
    Grants(grants::Arguments),
    Grant(grant::Arguments),
    Revoke(revoke::Arguments),
    Explain(explain::Arguments),
    Events(events::Arguments),
    Check(check::Arguments),
    Doctor(doctor::Arguments),
    Audit(audit::Arguments),
    Refresh(refresh::Arguments),
    Diagnostics(diagnostics::Arguments),
    OciHook(oci_hook::Arguments),
    Uninstall(uninstall::Arguments),
    Completions(generate::Completions),
    Generate(generate::Arguments),
}

/// What every command is given.
struct Context<'a, 'b> {
    client: Client,
    /// As named by the user; absent for the default.
    socket: Option<PathBuf>,
    /// As named by the user; absent for the default.
    config: Option<PathBuf>,
    format: Format,
    backend: &'a dyn Backend,
    console: &'a mut Console<'b>,
}

type Result<T = Exit> = std::result::Result<T, Failure>;

/// Runs the command line of this process.
#[must_use]
pub fn main(backend: &dyn Backend) -> ExitCode {
    // Not locked: the threads of the daemon may write, too.
    let (mut out, mut err) = (io::stdout(), io::stderr());
    let colour = |is_terminal| {
        let (no_color, term) = (std::env::var_os("NO_COLOR"), std::env::var_os("TERM"));
        Colour::choose(is_terminal, no_color.as_deref(), term.as_deref())
    };
    let is_terminal = out.is_terminal();
    let (colour, err_colour) = (colour(is_terminal), colour(err.is_terminal()));
    let width = if is_terminal { Console::terminal_width() } else { None };
    let mut console = Console { out: &mut out, err: &mut err, colour, err_colour, width };
    ExitCode::from(run(std::env::args_os(), backend, &mut console).code())
}

/// Runs a command line, with the program's name as its first word. `exec` beside a running daemon
/// does not return when it succeeds: this process becomes the command.
pub fn run(
    arguments: impl IntoIterator<Item = OsString>,
    backend: &dyn Backend,
    console: &mut Console<'_>,
) -> Exit {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return explain_usage(&error, console),
    };
    let format = cli.output;
    let socket = match (&cli.socket, &cli.config) {
        (Some(socket), _) => Ok(socket.clone()),
        // The way of every day is not held up by a file that need not be there.
        (None, None) => Ok(DEFAULT_SOCKET.into()),
        (None, Some(config)) => backend.socket(Some(config)),
    };
    let client = match socket {
        Ok(socket) => Client::new(socket),
        Err(failure) => {
            console.failure(&failure, format);
            return failure.exit;
        }
    };
    let Cli { socket, config, command, .. } = cli;
    let context = Context { client, socket, config, format, backend, console: &mut *console };
    let ended = match command {
        Command::Run(arguments) => run::run(&arguments, context),
        Command::Exec(arguments) => exec::run(&arguments, context),
        Command::Status(arguments) => status::run(&arguments, context),
        Command::Workloads(arguments) => workloads::run(&arguments, context),
        Command::Grants(arguments) => grants::run(&arguments, context),
        Command::Grant(arguments) => grant::run(&arguments, context),
        Command::Revoke(arguments) => revoke::run(&arguments, context),
        Command::Explain(arguments) => explain::run(&arguments, context),
        Command::Events(arguments) => events::run(&arguments, context),
        Command::Check(arguments) => check::run(&arguments, context),
        Command::Doctor(arguments) => doctor::run(&arguments, context),
        Command::Audit(arguments) => audit::run(&arguments, context),
        Command::Refresh(arguments) => refresh::run(&arguments, context),
        Command::Diagnostics(arguments) => diagnostics::run(&arguments, context),
        Command::OciHook(arguments) => oci_hook::run(&arguments, context),
        Command::Uninstall(arguments) => uninstall::run(&arguments, context),
        Command::Completions(arguments) => generate::completions(&arguments, context),
        Command::Generate(arguments) => generate::run(&arguments, context),
    };
    ended.unwrap_or_else(|failure| {
        if !failure.is_broken_pipe() {
            console.failure(&failure, format);
        }
        failure.exit
    })
}

/// Help and version go to the output and are no error.
fn explain_usage(error: &clap::Error, console: &mut Console<'_>) -> Exit {
    let text = |colour| match colour {
        Colour::Coloured => error.render().ansi().to_string(),
        Colour::Plain => error.render().to_string(),
    };
    // Where it can not be shown, the exit status says it.
    if error.use_stderr() {
        let _ = console.err.write_all(text(console.err_colour).as_bytes());
        Exit::Usage
    } else {
        let _ = console.out.write_all(text(console.colour).as_bytes());
        Exit::Done
    }
}
