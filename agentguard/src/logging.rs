//! The daemon's own log: what it does and what troubles it, on standard error.
//!
//! This is not evidence; what workloads did goes to the audit log. Text that others chose belongs
//! in here only as [`Text`](crate::audit::Text). Set up once, before anything is logged.

use std::io::{self, IsTerminal};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// What failed and needs somebody.
    Error,
    /// Also what is unusual.
    Warn,
    /// Also what changed.
    #[default]
    Info,
    /// Also why.
    Debug,
    /// Everything, also of the libraries.
    Trace,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object for each line.
    Json,
}

/// A word that is none of those it may be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not one of {known}")]
pub struct UnknownWord {
    given: String,
    known: &'static str,
}

impl FromStr for Level {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        match word {
            "error" => Ok(Self::Error),
            "warn" => Ok(Self::Warn),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(UnknownWord {
                given: word.to_owned(),
                known: "error, warn, info, debug, trace",
            }),
        }
    }
}

impl FromStr for Format {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        match word {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(UnknownWord { given: word.to_owned(), known: "text, json" }),
        }
    }
}

/// Where the kernel programs' own lines come from, as they name it.
const KERNEL_PROGRAMS: &str = "agentguard_ebpf";

/// The log was set up before.
#[derive(Debug, thiserror::Error)]
#[error("the log is set up already; set it up once per process")]
pub struct LoggingError(#[from] TryInitError);

/// Sends the process's log to standard error.
///
/// # Errors
/// When that was done before.
pub fn init(level: Level, format: Format) -> Result<(), LoggingError> {
    let colours = io::stderr().is_terminal();
    // Takes in what libraries and the kernel programs write with `log`, too.
    Ok(subscriber(level, format, colours, io::stderr).try_init()?)
}

/// What [`init`] sets up, for any destination.
fn subscriber<W>(level: Level, format: Format, colours: bool, writer: W) -> impl Subscriber
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let (own, libraries) = match level {
        Level::Error => (LevelFilter::ERROR, LevelFilter::ERROR),
        Level::Warn => (LevelFilter::WARN, LevelFilter::WARN),
        Level::Info => (LevelFilter::INFO, LevelFilter::WARN),
        Level::Debug => (LevelFilter::DEBUG, LevelFilter::WARN),
        Level::Trace => (LevelFilter::TRACE, LevelFilter::TRACE),
    };
    // What the kernel programs say of themselves is switched on and off in the kernel.
    let filter = Targets::new()
        .with_target(env!("CARGO_CRATE_NAME"), own)
        .with_target(KERNEL_PROGRAMS, LevelFilter::DEBUG)
        .with_default(libraries);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = match format {
        Format::Text => lines.with_ansi(colours).boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(filter))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::audit::Text;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: Level, format: Format, act: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = subscriber(level, format, false, move || writer.clone());
        tracing::subscriber::with_default(subscriber, act);
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn the_level_is_for_our_own_log_and_libraries_stay_quiet() {
        let log = logged(Level::Debug, Format::Text, || {
            tracing::debug!("ours");
            tracing::debug!(target: "hyper", "theirs");
            tracing::warn!(target: "hyper", "trouble");
        });
        assert!(log.contains("ours") && log.contains("trouble") && !log.contains("theirs"));
        let log = logged(Level::Error, Format::Text, || tracing::warn!("quiet"));
        assert_eq!(log, "");
    }

    #[test]
    fn json_is_one_object_for_each_line() {
        let log = logged(Level::Info, Format::Json, || {
            tracing::info!(grant = "g-1", "a grant was\nadded");
        });
        assert_eq!(log.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&log).unwrap();
        assert_eq!(value["level"], "INFO");
        assert_eq!(value["grant"], "g-1");
        assert_eq!(value["message"], "a grant was\nadded");
    }

    #[test]
    fn hostile_text_stays_on_its_line() {
        let path = Text::new("x\n2026-01-01 INFO forged\x1b[2J");
        let log = logged(Level::Info, Format::Text, || tracing::info!(%path, "started"));
        assert_eq!(log.lines().count(), 1);
        assert!(!log.contains('\x1b'));
    }

    #[test]
    fn words_are_read_as_the_configuration_spells_them() {
        assert_eq!("warn".parse(), Ok(Level::Warn));
        assert_eq!("json".parse(), Ok(Format::Json));
        assert_eq!(
            "loud".parse::<Level>().unwrap_err().to_string(),
            "`loud` is not one of error, warn, info, debug, trace"
        );
    }
}
