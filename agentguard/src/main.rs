//! The `agentguard` binary: plugs the parts into the command line.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use agentguard::api::types::{Confine, ManifestErrorView};
use agentguard::cli::backend::{
    Backend, BrokenChain, CheckReport, DoctorReport, RunOptions, UninstallReport, VerifiedLog,
};
use agentguard::cli::exit::{Exit, Failure};
use agentguard::config::{Configuration, Overrides};
use agentguard::daemon::{self, DaemonError};
use agentguard::manifest::{self, ManifestError};
use agentguard::{audit, cli, logging};
use jiff::Timestamp;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let [_, first, rest @ ..] = arguments.as_slice()
        && first == daemon::LAUNCH
    {
        eprintln!("agentguard: {}", daemon::launch(rest));
        return ExitCode::from(Exit::NotExecutable.code());
    }
    cli::main(&Plugged)
}

/// The parts behind the command line.
struct Plugged;

impl Plugged {
    fn configuration(
        config: Option<&Path>,
        overrides: &Overrides,
    ) -> Result<Configuration, Failure> {
        Configuration::load(config, overrides)
            .map_err(|error| Failure::new(Exit::InvalidConfiguration, error.to_string()))
    }
}

impl Backend for Plugged {
    fn socket(&self, config: Option<&Path>) -> Result<PathBuf, Failure> {
        let configuration = Self::configuration(config, &Overrides::default())?;
        Ok(configuration.api.socket.to_path_buf())
    }

    fn run(&self, options: &RunOptions) -> Result<(), Failure> {
        let RunOptions { config, socket, require, node } = options;
        let api_socket = match socket {
            Some(path) => Some(path.to_string_lossy().parse().map_err(
                |error: agentguard::config::value::ValueError| {
                    Failure::new(Exit::Usage, format!("--socket: {error}"))
                },
            )?),
            None => None,
        };
        let overrides =
            Overrides { api_socket, require: *require, node: node.clone(), ..Overrides::default() };
        let configuration = Self::configuration(config.as_deref(), &overrides)?;
        logging::init(configuration.log.level, configuration.log.format)
            .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
        daemon::run(configuration).map_err(|error| failed(&error))
    }

    fn exec_standalone(&self, config: Option<&Path>, request: &Confine) -> Result<Exit, Failure> {
        let configuration = Self::configuration(config, &Overrides::default())?;
        logging::init(logging::Level::Error, configuration.log.format)
            .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
        match daemon::exec_standalone(&configuration, request) {
            Ok(daemon::Ended::Exited(status)) => Ok(Exit::Command(status)),
            // As a shell tells it; signals of Linux end at 64.
            Ok(daemon::Ended::Killed(signal)) => Ok(Exit::Command(128 + signal as u8)),
            Err(error) => Err(Failure::new(Exit::Failed, error.to_string())),
        }
    }

    fn doctor(&self, config: Option<&Path>) -> Result<DoctorReport, Failure> {
        let configuration = Self::configuration(config, &Overrides::default())?;
        Ok(daemon::doctor::doctor(&configuration))
    }

    fn uninstall(&self, config: Option<&Path>) -> Result<UninstallReport, Failure> {
        let configuration = Self::configuration(config, &Overrides::default())?;
        daemon::uninstall(&configuration).map_err(|error| failed(&error))
    }

    fn check(&self, paths: &[PathBuf]) -> Result<CheckReport, Failure> {
        let report = manifest::check(paths, Timestamp::now());
        let counts = report.counts;
        Ok(CheckReport {
            documents: (counts.scopes + counts.grants + counts.workloads) as u64,
            errors: report.errors.iter().map(view).collect(),
            warnings: report.warnings.iter().map(|warning| view(&warning.0)).collect(),
        })
    }

    fn audit_verify(&self, files: &[PathBuf]) -> Result<Vec<VerifiedLog>, Failure> {
        files.iter().map(|file| verify(file)).collect()
    }
}

fn failed(error: &DaemonError) -> Failure {
    let exit = match error {
        DaemonError::NotRoot => Exit::NotPermitted,
        DaemonError::Host(_)
        | DaemonError::Load(_)
        | DaemonError::Audit(_)
        | DaemonError::State(_)
        | DaemonError::Clock(_)
        | DaemonError::Metrics(_)
        | DaemonError::Bind(_)
        | DaemonError::Listen { .. }
        | DaemonError::Lock(_)
        | DaemonError::OwnPins { .. }
        | DaemonError::ContainerRuntime(_)
        | DaemonError::Directory { .. }
        | DaemonError::NotEnough { .. }
        | DaemonError::BrokeOff(_)
        | DaemonError::Runtime(_) => Exit::Failed,
    };
    Failure::new(exit, error.to_string())
}

fn view(error: &ManifestError) -> ManifestErrorView {
    let position = error.position;
    let message = match &error.value {
        Some(value) => format!("{value} {}; {}", error.message, error.remedy),
        None => format!("{}; {}", error.message, error.remedy),
    };
    ManifestErrorView {
        file: PathBuf::from(&error.file),
        line: position.map_or(0, |position| position.line as u64),
        column: position.map_or(0, |position| position.column as u64),
        field: error.field.clone().unwrap_or_default(),
        message,
    }
}

fn verify(file: &Path) -> Result<VerifiedLog, Failure> {
    let report = audit::verify::verify(file, None)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let broken = report
        .faults
        .first()
        .map(|fault| BrokenChain { line: fault.line, reason: fault.to_string() });
    Ok(VerifiedLog {
        file: file.to_owned(),
        records: report.records,
        broken,
        last_hash: report.head.map(|head| head.to_string()),
    })
}
