//! `agentguard exec`: becomes the command, as a workload.
//!
//! Beside a running daemon this process asks to be confined and then replaces itself with the
//! command: the same process, so terminal, job control, signals and exit status need no help.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use nix::unistd::{AccessFlags, access, geteuid};

use super::exit::{Exit, Failure};
use super::inherited;
use super::output::Tone;
use super::{Context, Result};
use crate::api::client::ClientError;
use crate::api::ttl::parse_ttl;
use crate::api::types::{Confine, Mode};

/// Run a command as a workload, held to its scopes
///
/// Beside a running daemon every user may do this: it only ever takes rights away. Without a daemon
/// it needs root.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The workload identity (SPIFFE ID) [default: spiffe://{trust domain}/user/{uid}/{name}]
    #[arg(long, value_name = "SPIFFE-ID")]
    identity: Option<String>,
    /// The workload's name [default: the command's]
    #[arg(long)]
    name: Option<String>,
    /// A scope to grant to it; may be given many times. With none it keeps what is granted to its
    /// identity otherwise
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<String>,
    /// How long the scopes are granted, as 90m, 8h or 2d
    #[arg(long, default_value = "8h", value_parser = checked_ttl)]
    ttl: String,
    /// Record what is denied and let it through
    #[arg(long)]
    audit: bool,
    /// The command with its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn checked_ttl(text: &str) -> std::result::Result<String, String> {
    parse_ttl(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

pub(super) fn run(arguments: &Arguments, context: Context<'_, '_>) -> Result {
    let (program, rest) = arguments
        .command
        .split_first()
        .ok_or_else(|| Failure::new(Exit::Usage, "there is no command to run"))?;
    let executable = resolve(program, std::env::var_os("PATH").as_deref())?;
    let lossy = |word: &OsString| word.to_string_lossy().into_owned();
    let mode = if arguments.audit { Mode::Audit } else { Mode::Enforce };
    let inherited = inherited::settle(mode, context.console)?;
    let request = Confine {
        name: arguments.name.clone(),
        identity: arguments.identity.clone(),
        scopes: arguments.scopes.clone(),
        ttl: (!arguments.scopes.is_empty()).then(|| arguments.ttl.clone()),
        mode,
        command: arguments.command.iter().map(lossy).collect(),
        executable: executable.clone(),
        inherited,
    };
    let confined = match context.client.confine(&request) {
        Ok(confined) => confined,
        Err(ClientError::NoDaemon { .. }) if geteuid().is_root() => {
            return context.backend.exec_standalone(context.config.as_deref(), &request);
        }
        Err(error @ ClientError::NoDaemon { .. }) => {
            return Err(Failure::new(Exit::NoDaemon, error.to_string())
                .with_remedy("without a daemon this needs root: sudo agentguard exec …"));
        }
        Err(error) => return Err(error.into()),
    };
    for warning in &confined.warnings {
        context.console.note("agentguard: warning:", Tone::Careful, warning);
    }
    let error = Command::new(&executable).arg0(program).args(rest).exec();
    Err(not_run(&executable, &error, &confined.workload))
}

/// Why the kernel did not run what was found.
fn not_run(executable: &Path, error: &std::io::Error, workload: &str) -> Failure {
    let path = executable.display();
    if error.kind() == ErrorKind::NotFound {
        Failure::new(Exit::NotFound, format!("{path} or its interpreter is not there"))
    } else if error.kind() == ErrorKind::PermissionDenied {
        Failure::new(Exit::NotExecutable, format!("{path} may not be run: {error}")).with_remedy(
            format!("from outside the workload: agentguard explain --last --workload {workload}"),
        )
    } else {
        Failure::new(Exit::NotExecutable, format!("{path} can not be run: {error}"))
    }
}

/// The file that running `program` runs, absolute: with a slash as it stands, else the first in
/// `path` that can be run, as a shell finds it.
fn resolve(program: &OsStr, path: Option<&OsStr>) -> Result<PathBuf> {
    let shown = program.display();
    let not_found = || Failure::new(Exit::NotFound, format!("{shown}: command not found"));
    let not_executable = || Failure::new(Exit::NotExecutable, format!("{shown}: not executable"));
    if program.is_empty() {
        return Err(not_found());
    }
    let candidates: Vec<PathBuf> = if program.as_encoded_bytes().contains(&b'/') {
        vec![program.into()]
    } else {
        let path = path.unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin"));
        std::env::split_paths(path).map(|directory| directory.join(program)).collect()
    };
    let mut is_there = false;
    for candidate in candidates {
        if candidate.is_file() && access(&candidate, AccessFlags::X_OK).is_ok() {
            return std::path::absolute(&candidate).map_err(|_| not_found());
        }
        is_there |= candidate.exists();
    }
    Err(if is_there { not_executable() } else { not_found() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_command_is_found_as_a_shell_finds_it() {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str, mode| {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        make("first/tool", 0o644);
        let tool = make("second/tool", 0o755);
        make("first/data", 0o644);
        let both = ["first", "second"].map(|name| directory.path().join(name));
        let path = std::env::join_paths(both).unwrap();
        let find = |name: &str| resolve(OsStr::new(name), Some(&path));

        assert_eq!(find("tool").unwrap(), tool);
        assert_eq!(resolve(tool.as_os_str(), None).unwrap(), tool);
        assert_eq!(find("data").unwrap_err().exit, Exit::NotExecutable);
        assert_eq!(find("missing").unwrap_err().exit, Exit::NotFound);
        assert_eq!(find("").unwrap_err().exit, Exit::NotFound);
        let of_directory = directory.path().as_os_str();
        assert_eq!(resolve(of_directory, None).unwrap_err().exit, Exit::NotExecutable);
    }
}
