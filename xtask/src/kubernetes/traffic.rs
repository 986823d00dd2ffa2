//! What a pod asked, and what became of it, as its log tells.
//!
//! Its one job is to read what the pods of `manifests/traffic.yaml` write: one line for each request,
//! with the time at which the container runtime took it. The log is read where the kubelet keeps it,
//! so that it is there while the API server is not.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;

use super::cluster::Pace;
use crate::interrupt;

/// How long is waited for a line on a machine of its own.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the kernel goes on with a connection that nobody answers, and a bit: 131 s from 6.5 on, 127 s
/// before (`tcp_syn_retries` and `tcp_syn_linear_timeouts` by default).
const UNANSWERED: Duration = Duration::from_secs(140);

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    /// The guard refused it.
    Refused,
    /// It got past the guard: something answered, or nothing was there.
    Passed,
    /// It was let through and its packets were not: what became of a connection between whose call and
    /// whose first packet a change came into force. The pod asked for nothing else meanwhile.
    Unanswered,
}

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) at: Timestamp,
    pub(super) target: String,
    pub(super) outcome: Outcome,
}

/// A pod that asks.
#[derive(Debug)]
pub(super) struct Traffic {
    name: String,
    directory: PathBuf,
    /// The only one of its containers that is looked at; all, where there is none.
    container: Option<&'static str>,
    patience: Duration,
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Refused => "refused",
            Self::Passed => "let through",
            Self::Unanswered => "left without an answer",
        })
    }
}

impl Traffic {
    /// That of a pod, whose logs are below `logs`.
    pub(super) fn of(logs: &Path, namespace: &str, pod: &str, pace: Pace) -> Result<Self> {
        let patience = pace.patience(PATIENCE);
        let prefix = format!("{namespace}_{pod}_");
        let begin = Instant::now();
        loop {
            let entries = fs::read_dir(logs)
                .with_context(|| format!("{}: cannot be read", logs.display()))?;
            for entry in entries {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with(&prefix) {
                    return Ok(Self {
                        name: format!("{namespace}/{pod}"),
                        directory: entry.path(),
                        container: None,
                        patience,
                    });
                }
            }
            ensure!(begin.elapsed() < patience, "the pod {namespace}/{pod} has no log");
            interrupt::sleep(Duration::from_millis(100))?;
        }
    }

    /// That of one container of the pod.
    pub(super) fn of_container(&self, container: &'static str) -> Self {
        Self {
            name: format!("{}/{container}", self.name),
            directory: self.directory.clone(),
            container: Some(container),
            patience: self.patience,
        }
    }

    /// Everything that was asked, from the first request on.
    pub(super) fn all(&self) -> Result<Vec<Asked>> {
        self.since(Timestamp::UNIX_EPOCH)
    }

    /// What was asked from a time on.
    pub(super) fn since(&self, time: Timestamp) -> Result<Vec<Asked>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let container = entry?.path();
            if self.container.is_some_and(|only| !container.ends_with(only)) {
                continue;
            }
            for entry in fs::read_dir(&container)? {
                files.push(entry?.path());
            }
        }
        files.sort();
        let mut all = Vec::new();
        for file in files {
            // A line that is being written is not one yet.
            let text = fs::read_to_string(&file)?;
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            // They are in the order of their times. A pod that asks all the time has said a lot after an
            // hour, and is read again and again.
            let lines: Vec<&str> = whole.lines().collect();
            let from = lines.partition_point(|line| said_at(line).is_some_and(|at| at < time));
            for line in &lines[from..] {
                all.extend(asked(line).with_context(|| format!("{}: {line}", self.name))?);
            }
        }
        all.retain(|asked| asked.at >= time);
        Ok(all)
    }

    /// When the first request for `target` since `time` had this outcome.
    pub(super) fn first(
        &self,
        target: &str,
        outcome: Outcome,
        time: Timestamp,
    ) -> Result<Timestamp> {
        let begin = Instant::now();
        let mut speaks_from = None;
        loop {
            let since = self.since(time)?;
            let of_target = since.iter().filter(|asked| asked.target == target);
            if let Some(first) = of_target.clone().find(|asked| asked.outcome == outcome) {
                return Ok(first.at);
            }
            // A pod that waits for an answer asks for nothing.
            speaks_from = speaks_from.or_else(|| since.first().map(|_| Instant::now()));
            let is_over = match speaks_from {
                Some(from) => from.elapsed() > self.patience,
                None => begin.elapsed() > self.patience.max(UNANSWERED),
            };
            ensure!(
                !is_over,
                "{target} is not {outcome} for {} within {} s; asked {} times",
                self.name,
                begin.elapsed().as_secs(),
                of_target.count()
            );
            interrupt::sleep(Duration::from_millis(100))?;
        }
    }

    /// Fails unless all requests since `time` had the outcome that is expected of their target, and
    /// each target was asked for, which is waited for; how many there were. What is not expected
    /// anything of is not looked at.
    pub(super) fn judge(
        &self,
        time: Timestamp,
        expected: &BTreeMap<String, Outcome>,
    ) -> Result<usize> {
        let begin = Instant::now();
        loop {
            let mut counts: BTreeMap<&str, usize> =
                expected.keys().map(|target| (target.as_str(), 0)).collect();
            let since = self.since(time)?;
            for Asked { at, target, outcome } in &since {
                let Some(wanted) = expected.get(target) else { continue };
                ensure!(
                    outcome == wanted,
                    "{target} was {outcome} for {} at {at}; it has to be {wanted}",
                    self.name
                );
                *counts.entry(target).or_default() += 1;
            }
            let Some((missing, _)) = counts.iter().find(|(_, count)| **count == 0) else {
                return Ok(counts.values().sum());
            };
            ensure!(
                begin.elapsed() < self.patience,
                "{} did not ask for {missing} within {} s",
                self.name,
                self.patience.as_secs()
            );
            interrupt::sleep(Duration::from_millis(100))?;
        }
    }
}

/// When the container runtime took a line.
fn said_at(line: &str) -> Option<Timestamp> {
    line.split(' ').next()?.parse().ok()
}

/// What a line of the log says; most are of the shell's own kind.
fn asked(line: &str) -> Result<Option<Asked>> {
    // `2026-11-26T18:53:53.123456789Z stdout F …`
    let mut parts = line.splitn(4, ' ');
    let (Some(time), Some(_), Some(_), Some(text)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Ok(None);
    };
    let said = if let Some(said) = text.strip_prefix("asked ") {
        said.split_once(' ')
    } else {
        // `bash: line 5: /dev/tcp/10.0.0.1/80: Connection refused`
        text.split_once("/dev/tcp/").and_then(|(_, said)| said.split_once(": "))
    };
    let Some((target, said)) = said else { return Ok(None) };
    let outcome = match said {
        // That it was killed before its first instruction, or refused.
        "Operation not permitted" | "status 137" | "status 126" => Outcome::Refused,
        "Connection refused"
        | "Network is unreachable"
        | "No route to host"
        | "through"
        | "status 0" => Outcome::Passed,
        "Connection timed out" => Outcome::Unanswered,
        other => bail!("{other:?} is no outcome that is known"),
    };
    Ok(Some(Asked { at: time.parse()?, target: target.to_owned(), outcome }))
}
