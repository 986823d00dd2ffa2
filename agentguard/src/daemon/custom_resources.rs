//! Scopes and grants as custom resources: a grant source like the manifest directory.
//!
//! Each object is read by the reader of files, so that both say the same and err the same. What a
//! namespaced grant may name is decided here, before what it says counts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;

use super::last_good::{Files, Said};
use super::manifests::GrantSource;
use crate::identity::template::IdentityTemplate;
use crate::kubernetes::manifests::{Object, ObjectKind, Objects};
use crate::manifest::{Creation, Manifest, ManifestError, confine, parse_text};

/// The objects of the cluster, as manifests.
pub struct CustomResources {
    objects: Arc<Objects>,
    template: IdentityTemplate,
    trust_domain: String,
}

impl CustomResources {
    /// `template` says which identities are a namespace's.
    #[must_use]
    pub const fn new(
        objects: Arc<Objects>,
        template: IdentityTemplate,
        trust_domain: String,
    ) -> Self {
        Self { objects, template, trust_domain }
    }

    /// The objects, for whoever waits for a change.
    #[must_use]
    pub fn objects(&self) -> Arc<Objects> {
        Arc::clone(&self.objects)
    }

    fn say(&self, name: &str, object: &Object) -> Result<Said, Vec<ManifestError>> {
        let Object { text, created, namespace } = object;
        let (manifests, mut errors) = parse_text(name, text, Creation::At(*created));
        errors.extend(self.strays(&manifests, namespace.as_deref()));
        if errors.is_empty() {
            return Ok(Said::new(text, manifests, Timestamp::now()).created(*created));
        }
        // The lines are those of no text that anybody has seen.
        errors.iter_mut().for_each(|error| error.position = None);
        Err(errors)
    }
}

impl CustomResources {
    /// What namespaced grants name beyond their namespace.
    fn strays(&self, manifests: &[Manifest], namespace: Option<&str>) -> Vec<ManifestError> {
        let Some(namespace) = namespace else { return Vec::new() };
        let own = self.template.of_namespace(&self.trust_domain, namespace);
        let strays = manifests.iter().filter_map(|manifest| match manifest {
            Manifest::Grant(grant) => {
                confine(grant, namespace, self.template.as_str(), own.as_ref())
            }
            Manifest::Scope(_) | Manifest::Workload(_) => None,
        });
        strays.collect()
    }
}

impl GrantSource for CustomResources {
    fn owns(&self, name: &Path) -> bool {
        name.to_str().and_then(ObjectKind::of_path).is_some()
    }

    fn read(&self, last: &Files) -> (Files, Vec<ManifestError>) {
        let mut errors = Vec::new();
        let Some(known) = self.objects.take() else {
            // Before the first answer nothing is known to be gone.
            return (last.clone(), errors);
        };
        let mut now = Files::new();
        for (name, object) in known {
            let path = PathBuf::from(&name);
            // What it said under another template or trust domain is no reason to go on saying it.
            let earlier = last.get(&path).filter(|said| {
                self.strays(&said.manifests, object.namespace.as_deref()).is_empty()
            });
            // Most have not changed, and are not read again.
            if let Some(same) =
                earlier.filter(|said| said.is_of(&object.text, Some(object.created)))
            {
                now.insert(path, same.clone());
                continue;
            }
            match self.say(&name, &object) {
                Ok(said) => {
                    now.insert(path, said);
                }
                Err(wrong) => {
                    errors.extend(wrong);
                    if let Some(earlier) = earlier {
                        now.insert(path, earlier.clone());
                    }
                }
            }
        }
        (now, errors)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::grant::Expiry;
    use crate::kubernetes::manifests::Watched;
    use crate::kubernetes::watch::{LeftOut, Seen};
    use crate::scope::cluster::ObjectName;

    const SCOPE: &str = r#"{"apiVersion": "agentguard.dev/v1alpha1", "kind": "Scope",
        "metadata": {"name": "git"}, "spec": {"scope": "git:read", "description": "d",
        "listen": [{"protocol": "TCP", "port": 1}]}}"#;

    fn grant(kind: &str, name: &str, namespace: Option<&str>, subject: &str) -> String {
        let namespace = namespace
            .map_or_else(String::new, |namespace| format!(r#", "namespace": "{namespace}""#));
        format!(
            r#"{{"apiVersion": "agentguard.dev/v1alpha1", "kind": "{kind}",
            "metadata": {{"name": "{name}"{namespace}}}, "spec": {{"subject": {{{subject}}},
            "scopes": ["git:read"], "ttl": "1h", "grantedBy": "me", "reason": "r"}}}}"#
        )
    }

    fn object(text: &str, namespace: Option<&str>) -> Object {
        Object {
            text: text.as_bytes().into(),
            created: "2026-11-22T09:00:00Z".parse().unwrap(),
            namespace: namespace.map(str::to_owned),
        }
    }

    fn source(template: &str) -> CustomResources {
        let objects = Arc::new(Objects::default());
        CustomResources::new(objects, template.parse().unwrap(), "example.org".to_owned())
    }

    fn of(kind: ObjectKind) -> Watched {
        match kind {
            ObjectKind::Scope => Watched::Scopes,
            ObjectKind::ClusterGrant => Watched::ClusterGrants,
            ObjectKind::Grant => Watched::Grants("agents".to_owned()),
        }
    }

    fn list(source: &CustomResources, kind: ObjectKind, objects: &[(&str, &str, Object)]) {
        let all = objects
            .iter()
            .map(|(namespace, name, object)| (ObjectName::new(namespace, name), object.clone()));
        source.objects.concern(&BTreeSet::from(["agents".to_owned()]));
        source.objects.see(&of(kind), Seen::Whole(all.collect(), LeftOut::default()));
    }

    fn exact(id: &str) -> String {
        format!(r#""spiffeId": "spiffe://example.org/{id}""#)
    }

    #[test]
    fn objects_are_read_as_files_are_once_all_kinds_are_known() {
        let source = source(IdentityTemplate::DEFAULT);
        list(&source, ObjectKind::Scope, &[("", "git", object(SCOPE, None))]);
        let own = grant("Grant", "g", Some("agents"), &exact("ns/agents/sa/a"));
        list(&source, ObjectKind::Grant, &[("agents", "g", object(&own, Some("agents")))]);
        let before: Files = BTreeMap::from([(
            PathBuf::from("grant/gone/x"),
            Said::new(b"", Vec::new(), Timestamp::UNIX_EPOCH),
        )]);
        assert_eq!(source.read(&before), (before.clone(), Vec::new()));
        list(&source, ObjectKind::ClusterGrant, &[]);
        let (now, errors) = source.read(&before);
        assert_eq!(errors, []);
        let names: Vec<&Path> = now.keys().map(PathBuf::as_path).collect();
        assert_eq!(names, [Path::new("grant/agents/g"), Path::new("scope/git")]);
        let Manifest::Grant(grant) = &now[Path::new("grant/agents/g")].manifests[0] else {
            panic!("{now:?}");
        };
        assert_eq!(grant.document.id.as_str(), "agents/g");
        let end = "2026-11-22T10:00:00Z".parse().unwrap();
        assert_eq!(grant.document.expiry, Expiry::At(end));
        assert!(now.keys().all(|name| source.owns(name)));
        assert!(!source.owns(Path::new("/etc/agentguard/manifests/scope/a.yaml")));
    }

    #[test]
    fn a_grant_may_name_subjects_of_its_own_namespace_only() {
        let told = |template: &str, subject: &str| {
            let source = source(template);
            list(&source, ObjectKind::Scope, &[]);
            list(&source, ObjectKind::ClusterGrant, &[]);
            let text = grant("Grant", "g", Some("agents"), subject);
            list(&source, ObjectKind::Grant, &[("agents", "g", object(&text, Some("agents")))]);
            let (now, errors) = source.read(&Files::new());
            assert_eq!(now.len(), 1 - errors.len());
            errors.first().map(ToString::to_string)
        };
        let prefix = |path: &str| format!(r#""spiffeIdPrefix": "spiffe://example.org/{path}""#);
        let usual = IdentityTemplate::DEFAULT;
        for subject in [
            exact("ns/agents/sa/a"),
            prefix("ns/agents/"),
            prefix("ns/agents/sa/"),
            exact("ns/agents/x"),
        ] {
            assert_eq!(told(usual, &subject), None, "{subject}");
        }
        for subject in [
            exact("ns/other/sa/a"),
            exact("ns/agents2/sa/a"),
            exact("ns/agents"),
            prefix("ns/"),
            prefix("ns/agents2/"),
            r#""spiffeId": "spiffe://example.com/ns/agents/sa/a""#.to_owned(),
        ] {
            let told = told(usual, &subject).unwrap_or_default();
            assert!(told.starts_with("grant/agents/g: spec.subject.spiffeId"), "{subject}: {told}");
            assert!(told.contains("spiffe://example.org/ns/agents/"), "{told}");
        }
        // Where namespaces are not apart, only the cluster's own grants can be.
        let flat = "spiffe://{trust_domain}/sa/{service_account}/{namespace}";
        let told = told(flat, &exact("sa/a/agents")).unwrap_or_default();
        assert!(told.contains("ClusterGrant") && told.contains(flat), "{told}");
    }

    #[test]
    fn an_object_with_an_error_goes_on_saying_what_it_said() {
        let source = source(IdentityTemplate::DEFAULT);
        list(&source, ObjectKind::Scope, &[("", "git", object(SCOPE, None))]);
        list(&source, ObjectKind::Grant, &[]);
        let any = grant("ClusterGrant", "c", None, &exact("ns/other/sa/a"));
        list(&source, ObjectKind::ClusterGrant, &[("", "c", object(&any, None))]);
        let (first, errors) = source.read(&Files::new());
        assert_eq!((first.len(), errors.len()), (2, 0));
        let wrong = SCOPE.replace("\"port\": 1", "\"port\": 0");
        let put = Seen::Put(ObjectName::new("", "git"), object(&wrong, None));
        source.objects.see(&Watched::Scopes, put);
        let (second, errors) = source.read(&first);
        assert_eq!(second, first);
        let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 1);
        assert!(told[0].starts_with("scope/git: spec.listen[0].port: "), "{told:?}");
        // One that is deleted says nothing any more.
        source.objects.see(&Watched::Scopes, Seen::Gone(ObjectName::new("", "git")));
        let (third, errors) = source.read(&second);
        assert_eq!((third.len(), errors.len()), (1, 0));
    }

    #[test]
    fn what_a_grant_said_under_another_template_is_not_gone_on_with() {
        let text = grant("Grant", "g", Some("agents"), &exact("ns/agents/sa/a"));
        let read = |template: &str, last: &Files| {
            let source = source(template);
            list(&source, ObjectKind::Scope, &[]);
            list(&source, ObjectKind::ClusterGrant, &[]);
            list(&source, ObjectKind::Grant, &[("agents", "g", object(&text, Some("agents")))]);
            source.read(last)
        };
        let (before, errors) = read(IdentityTemplate::DEFAULT, &Files::new());
        assert_eq!((before.len(), errors.len()), (1, 0));
        let (after, errors) = read("spiffe://{trust_domain}/team/{namespace}/{pod}", &before);
        assert_eq!((after.len(), errors.len()), (0, 1));
    }

    #[test]
    fn one_made_anew_counts_its_ttl_anew() {
        let source = source(IdentityTemplate::DEFAULT);
        list(&source, ObjectKind::Scope, &[]);
        list(&source, ObjectKind::Grant, &[]);
        let text = grant("ClusterGrant", "c", None, &exact("a/b"));
        list(&source, ObjectKind::ClusterGrant, &[("", "c", object(&text, None))]);
        let (first, _) = source.read(&Files::new());
        let mut later = object(&text, None);
        later.created = "2026-11-23T09:00:00Z".parse().unwrap();
        let put = Seen::Put(ObjectName::new("", "c"), later);
        source.objects.see(&Watched::ClusterGrants, put);
        let (second, _) = source.read(&first);
        assert_ne!(second, first);
    }
}
