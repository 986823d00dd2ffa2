//! What is known of pods: what the cluster says of them, and which of them are agents.
//!
//! Plain values and pure functions. Who asks the API server or a container runtime is elsewhere.

use std::collections::BTreeMap;

use agentguard_common::Mode;

/// Labels, by their keys.
pub type Labels = BTreeMap<String, String>;

/// The label that marks an agent, on a pod, on its namespace, or on a container without a pod.
pub const AGENT: &str = "agentguard.dev/agent";
/// The label that says what happens to the denied requests of an agent.
pub const MODE: &str = "agentguard.dev/mode";

/// The number that Kubernetes gives a pod, never used again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(String);

impl PodUid {
    /// `None` for what can be no part of a cgroup's name: such a pod is not known by it.
    #[must_use]
    pub fn new(uid: &str) -> Option<Self> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        (!uid.is_empty() && uid.len() <= 128 && uid.bytes().all(known))
            .then(|| Self(uid.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub uid: PodUid,
    pub namespace: String,
    pub name: String,
    /// `None` where only the runtime speaks of the pod, which does not know it.
    pub service_account: Option<String>,
    pub labels: Labels,
    /// Whether it is in the node's own network namespace.
    pub host_network: bool,
    /// The runtime class it asks for.
    pub runtime_class: Option<String>,
}

/// Which pods and containers are agents, and how each is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marking {
    /// Labels that make an agent of whoever has all of one set of them, beside [`AGENT`].
    pub selectors: Vec<Labels>,
    /// Namespaces in which nothing is an agent, whatever its labels say: those that a node needs to
    /// start the daemon.
    pub exempt: Vec<String>,
    /// The mode where no label says one.
    pub mode: Mode,
}

/// What the labels say of a pod or a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Marked {
    No,
    /// The mode, and what is wrong with the labels that say it.
    Agent {
        mode: Mode,
        problem: Option<String>,
    },
}

impl Marking {
    /// Whether a pod with `labels`, in `namespace` with `namespace_labels`, is an agent.
    #[must_use]
    pub fn judge(
        &self,
        namespace: Option<&str>,
        labels: &Labels,
        namespace_labels: Option<&Labels>,
    ) -> Marked {
        if namespace.is_some_and(|namespace| self.exempt.iter().any(|name| name == namespace)) {
            return Marked::No;
        }
        let none = Labels::new();
        let of_namespace = namespace_labels.unwrap_or(&none);
        // The pod's own word goes before its namespace's, both ways. One that is neither `true` nor
        // `false` was meant to mark an agent.
        let word = labels.get(AGENT).or_else(|| of_namespace.get(AGENT));
        let selected = self
            .selectors
            .iter()
            .any(|wanted| wanted.iter().all(|(key, value)| labels.get(key) == Some(value)));
        let is_agent = selected || word.is_some_and(|word| word != "false");
        if !is_agent {
            return Marked::No;
        }
        let mut problems = Vec::new();
        if let Some(word) = word.filter(|word| *word != "true" && *word != "false") {
            problems.push(format!("the label {AGENT} is {word:?}, taken for \"true\""));
        }
        let said = labels.get(MODE).or_else(|| of_namespace.get(MODE));
        let mode = match said.map(String::as_str) {
            None => self.mode,
            Some("enforce") => Mode::Enforce,
            Some("audit") => Mode::Audit,
            // A slip of the pen lets nothing through.
            Some(word) => {
                problems.push(format!(
                    "the label {MODE} is {word:?} and is taken for \"enforce\"; write enforce or audit"
                ));
                Mode::Enforce
            }
        };
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        Marked::Agent { mode, problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn marking() -> Marking {
        Marking {
            selectors: vec![labels(&[("app", "agent"), ("tier", "ai")])],
            exempt: vec!["kube-system".to_owned()],
            mode: Mode::Audit,
        }
    }

    fn agent(mode: Mode) -> Marked {
        Marked::Agent { mode, problem: None }
    }

    #[test]
    fn a_label_of_the_pod_or_of_its_namespace_marks_an_agent() {
        let marking = marking();
        let judge = |pod: &[(&str, &str)], namespace: &[(&str, &str)]| {
            marking.judge(Some("agents"), &labels(pod), Some(&labels(namespace)))
        };
        assert_eq!(judge(&[], &[]), Marked::No);
        assert_eq!(judge(&[(AGENT, "true")], &[]), agent(Mode::Audit));
        assert_eq!(judge(&[], &[(AGENT, "true")]), agent(Mode::Audit));
        assert_eq!(judge(&[(AGENT, "false")], &[(AGENT, "true")]), Marked::No);
        assert_eq!(judge(&[("app", "agent")], &[]), Marked::No);
        assert_eq!(judge(&[("app", "agent"), ("tier", "ai")], &[]), agent(Mode::Audit));
    }

    #[test]
    fn the_pods_mode_goes_before_the_namespaces_and_the_default_comes_last() {
        let marking = marking();
        let judge = |pod: &[(&str, &str)], namespace: &[(&str, &str)]| {
            let mut pod = labels(pod);
            pod.insert(AGENT.to_owned(), "true".to_owned());
            marking.judge(Some("agents"), &pod, Some(&labels(namespace)))
        };
        assert_eq!(judge(&[(MODE, "enforce")], &[(MODE, "audit")]), agent(Mode::Enforce));
        assert_eq!(judge(&[(MODE, "audit")], &[(MODE, "enforce")]), agent(Mode::Audit));
        assert_eq!(judge(&[], &[(MODE, "enforce")]), agent(Mode::Enforce));
        assert_eq!(judge(&[], &[]), agent(Mode::Audit));
        assert!(matches!(
            judge(&[(MODE, "Enforced")], &[]),
            Marked::Agent { mode: Mode::Enforce, problem: Some(_) }
        ));
    }

    #[test]
    fn what_a_node_needs_is_never_an_agent() {
        let pod = labels(&[(AGENT, "true"), ("app", "agent"), ("tier", "ai")]);
        assert_eq!(marking().judge(Some("kube-system"), &pod, None), Marked::No);
    }
}
