//! `cargo xtask demo`: the main job, in a terminal, in under a minute once built.
//!
//! Its one job is the story: an agent works, meets what it was not granted, is granted more,
//! and loses it again, while the viewer sees each decision and where it came from. Every step
//! states what must happen, and the command ends with an error if one did not. First the same
//! tools run without the guard, so that a refusal later can have one cause only.
//!
//! The servers, the namespaces and the agent are in [`world`]. Steps go one after the other;
//! only the table of events is written by a process beside.

mod world;

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    dist::daemon_binary,
    guard::{Ending, Guard, METRICS, typed},
    interrupt,
    run::{heading, output, root},
    setup::{self, Purpose},
};
use world::{Agent, World};

/// The manifests the daemon runs on: what one agent may do.
const MANIFESTS: &str = "deploy/examples/researcher.yaml";

/// What the workload is called.
const NAME: &str = "researcher";

/// Who the agent is.
const IDENTITY: &str = "spiffe://example.org/host/researcher";

/// How long a grant in the demo lives that is to run out before the viewer's eyes.
const SHORT_GRANT: Duration = Duration::from_secs(6);

/// How soon a transfer must have begun.
const BEGUN: Duration = Duration::from_secs(5);

/// How soon a transfer must stop after its grant was revoked.
const STOPPED: Duration = Duration::from_secs(6);

/// Arguments of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Milliseconds between two steps, for whoever reads along
    #[arg(long, default_value_t = 300)]
    pace: u64,
    /// Stop after the tools ran without the guard; nothing is built
    #[arg(long)]
    unguarded: bool,
}

/// A tool of the agent, what it does, and whether its two first grants permit it.
struct Tool {
    file: &'static str,
    does: &'static str,
    expected: Outcome,
}

/// How using a tool ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Works,
    Refused,
}

const TOOLS: &[Tool] = &[
    Tool { file: "read_issue.sh", does: "curl the code host", expected: Outcome::Works },
    Tool { file: "clone.sh", does: "git clone", expected: Outcome::Works },
    Tool { file: "summarise.py", does: "its own Python script", expected: Outcome::Works },
    Tool { file: "metadata.sh", does: "read cloud credentials", expected: Outcome::Refused },
    Tool { file: COUNT_ORDERS, does: "ask the order database", expected: Outcome::Refused },
    Tool { file: DEPLOY, does: "ssh to the build host", expected: Outcome::Refused },
    Tool { file: "carry_out.py", does: "carry data out by UDP", expected: Outcome::Refused },
    Tool { file: "brought_along.sh", does: "run what it downloaded", expected: Outcome::Refused },
];

const COUNT_ORDERS: &str = "count_orders.py";
const DUMP_ORDERS: &str = "dump_orders.py";
const DEPLOY: &str = "deploy.sh";

/// Shows the main job.
///
/// # Errors
///
/// The set-up or the build fails, or a step did not behave.
pub(crate) fn demo(arguments: &Arguments) -> Result<()> {
    setup::setup(Purpose::Demo)?;
    let daemon = if arguments.unguarded {
        PathBuf::new()
    } else {
        heading("build");
        match env::var_os("AGENTGUARD_BIN") {
            Some(binary) => binary.into(),
            None => daemon_binary()?,
        }
    };
    interrupt::defer()?;
    let begin = Instant::now();
    heading("a world of its own: an agent, a code host, a database, cloud metadata, a build host");
    let world = World::new()?;
    let mut demo = Demo { world: &world, pace: Duration::from_millis(arguments.pace), wrong: 0 };
    demo.without_the_guard()?;
    if !arguments.unguarded {
        let directory = world.directory().join("guard");
        let manifests = world.directory().join("manifests");
        fs::create_dir_all(&manifests)?;
        fs::copy(root().join(MANIFESTS), manifests.join("researcher.yaml"))
            .with_context(|| format!("{MANIFESTS} cannot be copied"))?;
        let guard = Guard::new(&daemon, &directory, &manifests, world.node())?;
        demo.with_the_guard(&guard)?;
    }
    println!("\n{:.0} s", begin.elapsed().as_secs_f64());
    ensure!(demo.wrong == 0, "{} steps did not behave as they must", demo.wrong);
    println!("every step behaved as it must");
    Ok(())
}

struct Demo<'a> {
    world: &'a World,
    pace: Duration,
    /// How many steps did not behave.
    wrong: usize,
}

impl Demo<'_> {
    fn without_the_guard(&mut self) -> Result<()> {
        heading("without the guard: every tool works, also those that never should");
        let mut agent = Agent::start(self.world, Command::new("/usr/bin/python3"))?;
        for tool in TOOLS {
            self.step(&mut agent, tool.file, tool.does, Outcome::Works)?;
        }
        agent.end()
    }

    fn with_the_guard(&mut self, guard: &Guard<'_>) -> Result<()> {
        heading(&format!("the guard starts on {MANIFESTS}, and the agent under its identity"));
        let daemon = guard.start()?;
        guard.show(&["status"])?;
        let table = table(guard)?;
        let exec = guard.command(&[
            "exec",
            "--name",
            NAME,
            "--identity",
            IDENTITY,
            "--",
            "/usr/bin/python3",
        ]);
        let mut agent = Agent::start(self.world, exec)?;

        heading("two scopes are granted: agent:tools and github:read");
        for (index, tool) in TOOLS.iter().enumerate() {
            self.step(&mut agent, tool.file, tool.does, tool.expected)?;
            if index == 0 {
                // It has answered, so that it is where it shall be.
                agent.own_cgroup()?;
            }
        }

        heading("a scope is granted while the agent runs");
        let orders = grant(guard, "orders:read", Duration::from_secs(3600), "OPS-1301")?;
        self.step(&mut agent, COUNT_ORDERS, "what was refused now works", Outcome::Works)?;

        heading("it is revoked while a transfer is in flight");
        agent.start_tool(DUMP_ORDERS)?;
        let copied = agent.progress(BEGUN)?;
        println!("   in flight: {copied}");
        guard.show(&["revoke", &orders, "--reason", "OPS-1301 is done"])?;
        let revoked = Instant::now();
        let ended = agent.answer_of(DUMP_ORDERS, STOPPED)?;
        self.check("the transfer stops", ended.status != 0, &ended.said);
        println!("   {:.1} s after the revocation", revoked.elapsed().as_secs_f64());
        self.step(&mut agent, COUNT_ORDERS, "and does not begin again", Outcome::Refused)?;

        heading("a grant runs out while the guard's daemon is dead");
        grant(guard, "build:deploy", SHORT_GRANT, "OPS-1302")?;
        let granted = Instant::now();
        self.step(&mut agent, DEPLOY, "ssh to the build host", Outcome::Works)?;
        drop(table);
        daemon.kill()?;
        println!("   the daemon is killed, and with it the table; the kernel half goes on alone");
        self.step(&mut agent, "metadata.sh", "what was refused stays refused", Outcome::Refused)?;
        self.step(&mut agent, "read_issue.sh", "what was granted stays granted", Outcome::Works)?;
        let left = SHORT_GRANT.saturating_sub(granted.elapsed());
        interrupt::sleep(left + Duration::from_millis(500))?;
        self.step(&mut agent, DEPLOY, "the grant is over, in the kernel", Outcome::Refused)?;

        heading("the next daemon adopts what is in place");
        let daemon = guard.start()?;
        let table = self::table(guard)?;
        self.step(&mut agent, "read_issue.sh", "the agent works on", Outcome::Works)?;
        self.step(&mut agent, DEPLOY, "what is over stays over", Outcome::Refused)?;
        drop(table);

        heading("evidence");
        self.evidence(guard)?;

        heading("the agent ends, the guard is removed");
        agent.end()?;
        drop(agent);
        daemon.kill()?;
        guard.show(&["uninstall"])?;
        self.check("no pin is left", !guard.pins().exists(), "");
        let mut agent = Agent::start(self.world, Command::new("/usr/bin/python3"))?;
        self.step(&mut agent, "metadata.sh", "nothing is left behind", Outcome::Works)?;
        agent.end()
    }

    /// Shows the audit records, one explanation and the metrics, and checks what they say.
    fn evidence(&mut self, guard: &Guard<'_>) -> Result<()> {
        let records = audit_records(guard)?;
        let refused: Vec<_> =
            records.iter().filter(|line| line.contains("169.254.169.254")).collect();
        if let Some(record) = refused.first() {
            println!("{:#}", serde_json::from_str::<Value>(record)?);
        }
        let sound = records.iter().all(|line| serde_json::from_str::<Value>(line).is_ok());
        self.check("each audit record is JSON", sound, &format!("{} records", records.len()));
        self.check(
            "the refused read of credentials is on record with its identity",
            refused.iter().any(|line| line.contains(IDENTITY)),
            &format!("{} records", refused.len()),
        );
        let log = guard.audit_log();
        let verify = ["audit", "verify", &log.to_string_lossy()];
        let whole = guard.show(&verify).map_or_else(|error| error.to_string(), |()| String::new());
        self.check("the chain of records is whole", whole.is_empty(), &whole);
        guard.show(&["explain", "--workload", NAME, "--connect", "169.254.169.254:80/TCP"])?;
        let metrics = self.metrics()?;
        let series: Vec<_> =
            metrics.lines().filter(|line| line.starts_with("agentguard_")).collect();
        let denials: Vec<_> =
            series.iter().filter(|line| line.contains("verdict=\"deny\"")).collect();
        for line in &denials {
            println!("{line}");
        }
        let counted = format!("{} series, {} of them of denials", series.len(), denials.len());
        self.check("denials are in the metrics", !denials.is_empty(), &counted);
        Ok(())
    }

    fn metrics(&self) -> Result<String> {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail"]).arg(format!("http://{METRICS}/metrics"));
        output(&mut self.world.node().inside(&curl))
    }

    /// Has the agent use a tool, and compares how that ended with how it must.
    fn step(&mut self, agent: &mut Agent, tool: &str, does: &str, must: Outcome) -> Result<()> {
        interrupt::sleep(self.pace)?;
        let answer = agent.run_tool(tool)?;
        let outcome = if answer.status == 0 { Outcome::Works } else { Outcome::Refused };
        let said = if answer.said.is_empty() {
            format!("status {}", answer.status)
        } else {
            answer.said.clone()
        };
        self.check(does, outcome == must, &format!("{outcome:?}: {said} ({} s)", answer.seconds));
        // A refusal is an immediate answer. What runs into a limit of its own was lost.
        if must == Outcome::Refused {
            self.wrong += usize::from(answer.seconds > 3.0);
        }
        Ok(())
    }

    fn check(&mut self, what: &str, holds: bool, detail: &str) {
        self.wrong += usize::from(!holds);
        println!(" {} {what:<32} {detail}", if holds { "ok   " } else { "WRONG" });
    }
}

/// Shows what happens as it happens, until the value is dropped.
fn table(guard: &Guard<'_>) -> Result<Ending> {
    let mut events = guard.command(&["events", "--follow"]);
    events.stdin(Stdio::null()).spawn().map(Ending).context("the table of events cannot be shown")
}

/// Grants a scope to the agent, and gives the grant's id.
fn grant(guard: &Guard<'_>, scope: &str, ttl: Duration, reason: &str) -> Result<String> {
    let ttl = format!("{}s", ttl.as_secs());
    let whom = ["grant", "--to", IDENTITY, "--scope", scope, "--ttl", &ttl];
    let arguments = [&whom[..], &["--by", "demo", "--reason", reason]].concat();
    println!("$ agentguard {}", typed(&arguments));
    let id = output(&mut guard.command(&arguments))?.trim().to_owned();
    println!("{id}");
    Ok(id)
}

fn audit_records(guard: &Guard<'_>) -> Result<Vec<String>> {
    let path = guard.audit_log();
    let log = fs::read_to_string(&path)
        .with_context(|| format!("{}: there is no audit log", path.display()))?;
    Ok(log.lines().map(str::to_owned).collect())
}
