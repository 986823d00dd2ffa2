//! Pods and their containers, as an orchestrator runs them.

use std::{
    collections::HashMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use agentguard_agent::{Ask, Report};
use k8s_cri::v1;
use serde_json::Value;

use super::{Containerd, image, slice};
use crate::cgroup;

/// How long a container may take to say or to do something.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a pod is called after that.
const NAMESPACE: &str = "agents";

/// A pod that is yet to run.
#[derive(Debug)]
#[must_use]
pub struct PodPlan<'a> {
    containerd: &'a Containerd,
    config: v1::PodSandboxConfig,
    runtime_handler: String,
}

/// A pod that runs, until it is removed or its runtime goes.
#[derive(Debug)]
pub struct Pod<'a> {
    containerd: &'a Containerd,
    config: v1::PodSandboxConfig,
    id: String,
}

/// A container that is yet to be made.
#[derive(Debug)]
#[must_use]
pub struct ContainerPlan<'a> {
    pod: &'a Pod<'a>,
    config: v1::ContainerConfig,
}

/// A container that was made.
#[derive(Debug)]
pub struct Container<'a> {
    containerd: &'a Containerd,
    id: String,
    log: PathBuf,
}

/// What a command in a container left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    pub exit_code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl<'a> PodPlan<'a> {
    pub(super) fn new(containerd: &'a Containerd, name: &str) -> Self {
        let uid = containerd.next_uid();
        let namespaces =
            v1::NamespaceOption { pid: v1::NamespaceMode::Container as i32, ..Default::default() };
        let security = v1::LinuxSandboxSecurityContext {
            namespace_options: Some(namespaces),
            ..Default::default()
        };
        let config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.clone(),
                namespace: NAMESPACE.to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: containerd.logs().join(&uid).display().to_string(),
            labels: [("name", name), ("namespace", NAMESPACE), ("uid", &uid)]
                .map(|(key, value)| (format!("io.kubernetes.pod.{key}"), value.to_owned()))
                .into(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: containerd.pod_cgroup(&uid),
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        };
        Self { containerd, config, runtime_handler: String::new() }
    }

    /// Gives it a label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.config.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Gives it an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Puts it into another namespace of the orchestrator's.
    pub fn namespace(mut self, name: &str) -> Self {
        self.config.metadata.get_or_insert_default().namespace = name.to_owned();
        self.label("io.kubernetes.pod.namespace", name)
    }

    /// Puts it below the slice of a kubelet that has one of its own, as Kubernetes in Docker does.
    pub fn below_kubelets_slice(mut self) -> Self {
        let uid = self.config.metadata.get_or_insert_default().uid.clone();
        let linux = self.config.linux.get_or_insert_default();
        linux.cgroup_parent = slice("kubelet-kubepods", &uid);
        self
    }

    /// Puts it into the node's own network.
    pub fn host_network(mut self) -> Self {
        let namespaces = self.security().namespace_options.get_or_insert_default();
        namespaces.network = v1::NamespaceMode::Node as i32;
        self.config.hostname = String::new();
        self
    }

    /// Lets its containers be privileged.
    pub fn privileged(mut self) -> Self {
        self.security().privileged = true;
        self
    }

    /// Has it run by another runtime than the default one.
    pub fn runtime_handler(mut self, name: &str) -> Self {
        name.clone_into(&mut self.runtime_handler);
        self
    }

    fn security(&mut self) -> &mut v1::LinuxSandboxSecurityContext {
        let linux = self.config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default()
    }

    /// Runs it, and says why not where it cannot.
    ///
    /// # Errors
    ///
    /// What the runtime says.
    pub fn try_run(self) -> Result<Pod<'a>, String> {
        let Self { containerd, config, runtime_handler } = self;
        fs::create_dir_all(&config.log_directory).map_err(|error| error.to_string())?;
        let mut service = containerd.cri().service();
        let request = v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler };
        let answer = containerd.cri().call(service.run_pod_sandbox(request));
        let id = answer.map_err(|status| status.to_string())?.pod_sandbox_id;
        Ok(Pod { containerd, config, id })
    }

    /// Runs it.
    ///
    /// # Panics
    ///
    /// When the runtime does not.
    #[track_caller]
    #[must_use]
    pub fn run(self) -> Pod<'a> {
        self.try_run().unwrap_or_else(|error| panic!("a pod does not run: {error}"))
    }
}

impl<'a> Pod<'a> {
    /// What the runtime calls it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the orchestrator calls it.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |metadata| &metadata.uid)
    }

    /// Its cgroup, in which those of its containers are.
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        let parent = self.config.linux.as_ref().map_or("", |linux| &linux.cgroup_parent);
        cgroup::root().join(parent.trim_start_matches('/'))
    }

    /// Its address; `None` in the node's own network.
    ///
    /// # Panics
    ///
    /// When the runtime does not know it.
    #[track_caller]
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        let mut service = self.containerd.cri().service();
        let request =
            v1::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let answer = self.containerd.cri().call(service.pod_sandbox_status(request));
        let status = answer.expect("the runtime knows it").status.unwrap_or_default();
        status.network?.ip.parse().ok()
    }

    /// A container of it that does nothing until it is told what to do.
    pub fn container(&'a self, name: &str) -> ContainerPlan<'a> {
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: image::AGENT.to_owned(), ..Default::default() }),
            labels: [("io.kubernetes.container.name".to_owned(), name.to_owned())].into(),
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig::default()),
            ..Default::default()
        };
        ContainerPlan { pod: self, config }
    }

    /// Stops it with all of its containers, and removes it.
    ///
    /// # Panics
    ///
    /// When the runtime does not.
    #[track_caller]
    pub fn remove(self) {
        self.containerd.cri().remove(self.id).expect("a pod can be removed");
    }
}

impl<'a> ContainerPlan<'a> {
    /// Has it run this in place of what its image says.
    pub fn command<A: Into<String>>(mut self, words: impl IntoIterator<Item = A>) -> Self {
        self.config.command = words.into_iter().map(Into::into).collect();
        self
    }

    /// Has it ask for each of `asks` so many times at once when it starts, then wait.
    pub fn attempts(self, times: u32, asks: &[Ask]) -> Self {
        let times = times.to_string();
        let words = [image::PROGRAM, "attempt", "--stay", "--times", &times].map(str::to_owned);
        self.command(words.into_iter().chain(asks.iter().map(Ask::to_string)))
    }

    /// Gives it an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Counts it as the next attempt at a container of this name.
    pub fn attempt(mut self, number: u32) -> Self {
        self.config.metadata.get_or_insert_default().attempt = number;
        self
    }

    /// Shows it a directory of the node.
    pub fn mount(mut self, host: &Path, inside: &str) -> Self {
        self.config.mounts.push(v1::Mount {
            host_path: host.display().to_string(),
            container_path: inside.to_owned(),
            ..Default::default()
        });
        self
    }

    /// The same, without a right to write there.
    pub fn mount_read_only(self, host: &Path, inside: &str) -> Self {
        let mut plan = self.mount(host, inside);
        if let Some(mount) = plan.config.mounts.last_mut() {
            mount.readonly = true;
        }
        plan
    }

    /// Gives it every right there is; its pod has to be privileged.
    pub fn privileged(mut self) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        self
    }

    /// Makes it, and does not start it.
    ///
    /// # Errors
    ///
    /// What the runtime says.
    pub fn try_create(self) -> Result<Container<'a>, String> {
        let Self { pod, config } = self;
        let containerd = pod.containerd;
        let log = Path::new(&pod.config.log_directory).join(&config.log_path);
        let mut service = containerd.cri().service();
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = containerd.cri().call(service.create_container(request));
        let id = answer.map_err(|status| status.to_string())?.container_id;
        Ok(Container { containerd, id, log })
    }

    /// Makes it, and does not start it.
    ///
    /// # Panics
    ///
    /// When the runtime does not.
    #[track_caller]
    #[must_use]
    pub fn create(self) -> Container<'a> {
        self.try_create().unwrap_or_else(|error| panic!("a container is not made: {error}"))
    }

    /// Makes and starts it.
    ///
    /// # Panics
    ///
    /// When the runtime does not.
    #[track_caller]
    #[must_use]
    pub fn start(self) -> Container<'a> {
        let container = self.create();
        container.start();
        container
    }
}

impl<'a> Container<'a> {
    pub(super) fn found(containerd: &'a Containerd, id: &str) -> Self {
        let mut container = Self { containerd, id: id.to_owned(), log: PathBuf::new() };
        container.log = container.status().0.log_path.into();
        container
    }

    /// What the runtime calls it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// What the runtime says.
    pub fn try_start(&self) -> Result<(), String> {
        let mut service = self.containerd.cri().service();
        let request = v1::StartContainerRequest { container_id: self.id.clone() };
        let answer = self.containerd.cri().call(service.start_container(request));
        answer.map(drop).map_err(|status| status.to_string())
    }

    /// Starts it.
    ///
    /// # Panics
    ///
    /// When the runtime does not.
    #[track_caller]
    pub fn start(&self) {
        self.try_start().unwrap_or_else(|error| panic!("a container does not start: {error}"));
    }

    #[track_caller]
    fn status(&self) -> (v1::ContainerStatus, HashMap<String, String>) {
        let mut service = self.containerd.cri().service();
        let request = v1::ContainerStatusRequest { container_id: self.id.clone(), verbose: true };
        let answer = self.containerd.cri().call(service.container_status(request));
        let answer = answer.unwrap_or_else(|status| panic!("container {}: {status}", self.id));
        (answer.status.unwrap_or_default(), answer.info)
    }

    /// Whether it was started and has not ended.
    #[track_caller]
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.status().0.state() == v1::ContainerState::ContainerRunning
    }

    /// The pid of its first process, as the node sees it.
    ///
    /// # Panics
    ///
    /// When it does not run.
    #[track_caller]
    #[must_use]
    pub fn pid(&self) -> u32 {
        let (_, info) = self.status();
        let info: Value = serde_json::from_str(&info["info"]).expect("containerd tells JSON");
        let pid = info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        pid.filter(|pid| *pid != 0).unwrap_or_else(|| panic!("container {} has ended", self.id))
    }

    /// Its cgroup, as its first process has it.
    ///
    /// # Panics
    ///
    /// When it does not run.
    #[track_caller]
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", self.pid()));
        let groups = groups.expect("it runs");
        let path = groups.lines().find_map(|line| line.strip_prefix("0::/"));
        cgroup::root().join(path.expect("every process is in a cgroup of version 2"))
    }

    /// Runs a command in it, to its end.
    ///
    /// # Panics
    ///
    /// When the runtime does not.
    #[track_caller]
    pub fn exec<A: Into<String>>(&self, words: impl IntoIterator<Item = A>) -> Executed {
        let mut service = self.containerd.cri().service();
        let request = v1::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: words.into_iter().map(Into::into).collect(),
            timeout: i64::try_from(PATIENCE.as_secs()).expect("a minute is short"),
        };
        let answer = self.containerd.cri().call(service.exec_sync(request));
        let answer = answer.unwrap_or_else(|status| panic!("no command runs: {status}"));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Executed {
            exit_code: answer.exit_code,
            stdout: text(answer.stdout),
            stderr: text(answer.stderr),
        }
    }

    /// Has a command in it ask for each of `asks` so many times.
    ///
    /// # Panics
    ///
    /// When it does not report.
    #[track_caller]
    #[must_use]
    pub fn exec_attempts(&self, times: u32, asks: &[Ask]) -> Report {
        let times = times.to_string();
        let words = [image::PROGRAM, "attempt", "--times", &times].map(str::to_owned);
        let executed = self.exec(words.into_iter().chain(asks.iter().map(Ask::to_string)));
        serde_json::from_str(&executed.stdout)
            .unwrap_or_else(|error| panic!("{error}: {executed:?}"))
    }

    /// What its first process reports of its attempts, once it does.
    ///
    /// # Panics
    ///
    /// When it ends or takes too long before it does.
    #[track_caller]
    #[must_use]
    pub fn report(&self) -> Report {
        let begin = Instant::now();
        loop {
            let (status, _) = self.status();
            let is_running = status.state() == v1::ContainerState::ContainerRunning;
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            if let Some(report) = log.split_inclusive('\n').find_map(report_of) {
                return report;
            }
            assert!(is_running, "container {} ended without a report: {status:?}: {log}", self.id);
            assert!(begin.elapsed() < PATIENCE, "no report of container {}: {log}", self.id);
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What its processes wrote, as the runtime keeps it.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it.
    ///
    /// # Panics
    ///
    /// When the runtime does not.
    #[track_caller]
    pub fn stop(&self) {
        let mut service = self.containerd.cri().service();
        let request = v1::StopContainerRequest { container_id: self.id.clone(), timeout: 10 };
        let answer = self.containerd.cri().call(service.stop_container(request));
        answer.unwrap_or_else(|status| panic!("container {} goes on: {status}", self.id));
    }

    /// Removes it; what of it still runs is ended.
    ///
    /// # Panics
    ///
    /// When the runtime does not.
    #[track_caller]
    pub fn remove(self) {
        let mut service = self.containerd.cri().service();
        let request = v1::RemoveContainerRequest { container_id: self.id.clone() };
        let answer = self.containerd.cri().call(service.remove_container(request));
        answer.unwrap_or_else(|status| panic!("container {} stays: {status}", self.id));
    }
}

/// Reads a whole line `<time> stdout F <report>`.
fn report_of(line: &str) -> Option<Report> {
    let mut parts = line.strip_suffix('\n')?.splitn(4, ' ');
    let text = parts.nth(3)?;
    serde_json::from_str(text).ok()
}
