//! A runtime that speaks no other version of the API than the one before: v1alpha2.

use agentguard_tests::containerd::Release;

use super::*;

/// A runtime handler that is taken for one with a kernel of its own.
const SANDBOXED: &str = r#"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata.options]
    Root = "{directory}/runc"
"#;

fn runtime() -> Containerd {
    let containerd = Containerd::started_of(Release::OneFour, SANDBOXED);
    assert_eq!(containerd.api_versions(), [None, Some("v1alpha2".to_owned())]);
    containerd
}

#[test]
fn pods_of_it_are_known_and_held() {
    let containerd = runtime();
    let guard = guard(&containerd);
    grant(&guard, "base", "earlier", BASE);

    let pod = agent_of(&containerd, "earlier-0", "earlier").run();
    let workload = is_held(&guard, "agents/earlier-0");
    assert_eq!(workload["identity"], identity("earlier"));
    assert_eq!((&workload["source"], &workload["mode"]), (&json!("container"), &json!("enforce")));
    assert_eq!(workload["pod"]["uid"], pod.uid());
    let first = pod.container("agent").attempts(20, &asks()).start();
    assert_held(&first.report(), "the agent");
    may_run_its_own(&first);
    assert_ne!(first.exec([TOOL, "end"]).exit_code, 0, "a program that no scope grants");
    first.stop();
    first.remove();
    let second = pod.container("agent").attempt(1).attempts(10, &asks()).start();
    assert_held(&second.report(), "a container that was restarted");

    let of_node = agent_of(&containerd, "of-node", "earlier").host_network().run();
    is_held(&guard, "agents/of-node");
    let container = of_node.container("agent").attempts(5, &asks()).start();
    assert_held(&container.report(), "a pod in the node's network");

    let sandboxed = agent_of(&containerd, "sandboxed", "earlier").runtime_handler("kata");
    let _sandboxed = sandboxed.host_network().run();
    assert_eq!(is_held(&guard, "agents/sandboxed")["protection"], "none");

    let ordinary = containerd.pod("ordinary").label("app", "earlier").host_network().run();
    let container = ordinary.container("agent").attempts(5, &asks()).start();
    assert_free(&container.report(), "an ordinary pod");
    assert!(self::workload(&guard, "agents/ordinary").is_none());

    pod.remove();
    wait_until("the workload is gone", || self::workload(&guard, "agents/earlier-0").is_none());
}

#[test]
fn pods_of_it_stay_held_while_daemon_and_runtime_restart_and_end_with_their_cgroup() {
    stay_held(runtime(), "");
}

/// What speaks one version alone is replaced by what speaks another alone, and the daemon goes on.
#[test]
fn pods_of_it_stay_held_when_it_is_replaced_by_one_that_speaks_the_present_version_alone() {
    let mut containerd = runtime();
    let guard = guard(&containerd);
    grant(&guard, "base", "moved", BASE);
    let id = {
        let pod = agent_of(&containerd, "moved-0", "moved").run();
        is_held(&guard, "agents/moved-0");
        let container = pod.container("agent").start();
        may_run_its_own(&container);
        container.id().to_owned()
    };
    assert_held(&containerd.container(&id).exec_attempts(5, &asks()), "before");
    containerd.replace_by(Release::Two);
    assert_eq!(containerd.api_versions(), [Some("v1".to_owned()), None]);
    assert_held(&containerd.container(&id).exec_attempts(5, &asks()), "after");

    let pod = agent_of(&containerd, "moved-1", "moved").run();
    is_held(&guard, "agents/moved-1");
    let container = pod.container("agent").attempts(5, &asks()).start();
    assert_held(&container.report(), "a pod of the one that came");
    wait_until("nothing is wrong with the runtime", || {
        !gaps(&guard).iter().any(|gap| gap.contains("containerd.sock"))
    });
    let changes: Vec<_> = guard
        .audit_records()
        .into_iter()
        .filter(|record| {
            record["kind"] == "workload" && record["workload"]["name"] == "agents/moved-0"
        })
        .map(|record| record["change"].clone())
        .collect();
    assert_eq!(changes, ["added"], "it was one workload all the time");
    pod.remove();
    wait_until("the workload is gone", || workload(&guard, "agents/moved-1").is_none());
}

/// What it does not tell the hook, the hook can not tell the daemon. It runs no hook for a sandbox.
#[test]
fn the_hook_starts_nothing_of_it_and_says_why() {
    let hook = Hook::new();
    let containerd = Containerd::started_of(Release::OneFour, &hook.configuration());
    hook.lead_to(&containerd);
    let _guard = guard(&containerd);
    let pod = agent(&containerd, "untold", "earlier").host_network().run();
    let why = pod.container("agent").create().try_start().unwrap_err();
    assert!(why.contains("io.kubernetes.cri.sandbox-namespace"), "{why}");
    assert!(why.contains("update the container runtime"), "{why}");
}
