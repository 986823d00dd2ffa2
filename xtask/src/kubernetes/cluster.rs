//! A cluster of one node.
//!
//! Its one job is to start the parts of Kubernetes on a [`Node`] in the order in which they need
//! each other, to say when they are ready, and to be asked by `kubectl`. How a part is configured
//! differs from a production cluster only where one node, no registry, and no capability to raise
//! resource limits ask for it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    build::ControlPlane,
    images,
    keys::Keys,
    node::{ADDRESS, Node},
    programs::Programs,
};
use crate::run::{copy_environment, heading, output};

/// Addresses of pods, of services, and of the API server among them.
const PODS: &str = "10.244.0.0/24";
const SERVICES: &str = "10.96.0.0/16";
const API_SERVICE: &str = "10.96.0.1";

/// The API server as pods know it.
pub(super) const API: &str = "10.96.0.1/443";

/// The node's name.
pub(super) const NODE: &str = "node1";

/// The name of what runs containers.
const RUNTIME: &str = "containerd";

/// Names of the control plane's programs.
const API_SERVER: &str = "kube-apiserver";
const CONTROLLER_MANAGER: &str = "kube-controller-manager";
const SCHEDULER: &str = "kube-scheduler";

/// The store, which nobody but the API server reaches.
const ETCD: &str = "http://127.0.0.1:2379";

/// How long a part may take to be ready.
const READY: Duration = Duration::from_secs(240);

/// How fast the machine is that the cluster is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    Own,
    /// Each processor is a program: a time says little there.
    Emulated,
}

impl Pace {
    /// What a limit is in practice that is promised of real machines.
    pub(super) fn allows(self, limit: Duration) -> Duration {
        match self {
            Self::Own => limit,
            Self::Emulated => limit * 20,
        }
    }

    /// How often something is done, in seconds, that the machine has to have time for.
    pub(super) const fn every(self, own: &'static str, emulated: &'static str) -> &'static str {
        match self {
            Self::Own => own,
            Self::Emulated => emulated,
        }
    }

    /// A part of Kubernetes as it is started here. Where processors are slow and memory is not, its garbage
    /// is collected less often.
    fn started(self, mut command: Command) -> Command {
        match self {
            Self::Own => command,
            Self::Emulated => {
                command.env("GOGC", "400");
                command
            }
        }
    }

    /// The same command, where processors are slow ahead of all that waits for it: the API server gives up
    /// when it is not up within a time of its own.
    fn ahead(self, command: Command) -> Command {
        match self {
            Self::Own => command,
            Self::Emulated => {
                let mut nice = Command::new("nice");
                nice.args(["-n", "-10"]).arg(command.get_program()).args(command.get_args());
                copy_environment(&command, &mut nice);
                nice
            }
        }
    }

    /// How long is waited for what takes at most so long on a machine of its own.
    pub(super) fn patience(self, limit: Duration) -> Duration {
        match self {
            Self::Own => limit,
            Self::Emulated => limit * 5,
        }
    }
}

/// A cluster that is ready for pods. Dropping it ends it.
pub(super) struct Cluster<'a> {
    node: Node,
    programs: &'a Programs,
    control_plane: &'a ControlPlane,
    keys: Keys,
    pace: Pace,
}

impl<'a> Cluster<'a> {
    /// Starts one, with `scratch` for what it writes.
    ///
    /// # Errors
    ///
    /// A part does not become ready.
    pub(super) fn start(
        scratch: &Path,
        programs: &'a Programs,
        control_plane: &'a ControlPlane,
        pace: Pace,
    ) -> Result<Self> {
        let node = Node::new(scratch, programs.path())?;
        let directory = node.scratch().join("keys");
        fs::create_dir_all(&directory)?;
        let keys = Keys::new(&directory)?;
        let mut cluster = Self { node, programs, control_plane, keys, pace };
        cluster.runtime()?;
        cluster.api_server()?;
        cluster.start_controllers()?;
        cluster.proxy()?;
        cluster.kubelet()?;
        Ok(cluster)
    }

    pub(super) const fn pace(&self) -> Pace {
        self.pace
    }

    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// `kubectl` as the cluster's administrator.
    pub(super) fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut kubectl = Command::new(self.programs.program("kubectl"));
        kubectl
            .arg("--kubeconfig")
            .arg(self.administrator())
            .args(arguments)
            .env("HOME", self.node.scratch());
        self.node.inside(&kubectl)
    }

    /// The administrator's kubeconfig.
    pub(super) fn administrator(&self) -> PathBuf {
        self.keys.path("admin.kubeconfig")
    }

    /// A shell command on the node, with a `kubectl` that needs no more arguments.
    pub(super) fn shell(&self, command: &str) -> Command {
        let mut sh = Command::new("sh");
        sh.args(["-c", command])
            .env("KUBECONFIG", self.administrator())
            .env("HOME", self.node.scratch());
        self.node.inside(&sh)
    }

    /// A program of the node.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.programs.program(name)
    }

    /// What runs containers here.
    pub(super) fn runtime_program(&self) -> PathBuf {
        self.programs.runc()
    }

    /// Starts a program that stays.
    pub(super) fn start_program(&mut self, name: &str, command: &Command) -> Result<()> {
        self.node.start(name, command)
    }

    /// Ends a program that [`Self::start_program`] started.
    pub(super) fn stop_program(&mut self, name: &str) -> Result<()> {
        self.node.stop(name)
    }

    /// Takes the API server away, and what a control plane has beside it.
    pub(super) fn stop_control_plane(&mut self) -> Result<()> {
        self.node.kill(SCHEDULER)?;
        self.node.kill(CONTROLLER_MANAGER)?;
        self.node.stop(API_SERVER)
    }

    /// Starts it again, and returns once the API server is ready. When that one fails it is started anew,
    /// as a service manager does.
    pub(super) fn start_control_plane_again(&mut self) -> Result<()> {
        let api = started_again(&self.api_server_command());
        self.start_api_server(&api)?;
        self.start_controllers()
    }

    fn start_api_server(&mut self, api: &Command) -> Result<()> {
        self.node.start(API_SERVER, api)?;
        let mut ready = self.kubectl(&["get", "--raw", "/readyz"]);
        let took = self.node.wait("the API server is ready", self.pace.patience(READY), |_| {
            Ok(output(&mut ready).is_ok_and(|said| said == "ok"))
        });
        let took = took.with_context(|| self.node.end_of_log(API_SERVER))?;
        said(API_SERVER, took);
        Ok(())
    }

    /// Prints what the cluster knows of the daemon, for who reads why a check failed: with the cluster all
    /// of it goes.
    pub(super) fn print_account_of_daemon(&self) {
        let logs = ["logs", "--selector=app.kubernetes.io/name=agentguard", "--tail=100"];
        let earlier = [&logs[..], &["--previous"]].concat();
        let questions: [&[&str]; 4] = [
            &["describe", "pods"],
            &["get", "events", "--sort-by=.metadata.creationTimestamp"],
            &logs,
            &earlier,
        ];
        for question in questions {
            heading(&format!("kubectl {}", question.join(" ")));
            let common = ["--namespace=agentguard", "--request-timeout=20s"];
            let arguments = [&common[..], question].concat();
            match output(&mut self.kubectl(&arguments)) {
                Ok(said) => println!("{said}"),
                Err(error) => println!("{error:#}"),
            }
        }
    }

    /// Imports an archive of images.
    pub(super) fn import(&self, archive: &Path) -> Result<()> {
        let mut ctr = Command::new(self.programs.program("ctr"));
        ctr.args(["--namespace", "k8s.io", "images", "import"]).arg(archive);
        output(&mut self.node.inside(&ctr)).map(drop)
    }

    /// Ends it, so that an error is one.
    pub(super) fn end(mut self) -> Result<()> {
        // The kubelet first: it would start again what ends.
        self.node.stop("kubelet")?;
        self.node.take_away()
    }

    /// containerd, with the images of the tests.
    fn runtime(&mut self) -> Result<()> {
        let at = |name: &str| self.node.scratch().join(name);
        let networks = at("networks");
        fs::create_dir_all(&networks)?;
        fs::write(networks.join("pods.conflist"), network())?;
        let pause = images::pause(&at("pause.tar"))?;
        let tools = images::tools(&at("tools.tar"))?;
        let took = self.start_runtime("")?;
        self.import(&pause)?;
        self.import(&tools)?;
        said("containerd", took);
        Ok(())
    }

    /// Starts containerd, with `more` said of the runtime that runs pods.
    fn start_runtime(&mut self, more: &str) -> Result<Duration> {
        let at = |name: &str| self.node.scratch().join(name);
        let config = at("containerd.toml");
        let own = runtime_config(&at("networks"), &self.programs.network_plugins());
        fs::write(&config, own + more)?;
        let mut containerd = Command::new(self.programs.program("containerd"));
        containerd.arg("--config").arg(config);
        self.node.start(RUNTIME, &containerd)?;
        let ctr = self.programs.program("ctr");
        self.node.wait("containerd answers", self.pace.patience(READY), |node| {
            Ok(output(&mut node.inside(Command::new(&ctr).arg("version"))).is_ok())
        })
    }

    /// Starts containerd anew, with `more` said of the runtime that runs pods: lines of its table. What
    /// runs goes on meanwhile.
    pub(super) fn restart_runtime(&mut self, more: &str) -> Result<Duration> {
        self.node.stop(RUNTIME)?;
        self.start_runtime(more)
    }

    /// etcd and the API server.
    fn api_server(&mut self) -> Result<()> {
        let server = format!("https://{ADDRESS}:6443");
        let names = [
            ADDRESS,
            API_SERVICE,
            "127.0.0.1",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
        ];
        self.keys.issue("server", "kube-apiserver", None, &names)?;
        let masters = Some("system:masters");
        self.keys.user("admin", "admin", masters, &server)?;
        self.keys.user("controllers", "system:kube-controller-manager", None, &server)?;
        self.keys.user("scheduler", "system:kube-scheduler", None, &server)?;
        self.keys.user("proxy", "system:kube-proxy", None, &server)?;
        self.keys.user("kubelet", &format!("system:node:{NODE}"), Some("system:nodes"), &server)?;
        self.keys.issue("kubelet-server", NODE, None, &[NODE, ADDRESS])?;

        let mut etcd = Command::new(self.programs.program("etcd"));
        etcd.args(["--data-dir", "/var/lib/etcd/data"])
            .args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD])
            .args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        self.node.start("etcd", &self.pace.ahead(self.pace.started(etcd)))?;
        let api = self.api_server_command();
        self.start_api_server(&api)
    }

    fn api_server_command(&self) -> Command {
        let key = |name: &str| self.keys.path(name).display().to_string();
        let mut api = Command::new(self.control_plane.program(API_SERVER));
        api.args([
            format!("--etcd-servers={ETCD}"),
            format!("--bind-address={ADDRESS}"),
            format!("--advertise-address={ADDRESS}"),
            "--secure-port=6443".to_owned(),
            "--insecure-port=0".to_owned(),
            format!("--tls-cert-file={}", key("server.crt")),
            format!("--tls-private-key-file={}", key("server.key")),
            format!("--client-ca-file={}", key("ca.crt")),
            format!("--kubelet-client-certificate={}", key("admin.crt")),
            format!("--kubelet-client-key={}", key("admin.key")),
            format!("--service-account-key-file={}", key("accounts.pub")),
            format!("--service-account-signing-key-file={}", key("accounts.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-cluster-ip-range={SERVICES}"),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--feature-gates=EphemeralContainers=true".to_owned(),
        ]);
        self.pace.ahead(self.pace.started(api))
    }

    /// What acts on what the API server holds.
    fn start_controllers(&mut self) -> Result<()> {
        let key = |name: &str| self.keys.path(name).display().to_string();
        let mut manager = Command::new(self.control_plane.program(CONTROLLER_MANAGER));
        manager.args([
            format!("--kubeconfig={}", key("controllers.kubeconfig")),
            format!("--service-account-private-key-file={}", key("accounts.key")),
            format!("--root-ca-file={}", key("ca.crt")),
            "--use-service-account-credentials".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            "--port=0".to_owned(),
            "--leader-elect=false".to_owned(),
            // A node that is slow to say how it is is none that is gone.
            format!("--node-monitor-grace-period={}s", self.pace.every("40", "600")),
        ]);
        let mut scheduler = Command::new(self.control_plane.program(SCHEDULER));
        scheduler.args([
            format!("--kubeconfig={}", key("scheduler.kubeconfig")),
            "--bind-address=127.0.0.1".to_owned(),
            "--port=0".to_owned(),
            "--leader-elect=false".to_owned(),
        ]);
        for (name, command) in [(CONTROLLER_MANAGER, manager), (SCHEDULER, scheduler)] {
            self.node.start(name, &started_again(&self.pace.started(command)))?;
        }
        Ok(())
    }

    fn proxy(&mut self) -> Result<()> {
        // Addresses of services are translated in the node's network namespace, whose limits on
        // connections are the kernel's to set.
        let config = self.node.scratch().join("kube-proxy.yaml");
        fs::write(
            &config,
            format!(
                "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n\
                 kind: KubeProxyConfiguration\n\
                 clientConnection: {{kubeconfig: \"{}\"}}\n\
                 mode: iptables\n\
                 clusterCIDR: {PODS}\n\
                 hostnameOverride: {NODE}\n\
                 bindAddress: {ADDRESS}\n\
                 healthzBindAddress: 127.0.0.1:10256\n\
                 metricsBindAddress: 127.0.0.1:10249\n\
                 oomScoreAdj: 0\n\
                 conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n",
                self.keys.path("proxy.kubeconfig").display(),
            ),
        )?;
        let mut proxy = Command::new(self.control_plane.program("kube-proxy"));
        proxy.arg("--config").arg(config);
        self.node.start("kube-proxy", &started_again(&self.pace.started(proxy)))
    }

    fn kubelet(&mut self) -> Result<()> {
        let key = |name: &str| self.keys.path(name).display().to_string();
        let config = self.node.scratch().join("kubelet.yaml");
        fs::write(
            &config,
            format!(
                "apiVersion: kubelet.config.k8s.io/v1beta1\n\
                 kind: KubeletConfiguration\n\
                 address: {ADDRESS}\n\
                 authentication:\n  \
                   anonymous: {{enabled: false}}\n  \
                   webhook: {{enabled: true}}\n  \
                   x509: {{clientCAFile: \"{ca}\"}}\n\
                 authorization: {{mode: Webhook}}\n\
                 tlsCertFile: \"{certificate}\"\n\
                 tlsPrivateKeyFile: \"{private}\"\n\
                 cgroupDriver: cgroupfs\n\
                 cgroupRoot: {cgroup}\n\
                 failSwapOn: false\n\
                 oomScoreAdj: 0\n\
                 maxPods: 250\n\
                 containerLogMaxSize: 1Gi\n\
                 nodeStatusUpdateFrequency: {every}s\n\
                 resolvConf: \"\"\n\
                 staticPodPath: /etc/kubernetes/manifests\n\
                 imageGCHighThresholdPercent: 100\n\
                 featureGates: {{EphemeralContainers: true}}\n\
                 evictionHard: {{nodefs.available: \"1%\", imagefs.available: \"1%\", \
                 memory.available: 50Mi, nodefs.inodesFree: \"1%\"}}\n",
                ca = key("ca.crt"),
                certificate = key("kubelet-server.crt"),
                private = key("kubelet-server.key"),
                cgroup = Node::cgroup(),
                every = self.pace.every("1", "10"),
            ),
        )?;
        let mut directory = Command::new("mkdir");
        directory.args(["-p", "/etc/kubernetes/manifests"]);
        output(&mut self.node.inside(&directory))?;
        let mut kubelet = Command::new(self.control_plane.program("kubelet"));
        kubelet.args([
            format!("--config={}", config.display()),
            format!("--kubeconfig={}", key("kubelet.kubeconfig")),
            format!("--hostname-override={NODE}"),
            format!("--node-ip={ADDRESS}"),
            "--container-runtime=remote".to_owned(),
            "--container-runtime-endpoint=unix:///run/containerd/containerd.sock".to_owned(),
            format!("--pod-infra-container-image={}", images::PAUSE),
            "--v=2".to_owned(),
        ]);
        self.node.start("kubelet", &self.pace.started(kubelet))?;
        let question = ["get", "node", NODE, "--output", READY_CONDITION];
        let mut ready = self.kubectl(&question);
        let took = self.node.wait("the node is ready", self.pace.patience(READY), |_| {
            Ok(output(&mut ready).is_ok_and(|said| said == "True"))
        })?;
        said("kubelet", took);
        // Who runs a pod without an account of its own.
        let begin = Instant::now();
        let mut account = self.kubectl(&["get", "serviceaccount", "default"]);
        self.node.wait("the default service account", self.pace.patience(READY), |_| {
            Ok(output(&mut account).is_ok())
        })?;
        said(CONTROLLER_MANAGER, begin.elapsed());
        Ok(())
    }

    /// Returns when `kubectl` with these arguments prints `expected`.
    pub(super) fn wait_for(
        &mut self,
        what: &str,
        arguments: &[&str],
        expected: &str,
    ) -> Result<Duration> {
        let mut asked = self.kubectl(arguments);
        let mut last = String::new();
        self.node
            .wait(what, self.pace.patience(READY), |_| {
                match output(&mut asked) {
                    Ok(said) => last = said.trim().to_owned(),
                    Err(error) => last = format!("{error:#}"),
                }
                Ok(last == expected)
            })
            .with_context(|| format!("{expected:?} was expected"))
    }
}

const READY_CONDITION: &str = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";

/// The same program, started again when it fails, as a service manager does: each of them gives up when
/// the API server lets it wait, on a busy machine. It ends by [`Node::kill`].
fn started_again(command: &Command) -> Command {
    let mut sh = Command::new("sh");
    sh.args(["-c", "until \"$@\"; do sleep 1; done", "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    copy_environment(command, &mut sh);
    sh
}

fn said(part: &str, took: Duration) {
    println!("ready     {part} ({:.1} s)", took.as_secs_f64());
}

/// The pods' network: a cable from each to the node, and no way beyond it.
fn network() -> String {
    format!(
        r#"{{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {{"type": "ptp", "ipMasq": false, "ipam": {{"type": "host-local", "dataDir": "/run/cni-addresses",
    "ranges": [[{{"subnet": "{PODS}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
]}}
"#
    )
}

/// The paths are containerd's defaults; limits of memory stay as this machine set them. The table of the
/// runtime that runs pods stands last.
fn runtime_config(networks: &Path, plugins: &Path) -> String {
    format!(
        r#"version = 2
oom_score = 0
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{networks}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"#,
        pause = images::PAUSE,
        plugins = plugins.display(),
        networks = networks.display(),
    )
}
