//! What became of an attack, and how errors are told apart.

use std::{fmt, io, process::ExitCode};

use serde::{Deserialize, Serialize};

/// The proof that the attack worked, or why it did not.
pub(crate) type Attempt = Result<String, Failure>;

/// Why an attack did not work.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    pub(crate) errno: Option<i32>,
    pub(crate) detail: String,
}

/// Whether a guard may be behind a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// What a guard does: `EPERM`, silence where an answer was due, `SIGKILL`.
    Refused,
    /// Anything else. The attack proves nothing.
    Error,
}

impl Failure {
    /// A step that no guard has a say in failed.
    pub(crate) fn setup(step: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self { kind: Kind::Error, errno: error.raw_os_error(), detail: format!("{step}: {error}") }
    }

    /// The set-up is not what the attack needs.
    pub(crate) fn unfit(detail: impl Into<String>) -> Self {
        Self { kind: Kind::Error, errno: None, detail: detail.into() }
    }

    pub(crate) fn refused(detail: impl Into<String>) -> Self {
        Self { kind: Kind::Refused, errno: None, detail: detail.into() }
    }

    /// A step that a guard may refuse failed. Only `EPERM` and silence count as refusals: a
    /// refused connection or a missing route means that the target was not there.
    pub(crate) fn at(step: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        let silence = matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock);
        let refused = silence || error.raw_os_error() == Some(libc::EPERM);
        Self {
            kind: if refused { Kind::Refused } else { Kind::Error },
            errno: error.raw_os_error(),
            detail: format!("{step}: {error}"),
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    attack: &'a str,
    outcome: &'a str,
    errno: Option<i32>,
    detail: &'a str,
}

/// Prints the line and gives the exit status: 0 worked, 1 refused, 2 error.
pub(crate) fn report(attack: &str, attempt: &Attempt) -> ExitCode {
    let (outcome, errno, detail, status) = match attempt {
        Ok(detail) => ("worked", None, detail, 0),
        Err(Failure { kind: Kind::Refused, errno, detail }) => ("refused", *errno, detail, 1),
        Err(Failure { kind: Kind::Error, errno, detail }) => ("error", *errno, detail, 2),
    };
    let line = Line { attack, outcome, errno, detail };
    match serde_json::to_string(&line) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("{attack}: {error}"),
    }
    ExitCode::from(status)
}
