//! How the CLI ends, and how it says why.

use std::fmt;

use crate::api::client::ClientError;

/// The exit status. For `exec`, any status of the command itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done,
    /// It was tried and failed.
    Failed,
    Usage,
    /// A manifest is invalid.
    InvalidManifest,
    /// There is no daemon to talk to.
    NoDaemon,
    NotPermitted,
    InvalidConfiguration,
    /// The command is there and can not be run.
    NotExecutable,
    /// There is no such command.
    NotFound,
    /// Whoever read the output stopped reading; as if `SIGPIPE` had ended it.
    BrokenPipe,
    /// The status of the command that was run; 128 + n where signal n ended it.
    Command(u8),
}

impl Exit {
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::InvalidManifest => 65,
            Self::NoDaemon => 69,
            Self::NotPermitted => 77,
            Self::InvalidConfiguration => 78,
            Self::NotExecutable => 126,
            Self::NotFound => 127,
            Self::BrokenPipe => 128 + 13,
            Self::Command(status) => status,
        }
    }
}

/// Why a command did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub exit: Exit,
    /// One sentence, lower case.
    pub error: String,
    pub remedy: Option<String>,
    /// Further lines, as the errors of a manifest.
    pub details: Vec<String>,
}

impl Failure {
    #[must_use]
    pub fn new(exit: Exit, error: impl Into<String>) -> Self {
        Self { exit, error: error.into(), remedy: None, details: Vec::new() }
    }

    /// Whether nobody is left to be told.
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        self.exit == Exit::BrokenPipe
    }

    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)
    }
}

impl std::error::Error for Failure {}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let sentence = error.to_string();
        match error {
            ClientError::Output(error) => error.into(),
            ClientError::NoDaemon { .. } => Self::new(Exit::NoDaemon, sentence),
            ClientError::NotPermitted { .. } => Self::new(Exit::NotPermitted, sentence),
            ClientError::BrokenOff { .. } | ClientError::Unreadable { .. } => {
                Self::new(Exit::Failed, sentence)
            }
            ClientError::Refused { status, problem } => {
                let exit = match status {
                    403 => Exit::NotPermitted,
                    422 => Exit::InvalidManifest,
                    _ => Exit::Failed,
                };
                // A single error is the sentence already.
                let details = if problem.details.len() > 1 { problem.details } else { Vec::new() };
                Self { exit, error: sentence, remedy: problem.remedy, details }
            }
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        let exit = if error.kind() == std::io::ErrorKind::BrokenPipe {
            Exit::BrokenPipe
        } else {
            Exit::Failed
        };
        Self::new(exit, format!("the output could not be written: {error}"))
    }
}
