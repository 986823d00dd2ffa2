//! Checks documents against each other: names that collide, scopes that do not exist.

use std::collections::{BTreeMap, btree_map::Entry};

use super::{Located, Manifest, ManifestError, Origin, reader};
use crate::{
    grant::GrantDocument,
    identity::{Subject, WorkloadDocument, spiffe::SpiffePrefix},
    scope::{Catalogue, ScopeName},
};

/// How many near matches an error lists.
const SHOWN_MATCHES: usize = 3;

/// Documents that are valid together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ManifestSet {
    pub scopes: Catalogue,
    pub grants: Vec<GrantDocument>,
    pub workloads: Vec<WorkloadDocument>,
}

/// Puts documents together, in their order.
///
/// Of documents that collide the first is kept, and a grant with an unknown scope is left out;
/// each comes with an error, and whoever applies a set decides whether errors hold it back.
#[must_use]
pub fn assemble(manifests: Vec<Manifest>) -> (ManifestSet, Vec<ManifestError>) {
    let mut errors = Vec::new();
    let mut kept = Vec::new();
    let mut names: BTreeMap<_, Origin> = BTreeMap::new();
    for manifest in manifests {
        match names.entry((manifest.kind(), manifest.name().to_owned())) {
            Entry::Vacant(place) => {
                place.insert(manifest.origin().clone());
                kept.push(manifest);
            }
            Entry::Occupied(first) => errors.push(name_taken(&manifest, first.get())),
        }
    }

    let mut set = ManifestSet::default();
    let mut grants = Vec::new();
    let mut definitions: BTreeMap<ScopeName, Origin> = BTreeMap::new();
    for manifest in kept {
        match manifest {
            Manifest::Scope(scope) => {
                let name = scope.document.scope.clone();
                if let Some(first) = definitions.get(&name) {
                    errors.push(scope_taken(&scope, &name, first));
                } else if set.scopes.insert(scope.document).is_ok() {
                    definitions.insert(name, scope.origin);
                }
            }
            Manifest::Grant(grant) => grants.push(grant),
            Manifest::Workload(workload) => set.workloads.push(workload.document),
        }
    }

    for grant in grants {
        let unknown = unknown_scopes(&grant, &set.scopes);
        if unknown.is_empty() {
            set.grants.push(grant.document);
        }
        errors.extend(unknown);
    }
    (set, errors)
}

/// What is wrong with the subject of a grant that `namespace` owns: `own` is what all of its
/// identities begin with, by `template`.
#[must_use]
pub fn confine(
    grant: &Located<GrantDocument>,
    namespace: &str,
    template: &str,
    own: Option<&SpiffePrefix>,
) -> Option<ManifestError> {
    let (field, value, is_own) = match &grant.document.subject {
        Subject::Exact(id) => {
            ("spec.subject.spiffeId", id.as_str(), own.is_some_and(|own| own.matches(id)))
        }
        Subject::Prefix(prefix) => {
            let is_own = own.is_some_and(|own| prefix.as_str().starts_with(own.as_str()));
            ("spec.subject.spiffeIdPrefix", prefix.as_str(), is_own)
        }
    };
    if is_own {
        return None;
    }
    let (message, remedy) = match own {
        Some(own) => (
            format!("is no subject of the namespace {namespace}"),
            format!("name one that begins with {own}, or write a ClusterGrant"),
        ),
        None => (
            format!(
                "can be no subject of the namespace {namespace}, since the identity template \
                 {template} does not keep namespaces apart"
            ),
            "write a ClusterGrant, or have the template begin with {namespace} as a segment"
                .to_owned(),
        ),
    };
    Some(grant.error(field, Some(value), message, remedy))
}

fn name_taken(manifest: &Manifest, first: &Origin) -> ManifestError {
    let kind = manifest.kind().as_str();
    let message = format!("is the name of another {kind} too, at {}", place_of(first));
    let remedy = "give each a name of its own".to_owned();
    let (field, name) = ("metadata.name", Some(manifest.name()));
    match manifest {
        Manifest::Scope(scope) => scope.error(field, name, message, remedy),
        Manifest::Grant(grant) => grant.error(field, name, message, remedy),
        Manifest::Workload(workload) => workload.error(field, name, message, remedy),
    }
}

fn scope_taken<D>(scope: &Located<D>, name: &ScopeName, first: &Origin) -> ManifestError {
    let message = format!("is defined at {} already", place_of(first));
    let remedy = "give each scope a name of its own, or merge the two".to_owned();
    scope.error("spec.scope", Some(name.as_str()), message, remedy)
}

fn unknown_scopes(grant: &Located<GrantDocument>, scopes: &Catalogue) -> Vec<ManifestError> {
    let unknown = |(_, scope): &(usize, &ScopeName)| scopes.get(scope).is_none();
    let error = |(index, scope): (usize, &ScopeName)| {
        let known = scopes.iter().map(|known| known.scope.as_str());
        let near = reader::near(scope.as_str(), known);
        let remedy = match near.as_slice() {
            [] => "define it in a Scope, or remove it".to_owned(),
            near => {
                let shown = &near[..near.len().min(SHOWN_MATCHES)];
                format!("did you mean {}?", reader::list_of(shown, "or"))
            }
        };
        let message = "is a scope that no Scope defines".to_owned();
        grant.error(&format!("spec.scopes[{index}]"), Some(scope.as_str()), message, remedy)
    };
    grant.document.scopes.iter().enumerate().filter(unknown).map(error).collect()
}

fn place_of(origin: &Origin) -> String {
    format!("{}:{}:{}", origin.file, origin.position.line, origin.position.column)
}
