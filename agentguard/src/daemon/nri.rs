//! The runtime that waits for the daemon before it starts a container.
//!
//! Its one job is to be its plugin for as long as the daemon runs, and to know whether it is. As long
//! as it is not, nothing waits for the daemon: containers start, and pods' tags hold what is in them.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::containers;
use super::service::Shared;
use crate::config::Configuration;
use crate::config::value::NriSocket;
use crate::identity::ProcessRef;
use crate::retry;
use crate::runtimes::nri::{self, NriError, RuntimeName, Start};

/// Where runtimes put the socket.
const USUAL: &str = "/var/run/nri/nri.sock";
/// How long a runtime that ended the connection is left alone at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often it is looked for a socket that is not there.
const LOOK: Duration = Duration::from_secs(1);

/// How it stands with the runtime.
#[derive(Debug, Default)]
pub struct Health(Mutex<State>);

/// Whether a runtime waits for the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It is not asked to.
    #[default]
    Off,
    /// None offers it.
    Absent,
    Connected(RuntimeName),
    /// Why one that does, or should, does not.
    Lost(String),
}

impl Health {
    #[must_use]
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    /// What is wrong, if anything is.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        match &*self.lock() {
            State::Lost(why) => Some(why.clone()),
            State::Off | State::Absent | State::Connected(_) => None,
        }
    }

    /// What it was before.
    fn set(&self, state: State) -> State {
        std::mem::replace(&mut *self.lock(), state)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which socket is followed, and whether one must be there.
fn socket(configuration: &Configuration) -> Option<(&Path, Expected)> {
    let containers = &configuration.containers;
    match &containers.nri {
        NriSocket::Off => None,
        // Nobody who runs no containers of agents shall have them wait.
        NriSocket::Auto if containers.runtimes.is_empty() => None,
        NriSocket::Auto => Some((Path::new(USUAL), Expected::Perhaps)),
        NriSocket::At(path) => Some((path, Expected::Surely)),
    }
}

/// Whether a runtime must offer it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Perhaps,
    Surely,
}

/// Is the plugin of the runtime that is configured, if one is.
pub fn follow_runtime(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) {
    if socket(&shared.configuration).is_some() {
        shared.containers.nri.set(State::Absent);
        tasks.spawn(follow(Arc::clone(shared)));
    }
}

async fn follow(shared: Arc<Shared>) {
    let Some((socket, mut expected)) = socket(&shared.configuration) else { return };
    let health = &shared.containers.nri;
    let mut pauses = retry::pauses(PAUSES.0, PAUSES.1);
    loop {
        let plugin = Arc::new(Plugin(Arc::clone(&shared)));
        let Err(error) = nri::serve(socket, plugin).await;
        let was_connected = matches!(health.state(), State::Connected(_));
        if was_connected {
            // It is there, and comes again.
            expected = Expected::Surely;
            pauses = retry::pauses(PAUSES.0, PAUSES.1);
        }
        if expected == Expected::Perhaps && is_absent(&error) {
            health.set(State::Absent);
            sleep(LOOK).await;
            continue;
        }
        let why = problem(socket, &error);
        if !matches!(health.set(State::Lost(why.clone())), State::Lost(_)) {
            tracing::error!("{why}");
        }
        sleep(pauses.next().unwrap_or(PAUSES.1)).await;
    }
}

fn is_absent(error: &NriError) -> bool {
    matches!(error, NriError::Connect(error) if error.kind() == io::ErrorKind::NotFound)
}

fn problem(socket: &Path, error: &NriError) -> String {
    format!(
        "the container runtime's NRI at {} {error}; no start of a container waits for the daemon \
         meanwhile, and what starts is held by its pod's tag; see the runtime's log, or set \
         containers.nri to off",
        socket.display()
    )
}

struct Plugin(Arc<Shared>);

impl nri::Plugin for Plugin {
    fn trust(&self, pid: u32) -> Result<(), String> {
        let process = ProcessRef::of(pid).ok_or_else(|| format!("there is no process {pid}"))?;
        if containers::is_held(&self.0, &process) {
            return Err(format!("the process {pid} is a workload's, which has no say in it"));
        }
        Ok(())
    }

    fn connected(&self, runtime: &RuntimeName) {
        self.0.containers.nri.set(State::Connected(runtime.clone()));
        tracing::info!(%runtime, "the container runtime waits for the daemon before each start");
        // What started before this is in its list, and nobody told of it.
        self.0.containers.ask_runtimes();
    }

    async fn starts(&self, start: Start, patience: Duration) -> Result<(), String> {
        let what = start.container.as_ref().map_or_else(
            || {
                format!(
                    "the sandbox of pod {}/{}",
                    start.sandbox.pod.namespace, start.sandbox.pod.name
                )
            },
            |container| {
                let pod = &start.sandbox.pod;
                format!("container {} of pod {}/{}", container.name, pod.namespace, pod.name)
            },
        );
        match containers::start(&self.0, start, patience).await {
            Ok(_held) => Ok(()),
            Err(error) => {
                let why = format!("{what} is not held by agentguard: {error}");
                tracing::error!("{why}");
                Err(why)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(nri: &str, runtimes: &[&str]) -> Configuration {
        let mut configuration = Configuration::default();
        configuration.containers.nri = nri.parse().unwrap();
        configuration.containers.runtimes =
            runtimes.iter().map(|path| path.parse().unwrap()).collect();
        configuration
    }

    #[test]
    fn a_socket_is_followed_where_it_is_named_or_a_runtime_is() {
        let runtime = ["/run/containerd/containerd.sock"];
        assert_eq!(socket(&configured("off", &runtime)), None);
        assert_eq!(socket(&configured("auto", &[])), None);
        let usual = Some((Path::new(USUAL), Expected::Perhaps));
        assert_eq!(socket(&configured("auto", &runtime)), usual);
        let named = Some((Path::new("/run/nri.sock"), Expected::Surely));
        assert_eq!(socket(&configured("/run/nri.sock", &[])), named);
    }

    #[test]
    fn a_socket_that_is_not_there_is_told_from_one_where_nobody_listens() {
        let of = |kind| NriError::Connect(io::Error::from(kind));
        assert!(is_absent(&of(io::ErrorKind::NotFound)));
        assert!(!is_absent(&of(io::ErrorKind::ConnectionRefused)));
        assert!(!is_absent(&NriError::Refused("no".to_owned())));
        let told = problem(Path::new("/run/nri.sock"), &of(io::ErrorKind::ConnectionRefused));
        assert!(told.contains("/run/nri.sock") && told.contains("containers.nri"), "{told}");
    }
}
