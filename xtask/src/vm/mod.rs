//! `cargo xtask vm`: the tests on every kernel of the matrix.
//!
//! Its one job is to run the rows, two machines at a time, and to close with one honest line. The
//! test programs are those that ran on this kernel, byte for byte, against the same daemon; a
//! machine sees this machine's files, read-only. A row first lets `agentguard doctor` find what its
//! kernel gives: less than the row promises fails the run, whatever the tests say.

pub(crate) mod apt;
mod image;
mod kernels;
mod machine;
mod matrix;
mod results;
mod setup;
mod verdict;

use std::{
    panic,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    image::Job,
    kernels::Kernel,
    machine::{Accelerator, Machine},
    matrix::{ATTACKS, PACKAGES, ROWS, Row, is_attack, is_left_to_all, is_of, longest_first},
    results::Outcome,
    verdict::Found,
};
pub(crate) use self::{results::Matrix, setup::prepare};
use crate::{
    counting::{Reader, Total},
    dist::{daemon_binary, next_daemon_binary, static_agent_binary},
    interrupt,
    promise::{Promise, VARIABLE},
    run::{heading, root, target_dir},
    setup::Purpose,
    suites::{self, FACILITIES, Selection, Suite},
};

/// How many machines run at a time: a machine has two processors, and is idle half of the time.
const AT_ONCE: usize = 2;

/// Arguments of `cargo xtask vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these rows of the matrix
    #[arg(long = "kernel", value_name = "ROW", value_parser = row)]
    kernels: Vec<&'static Row>,
    /// Only tests whose name contains this
    #[arg(long = "test", value_name = "FILTER")]
    filter: Option<String>,
    /// Also at least one attack for each row of the threat model that is tested
    #[arg(long)]
    attacks: bool,
    /// Every test that a row's promises allow, however long it takes
    #[arg(long)]
    all: bool,
    /// Take the newest kernels of Debian's archive in place of those that were kept
    #[arg(long)]
    refresh: bool,
    /// Seconds after which a machine is switched off
    #[arg(long, default_value_t = LIMIT.as_secs())]
    limit: u64,
    /// Run nothing: write the README's table from the last run of the whole matrix
    #[arg(long)]
    write_table: bool,
    /// Boot, run this shell command in place of the tests, and end with its exit code
    #[arg(long, value_name = "COMMAND")]
    run: Option<String>,
}

/// How long a machine may take: several times of what one takes on two idle processors.
const LIMIT: Duration = Duration::from_secs(1500);

fn row(name: &str) -> Result<&'static Row> {
    ROWS.iter().find(|row| row.name == name).with_context(|| {
        format!("one of: {}", ROWS.iter().map(|row| row.name).collect::<Vec<_>>().join(", "))
    })
}

/// The daemon, and the one of the next version of the ABI that tests put in its place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Daemons<'a> {
    pub(crate) this: &'a Path,
    pub(crate) next: &'a Path,
    /// Debian's package of it, and the one of a version after it, where these are tested.
    pub(crate) packages: Option<[&'a Path; 2]>,
}

impl Daemons<'_> {
    /// Lines of a script by which tests find them.
    fn exports(self) -> String {
        let named = [("AGENTGUARD_BIN", self.this), ("AGENTGUARD_NEXT_BIN", self.next)];
        let packages = self
            .packages
            .map(|[this, next]| [("AGENTGUARD_DEB", this), ("AGENTGUARD_NEXT_DEB", next)]);
        let line = |(name, path): (&str, &Path)| {
            format!("export {name}={}\n", quoted(&path.display().to_string()))
        };
        named.into_iter().chain(packages.into_iter().flatten()).map(line).collect()
    }
}

/// What of the matrix is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    rows: &'a [&'static Row],
    filter: Option<&'a str>,
    /// Also the attacks that every kernel is to meet.
    attacks: bool,
    /// Also tests that the rows leave to other rows.
    all: bool,
    limit: Duration,
}

impl<'a> Wanted<'a> {
    /// The whole matrix, of the tests whose name contains `filter`.
    pub(crate) const fn everywhere(filter: Option<&'a str>) -> Self {
        Self { rows: &[], filter, attacks: false, all: false, limit: LIMIT }
    }

    /// The rows, oldest first.
    fn rows(&self) -> Vec<&'static Row> {
        if self.rows.is_empty() { ROWS.iter().collect() } else { self.rows.to_vec() }
    }
}

/// Runs the matrix, or a part of it.
///
/// # Errors
///
/// The set-up or a build fails, a test fails, or a kernel gives less than its row promises.
pub(crate) fn vm(arguments: &Arguments) -> Result<()> {
    if arguments.write_table {
        return results::write_table();
    }
    interrupt::defer()?;
    crate::setup::setup(Purpose::Vm)?;
    let wanted = Wanted {
        rows: &arguments.kernels,
        filter: arguments.filter.as_deref(),
        attacks: arguments.attacks,
        all: arguments.all,
        limit: Duration::from_secs(arguments.limit),
    };
    heading("build");
    let (next, daemon, suites) = beside_machines(&wanted, arguments.refresh, || {
        static_agent_binary()?;
        let next = next_daemon_binary()?;
        let daemon = daemon_binary()?;
        let suites = if arguments.run.is_some() { Vec::new() } else { suites::build()? };
        Ok((next, daemon, suites))
    })?;
    let daemons = Daemons { this: &daemon, next: &next, packages: None };
    if let Some(command) = &arguments.run {
        return by_hand(command, daemons, &wanted);
    }
    let matrix = matrix(&suites, daemons, &wanted)?;
    println!("\n{}", matrix.closing_line());
    ensure!(matrix.is_good(), "not every row is good");
    Ok(())
}

/// Installs Debian packages of the daemon in a machine under a real systemd, and runs the tests there
/// of what these do.
///
/// # Errors
///
/// The set-up or a build fails, or a test does.
pub(crate) fn verify_packages(daemon: &Path, packages: [&Path; 2]) -> Result<()> {
    interrupt::defer()?;
    crate::setup::setup(Purpose::Vm)?;
    heading("build");
    let suites = suites::build()?;
    let daemons = Daemons { this: daemon, next: daemon, packages: Some(packages) };
    let wanted = Wanted { rows: &[&PACKAGES], ..Wanted::everywhere(None) };
    let matrix = matrix(&suites, daemons, &wanted)?;
    println!("\n{}", matrix.closing_line());
    ensure!(matrix.is_good(), "the package is not as it is to be");
    Ok(())
}

/// Builds, and gets meanwhile what machines take beside it: that takes a minute, of which the processors
/// are idle for the most.
///
/// # Errors
///
/// The build fails, or a kernel can not be had.
pub(crate) fn beside_machines<T>(
    wanted: &Wanted<'_>,
    refresh: bool,
    build: impl FnOnce() -> Result<T>,
) -> Result<T> {
    thread::scope(|scope| {
        let machines = scope.spawn(|| Ready::get(wanted, refresh));
        let built = build()?;
        match machines.join() {
            Ok(ready) => ready.map(|_| built),
            // As it would have ended the run here.
            Err(panic) => panic::resume_unwind(panic),
        }
    })
}

/// Runs rows of the matrix and keeps what came of them.
///
/// # Errors
///
/// A kernel or a machine cannot be had. That a row is not good is no error here.
pub(crate) fn matrix(
    suites: &[Suite],
    daemons: Daemons<'_>,
    wanted: &Wanted<'_>,
) -> Result<Matrix> {
    let begin = Instant::now();
    for (row, suite, attack) in ATTACKS {
        let named = suites.iter().find(|known| known.name == suite);
        ensure!(
            named.is_some_and(|known| known.has(|test| is_of(test, attack))),
            "{suite} has no {attack} any more, by which every kernel is to meet {row}; name another"
        );
    }
    let nowhere = run_nowhere(suites);
    ensure!(
        nowhere.is_empty(),
        "run nowhere: no row of the matrix runs these, and they need more than this kernel is promised to give: {}",
        nowhere.join(", ")
    );
    let host = Host::new(daemons, wanted)?;
    heading(&format!("kernel matrix, with {}", host.ready.accelerator.as_str()));
    let rows = wanted.rows();
    let mut queue = rows.clone();
    longest_first(&mut queue);
    let queue = Mutex::new(queue.into_iter());
    let outcomes = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE.min(rows.len()))
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    loop {
                        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                        let Some(row) = next else { return Ok(()) };
                        let outcome = host.run(row, suites, wanted)?;
                        outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
                    }
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => bail!("a worker panicked"),
        })
    })?;
    let mut outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    outcomes.sort_by_key(|outcome| rows.iter().position(|row| row.name == outcome.row));
    let matrix = Matrix { outcomes, took: begin.elapsed() };
    let whole = wanted.filter.is_none() && rows.len() == ROWS.len();
    if whole {
        matrix.keep(&results::file())?;
    }
    Ok(matrix)
}

/// The tests that neither this kernel nor a row of the matrix runs where nothing else is asked for, but for
/// those of packages and those that are named as left out.
fn run_nowhere(suites: &[Suite]) -> Vec<String> {
    let is_run = |suite: &Suite, test: &str| {
        let given =
            |promises: &[Promise]| Promise::of_test(test).all(|needed| promises.contains(&needed));
        let of_a_package = Promise::of_test(test).any(|needed| needed == Promise::Package);
        // `cargo xtask deb --verify` runs those, which take a release.
        of_a_package
            || is_left_to_all(&suite.name, test)
            || given(suites::THIS_KERNEL)
            || ROWS.iter().any(|row| given(row.promises) && row.include(&suite.name, test))
    };
    let of = |suite: &Suite| {
        let left_out = suite.tests().filter(|test| !is_run(suite, test));
        left_out.map(|test| format!("{}: {test}", suite.name)).collect::<Vec<_>>()
    };
    suites.iter().flat_map(of).collect()
}

/// Boots the rows one after the other, each for one command of the caller's.
fn by_hand(command: &str, daemons: Daemons<'_>, wanted: &Wanted<'_>) -> Result<()> {
    let host = Host::new(daemons, wanted)?;
    let rows: &[&Row] = if wanted.rows.is_empty() { &[&ROWS[ROWS.len() - 1]] } else { wanted.rows };
    for row in rows {
        let ended = host.machine(row, wanted)?.run(
            &Job {
                script: &format!("{}{command}\n", daemons.exports()),
                manager: row.manager,
                visible: &host.visible(),
            },
            |line| println!("{line}"),
        )?;
        ensure!(ended.code == Some(0), "{}: the command ended with {:?}", row.name, ended.code);
    }
    Ok(())
}

/// Runs a script in a machine with a kernel of the matrix and as much memory, in MiB, as it takes,
/// and prints what it says. It sees this checkout and what was built of it.
///
/// # Errors
///
/// The machine cannot be had, or the script does not end well.
pub(crate) fn run_script(row: &str, script: &str, memory: u32, limit: Duration) -> Result<()> {
    crate::setup::setup(Purpose::Vm)?;
    let row = self::row(row)?;
    let wanted = Wanted { rows: &[row], filter: None, attacks: false, all: false, limit };
    let nothing = Path::new("");
    let daemons = Daemons { this: nothing, next: nothing, packages: None };
    let host = Host::new(daemons, &wanted)?;
    let machine = Machine { memory, ..host.machine(row, &wanted)? };
    println!("boots     {} by {}", host.kernel(row)?.release, host.ready.accelerator.as_str());
    let job = Job { script, manager: row.manager, visible: &host.visible() };
    let ended = machine.run(&job, |line| println!("{line}"))?;
    ensure!(ended.code == Some(0), "the machine's job ended with {:?}", ended.code);
    Ok(())
}

/// What machines take that is not built here.
struct Ready {
    virtiofsd: PathBuf,
    accelerator: Accelerator,
    /// By suite, in the order of the rows.
    kernels: Vec<(matrix::Suite, Kernel)>,
    cache: PathBuf,
}

impl Ready {
    /// Finds it, or gets it: kernels from Debian's archive, and by a boot what boots them.
    fn get(wanted: &Wanted<'_>, refresh: bool) -> Result<Self> {
        let cache = cache()?;
        let mut kernels: Vec<(matrix::Suite, Kernel)> = Vec::new();
        for row in wanted.rows() {
            if !kernels.iter().any(|(suite, _)| *suite == row.suite) {
                kernels.push((row.suite, Kernel::of(row.suite, &cache, refresh)?));
            }
        }
        let virtiofsd = machine::find_virtiofsd(&cache)
            .context("virtiofsd is missing; run `cargo xtask setup`")?;
        let (_, newest) = kernels.last().context("no kernel")?;
        let accelerator = machine::probe(newest, &virtiofsd, &cache)?;
        Ok(Self { virtiofsd, accelerator, kernels, cache })
    }
}

/// What all machines of a run share.
struct Host<'a> {
    daemons: Daemons<'a>,
    ready: Ready,
    target: PathBuf,
}

impl<'a> Host<'a> {
    fn new(daemons: Daemons<'a>, wanted: &Wanted<'_>) -> Result<Self> {
        Ok(Self {
            daemons,
            ready: Ready::get(wanted, false)?,
            target: target_dir().canonicalize()?,
        })
    }

    fn kernel(&self, row: &Row) -> Result<&Kernel> {
        let kernel = self.ready.kernels.iter().find(|(suite, _)| *suite == row.suite);
        kernel.map(|(_, kernel)| kernel).with_context(|| format!("{}: no kernel", row.name))
    }

    fn console(&self, row: &Row) -> PathBuf {
        self.ready.cache.join(format!("{}.console", row.name))
    }

    fn machine(&self, row: &Row, wanted: &Wanted<'_>) -> Result<Machine<'_>> {
        Ok(Machine {
            kernel: self.kernel(row)?,
            parameters: row.boot.parameters(),
            accelerator: self.ready.accelerator,
            virtiofsd: &self.ready.virtiofsd,
            memory: machine::MEMORY,
            limit: wanted.limit,
            console: self.console(row),
        })
    }

    /// Where the programs under test and what they read lie.
    fn visible(&self) -> [&Path; 2] {
        [root(), &self.target]
    }

    /// Runs a row.
    fn run(&self, row: &Row, suites: &[Suite], wanted: &Wanted<'_>) -> Result<Outcome> {
        let say = |line: &str| println!("[{}] {line}", row.name);
        let mut total = Total::default();
        let mut selections = Vec::new();
        let mut left_to_others = 0;
        for suite in suites {
            let matches = |test: &str| wanted.filter.is_none_or(|part| test.contains(part));
            let chosen = |test: &str| {
                wanted.all
                    || row.include(&suite.name, test)
                    || wanted.attacks && is_attack(&suite.name, test)
            };
            let selection = suite.select(row.promises, |test| matches(test) && chosen(test));
            left_to_others +=
                suite.select(row.promises, |test| matches(test) && !chosen(test)).run.len();
            for test in &selection.not_promised {
                say(&format!("test {}: {test} ... not promised by this row", suite.name));
                total.not_promised += 1;
            }
            if !selection.run.is_empty() {
                selections.push(selection);
            }
        }

        let kernel = self.kernel(row)?;
        say(&format!(
            "boots {}, which is to give: {}",
            kernel.release,
            suites::names_of(row.promises)
        ));
        let script = self.script(row, &selections);
        let mut reader = Reader::default();
        let job = Job { script: &script, manager: row.manager, visible: &self.visible() };
        let ended = self.machine(row, wanted)?.run(&job, |line| {
            reader.line(line);
            say(line);
        })?;

        let read = Found::read(&ended.report);
        let mut shortfalls = match &read {
            Ok(found) => found.missing(row.promises),
            Err(error) => vec![format!("{error:#}")],
        };
        for shortfall in &shortfalls {
            say(shortfall);
        }
        if let Ok(found) = &read {
            for promise in found.beyond(row.promises) {
                say(&format!(
                    "given and not promised: {}; its row may promise it",
                    promise.as_str()
                ));
            }
        }
        total += reader.total();
        match ended.code {
            Some(0) => {}
            Some(code) => total.broken += u64::try_from(code).unwrap_or(1),
            None => {
                total.broken += 1;
                shortfalls.push("the machine ended before its job".to_owned());
            }
        }
        let expected: u64 = selections.iter().map(|selection| selection.run.len() as u64).sum();
        let told = total.passed + total.failed + total.inapplicable;
        if told != expected {
            shortfalls.push(format!("{told} of {expected} tests told how they ended"));
            total.broken += 1;
        }
        let outcome = Outcome {
            row: row.name.to_owned(),
            release: kernel.release.clone(),
            lsm_parameter: row.boot.parameters().to_owned(),
            manager: row.manager,
            promises: row.promises.to_vec(),
            found: read.ok(),
            total,
            left_to_others: left_to_others as u64,
            shortfalls,
            took: ended.took,
        };
        say(&outcome.line());
        Ok(outcome)
    }

    /// What the machine runs: `doctor`, then each suite. Its exit code is the number of programs
    /// that ended badly.
    fn script(&self, row: &Row, selections: &[Selection<'_>]) -> String {
        let mut script = format!(
            "cd {}\n\
             {}\
             export {}={}\n\
             export {FACILITIES}={}\n\
             export AGENTGUARD_TEST_PINS=/sys/fs/bpf/agentguard-tests\n\
             export AGENTGUARD_TEST_DATAPATH_PINS=/sys/fs/bpf/agentguard-tests-datapath\n\
             broken=0\n\
             \"$AGENTGUARD_BIN\" doctor --output json >&3\n",
            quoted(&suites::directory().display().to_string()),
            self.daemons.exports(),
            VARIABLE,
            suites::names_of(row.promises),
            quoted(row.has),
        );
        for selection in selections {
            let arguments: Vec<_> = selection.arguments().map(quoted).collect();
            script.push_str(&format!(
                "echo; echo '     Running {}'\n{} 3>&- || broken=$((broken + 1))\n",
                selection.suite.name,
                arguments.join(" "),
            ));
        }
        script.push_str("exit $broken\n");
        script
    }
}

/// What is downloaded, and what a run leaves behind to be read.
fn cache() -> Result<PathBuf> {
    let cache = target_dir().join("vm");
    std::fs::create_dir_all(&cache)?;
    Ok(cache.canonicalize()?)
}

/// As one word of the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_a_name_of_its_own_and_promises_the_portable_layer() {
        for (index, row) in ROWS.iter().enumerate() {
            assert!(ROWS[..index].iter().all(|other| other.name != row.name), "{}", row.name);
            assert!(row.promises.contains(&Promise::Portable), "{}", row.name);
        }
    }

    #[test]
    fn a_word_stays_one_word() {
        assert_eq!(quoted("it's a path"), r"'it'\''s a path'");
    }
}
