//! Network namespaces that a command makes for itself.
//!
//! Its one job is to make one, to run programs in it, and to take it away again. None has a
//! route that leads out, so that nothing that runs inside reaches any network but its own.

use std::process::Command;

use anyhow::Result;

use crate::run::output;

/// A network namespace with its loopback up. Dropping it takes it away.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: &'static str,
}

impl Namespace {
    /// Makes it, after taking away one that an interrupted run left under this name.
    pub(crate) fn new(name: &'static str) -> Result<Self> {
        // Absence is the usual case.
        let _ = ip(&["netns", "del", name]);
        ip(&["netns", "add", name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Runs `ip` on what is inside.
    pub(crate) fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", self.name], arguments].concat())
    }

    /// The same command, inside.
    ///
    /// Not by `ip netns exec`, which also mounts another `/sys` and hides the cgroups in it.
    /// The process keeps its id: nsenter makes no other one.
    pub(crate) fn inside(&self, command: &Command) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter.arg(format!("--net=/run/netns/{}", self.name));
        nsenter.arg("--").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => nsenter.env(name, value),
                None => nsenter.env_remove(name),
            };
        }
        nsenter
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", self.name]) {
            eprintln!("the network namespace {} is left over: {error:#}", self.name);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    output(Command::new("ip").args(arguments)).map(drop)
}
