//! Pods whose cgroups a real systemd makes, in slices as kubelet names them, and their containers' as
//! scopes in these.

use std::ops::Range;

use super::*;

/// A runtime with the hook installed, and a daemon that it leads to.
fn under_systemd(template: &str) -> (Hook, Containerd, Guard) {
    let hook = Hook::new();
    let more = hook.configuration_with("SystemdCgroup = true");
    let containerd = Containerd::started_under_systemd(&more);
    hook.lead_to(&containerd);
    let guard = guard_with(&containerd, template);
    (hook, containerd, guard)
}

/// That a container is a scope in its pod's slice, as systemd has it.
#[track_caller]
fn is_a_scope_of(container: &Container<'_>, pod: &Pod<'_>) {
    let scope = format!("cri-containerd-{}.scope", container.id());
    assert_eq!(container.cgroup(), pod.cgroup().join(&scope));
    let slice = systemctl(&["show", "--value", "--property", "Slice", &scope]);
    assert!(pod.cgroup().ends_with(slice.trim()), "{slice}");
}

#[track_caller]
fn systemctl(arguments: &[&str]) -> String {
    let said = Command::new("systemctl").args(arguments).output().unwrap();
    assert!(said.status.success(), "{arguments:?}: {said:?}");
    String::from_utf8(said.stdout).unwrap()
}

/// The cgroup of a workload, as the daemon names it.
fn cgroup_of(workload: &Value) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(workload["cgroup"].as_str().unwrap().trim_start_matches('/'))
}

#[test]
fn pods_in_slices_are_found_and_held_before_their_first_instruction() {
    let (_hook, mut containerd, guard) = under_systemd(BY_LABEL);
    grant(&guard, "base", "researcher", BASE);
    let id = {
        let pod = agent(&containerd, "researcher-0", "researcher").run();
        let workload = is_held(&guard, "agents/researcher-0");
        assert_eq!(workload["identity"], identity("researcher"));
        assert_eq!(cgroup_of(&workload), pod.cgroup());
        assert!(workload["cgroup"].as_str().unwrap().starts_with("/kubepods.slice/"));
        let first = pod.container("agent").attempts(10, &asks()).start();
        assert_held(&first.report(), "a container that the hook told of");
        is_a_scope_of(&first, &pod);
        first.stop();
        first.remove();

        // Kubernetes in Docker has a slice around; here nothing but the pod's tag holds what starts.
        let nested = agent_of(&containerd, "nested", "researcher").below_kubelets_slice().run();
        let workload = is_held(&guard, "agents/nested");
        assert_eq!(cgroup_of(&workload), nested.cgroup());
        assert!(workload["cgroup"].as_str().unwrap().starts_with("/kubelet.slice/"));
        let container = nested.container("agent").attempts(10, &asks()).start();
        assert_held(&container.report(), "a container that no hook told of");
        is_a_scope_of(&container, &nested);

        let ordinary = containerd.pod("ordinary").label("app", "researcher").run();
        let container = ordinary.container("agent").attempts(3, &asks()).start();
        assert_free(&container.report(), "an ordinary pod");

        pod.container("agent").attempt(1).start().id().to_owned()
    };
    // What systemd is told to do with its units takes no tag and no hook away.
    systemctl(&["daemon-reload"]);
    let scope = format!("cri-containerd-{id}.scope");
    systemctl(&["set-property", "--runtime", &scope, "TasksMax=500", "MemoryHigh=500M"]);
    containerd.restart();
    let report = containerd.container(&id).exec_attempts(5, &asks());
    assert_held(&report, "after its scope was changed and the runtime was restarted");

    let layout = guard.json(&["doctor"])["checks"].to_string();
    assert!(layout.contains("cgroups of pods are made by systemd (kubepods.slice)"), "{layout}");
    containerd.remove_all();
    wait_until("the workloads are gone", || {
        guard.json(&["workloads"]).as_array().is_some_and(Vec::is_empty)
    });
}

/// A container, tried again as kubelet does where the hook refused it: a runtime that is emulated may take
/// longer to list its pods than the hook waits. What then starts is held from the first.
#[track_caller]
fn started_in_the_end<'a>(pod: &'a Pod<'a>, numbers: &mut Range<u32>) -> Container<'a> {
    for number in numbers {
        let container = pod.container("agent").attempt(number).attempts(10, &asks()).create();
        let Err(why) = container.try_start() else { return container };
        assert!(why.contains("the container runtime has spoken of the pod"), "{why}");
        tell!("refused, and tried again: {why}");
        container.remove();
    }
    panic!("it was refused each time");
}

#[test]
fn containers_in_scopes_are_held_one_by_one_before_their_first_instruction() {
    let (_hook, containerd, guard) = under_systemd(BY_CONTAINER);
    grant(&guard, "base", "alone/agent", BASE);
    let pod = agent(&containerd, "alone", "alone").run();
    let mut numbers = 0..10;
    for _ in 0..3 {
        let container = started_in_the_end(&pod, &mut numbers);
        assert_held(&container.report(), "a container that the hook told of");
        is_a_scope_of(&container, &pod);
        container.stop();
        container.remove();
    }
    let container = started_in_the_end(&pod, &mut numbers);
    let workload = is_held(&guard, "agents/alone/agent");
    assert_eq!(workload["identity"], identity("alone/agent"));
    assert_eq!(cgroup_of(&workload), container.cgroup());
}
