//! A runtime that waits for the daemon by itself: no container is configured for it.

use agentguard_tests::containerd::Release;

use super::*;

/// A runtime, and a daemon that is its plugin.
fn waiting(release: Release, template: &str) -> (Containerd, Guard) {
    let containerd = Containerd::started_with_nri(release);
    let guard = plugin(&containerd, template, &json!({}));
    waits(&guard);
    (containerd, guard)
}

/// A daemon that is to be the runtime's plugin.
fn plugin(containerd: &Containerd, template: &str, more: &Value) -> Guard {
    let mut configuration = configuration(containerd, template);
    configuration["containers"]["nri"] = json!(containerd.nri());
    for (key, value) in more.as_object().into_iter().flatten() {
        configuration[key] = value.clone();
    }
    Guard::start_with(containerd.world(), &[], &configuration)
}

/// Waits until the starts of containers wait for the daemon.
#[track_caller]
fn waits(guard: &Guard) {
    wait_until("the runtime waits for the daemon", || state(guard) == "wait");
    let status = guard.status();
    let runtime = status["totals"]["starts"]["runtime"].as_str().unwrap_or_default();
    assert!(runtime.starts_with("containerd "), "{status}");
}

fn state(guard: &Guard) -> String {
    guard.status()["totals"]["starts"]["state"].as_str().unwrap_or_default().to_owned()
}

fn each_is_held_before_its_first_instruction(release: Release) {
    let (containerd, guard) = waiting(release, BY_CONTAINER);
    grant(&guard, "base", "told/agent", BASE);
    let pod = agent_of(&containerd, "told", "told").run();
    let plain = containerd.pod("plain").run();
    for number in 0..10 {
        let plan = pod.container("agent").attempt(number).attempts(10, &asks());
        assert_held(&plan.start().report(), "a container that the runtime told of");
    }
    // It is the container's own tag: nothing tags its pod.
    let workload = is_held(&guard, "agents/told/agent");
    assert_eq!(workload["identity"], identity("told/agent"));
    assert!(workload["cgroup"].as_str().unwrap().contains(pod.uid()), "{workload}");
    let container = plain.container("agent").attempts(2, &asks()).start();
    assert_free(&container.report(), "no agent, told of all the same");
}

#[test]
fn each_is_held_before_its_first_instruction_by_version_1() {
    each_is_held_before_its_first_instruction(Release::One);
}

#[test]
fn each_is_held_before_its_first_instruction_by_version_2() {
    each_is_held_before_its_first_instruction(Release::Two);
}

/// Of a pod whose sandbox was just made, nobody but the runtime itself has told.
fn a_pod_is_held_when_its_sandbox_runs(release: Release) {
    let (containerd, guard) = waiting(release, BY_LABEL);
    grant(&guard, "base", "quick", BASE);
    for number in 0..10 {
        let name = format!("quick-{number}");
        let pod = agent_of(&containerd, &name, "quick").host_network().run();
        let known = workload(&guard, &format!("agents/{name}"));
        assert_eq!(known.expect("it is held")["identity"], identity("quick"));
        let container = pod.container("agent").attempts(5, &asks()).start();
        assert_held(&container.report(), &name);
    }
}

#[test]
fn a_pod_is_held_when_version_1_runs_its_sandbox() {
    a_pod_is_held_when_its_sandbox_runs(Release::One);
}

#[test]
fn a_pod_is_held_when_version_2_runs_its_sandbox() {
    a_pod_is_held_when_its_sandbox_runs(Release::Two);
}

fn nothing_of_a_storm_is_undecided(release: Release) {
    let (containerd, guard) = waiting(release, BY_CONTAINER);
    for number in 0..10 {
        grant(&guard, &format!("g-{number}"), &format!("storm/c-{number}"), BASE);
    }
    let pods: Vec<Pod<'_>> = in_parallel(20, |number| {
        agent_of(&containerd, &format!("p-{number}"), "storm").host_network().run()
    });
    storm(&guard, &pods, 10, is_as_granted);
    assert_eq!(state(&guard), "wait");
}

#[test]
fn nothing_of_a_storm_of_starts_is_undecided_with_version_1() {
    nothing_of_a_storm_is_undecided(Release::One);
}

#[test]
fn nothing_of_a_storm_of_starts_is_undecided_with_version_2() {
    nothing_of_a_storm_is_undecided(Release::Two);
}

#[test]
fn a_container_of_which_it_is_not_known_whose_it_is_does_not_start() {
    let containerd = Containerd::started_with_nri(Release::Two);
    let kubeconfig = containerd.world().directory().join("kubeconfig");
    // A cluster that was never heard: the labels of its namespaces may make an agent of any pod.
    let nowhere = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {}}],
    });
    fs::write(&kubeconfig, nowhere.to_string()).unwrap();
    let guard = plugin(&containerd, BY_LABEL, &json!({"kubernetes": {"access": kubeconfig}}));
    waits(&guard);
    let pod = agent_of(&containerd, "stray", "stray").run();
    let begin = Instant::now();
    let refused = pod.container("agent").attempts(1, &asks()).create();
    let why = refused.try_start().unwrap_err();
    tell!("refused after {} ms: {why}", begin.elapsed().as_millis());
    assert!(why.contains("container agent of pod agents/stray is not held by agentguard"), "{why}");
    assert!(!refused.is_running());
    assert!(!refused.log().contains("tcp"), "it ran: {}", refused.log());
    // It was answered, not given up on: the next is asked about too.
    assert!(pod.container("agent").attempt(1).create().try_start().is_err());
    assert_eq!(state(&guard), "wait");
    // What the node needs waits for nobody.
    let system = containerd.pod("dns").namespace("kube-system").run();
    let container = system.container("agent").attempts(2, &asks()).start();
    assert_free(&container.report(), "a pod that the node needs");
}

#[test]
fn the_runtime_waits_again_after_a_restart_of_either() {
    let (mut containerd, mut guard) = waiting(Release::Two, BY_CONTAINER);
    grant(&guard, "base", "steady/agent", BASE);
    grant(&guard, "late", "steady/late", BASE);
    let start = |containerd: &Containerd, name: &str, when: &str| {
        let pod = agent_of(containerd, name, "steady").run();
        let container = pod.container("agent").attempts(10, &asks()).start();
        assert_held(&container.report(), when);
        pod.id().to_owned()
    };
    start(&containerd, "one", "at first");
    containerd.stop();
    wait_until("it is told that the runtime waits no more", || state(&guard) == "lost");
    let nri = containerd.nri().display().to_string();
    assert!(gaps(&guard).iter().any(|gap| gap.contains(&nri)), "{:?}", gaps(&guard));
    containerd.start();
    waits(&guard);
    assert!(!gaps(&guard).iter().any(|gap| gap.contains(&nri)), "{:?}", gaps(&guard));
    start(&containerd, "two", "after the runtime's restart");

    // Without a daemon nothing waits, and what starts is held once there is one.
    guard.kill();
    let pod = agent_of(&containerd, "three", "steady").run();
    let let_through = pod.container("late").start();
    guard.restart();
    waits(&guard);
    start(&containerd, "four", "after the daemon's restart");
    is_held(&guard, "agents/three/late");
    let report = let_through.exec_attempts(5, &asks());
    assert_held(&report, "what was started without a daemon");
}

#[test]
fn a_daemon_that_hangs_holds_no_pod_up_for_long() {
    let (containerd, guard) = waiting(Release::Two, BY_LABEL);
    grant(&guard, "base", "patient", BASE);
    let pod = agent_of(&containerd, "patient", "patient").run();
    is_held(&guard, "agents/patient");
    guard.pause();
    let begin = Instant::now();
    let container = pod.container("agent").attempts(10, &asks()).start();
    let waited = begin.elapsed();
    tell!("a start waited {} ms for a daemon that hangs", waited.as_millis());
    assert!(waited < Duration::from_secs(15), "{waited:?}");
    // The runtime gives up on it: its pod's tag holds it.
    let begin = Instant::now();
    let second = pod.container("second").start();
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    for tally in &container.report().tallies {
        if !matches!(&tally.ask, Ask::Exec(_)) && tally.ask != Ask::Tcp(API_PORT) {
            assert_eq!(tally.refused(), tally.attempts(), "{tally:?}");
        }
    }
    guard.resume();
    waits(&guard);
    assert!(second.is_running());
    let third = pod.container("third").attempts(10, &asks()).start();
    assert_held(&third.report(), "once the daemon runs on");
}
