//! Manifests: the one edge at which text becomes scopes, grants and workloads.
//!
//! One shape everywhere: files, Kubernetes custom resources, API bodies (JSON is YAML). Reading
//! never stops at the first error; a document with any error is left out as a whole. Nothing here
//! touches the datapath, and only [`parse_paths`] and [`check`] touch the file system.
//!
//! The stages: `tree` turns bytes into nodes, `reader` nodes into values, the file of each kind
//! values into a document, `set` checks documents against each other.

mod error;
mod grant;
mod reader;
pub mod schema;
mod scope;
mod set;
mod source;
#[cfg(test)]
mod tests;
mod tree;
mod warning;
pub mod wire;
mod workload;

use std::cell::RefCell;

use jiff::Timestamp;

pub use error::{ManifestError, ManifestWarning, Position};
use reader::{Places, Problems, Value};
pub use set::{ManifestSet, assemble, confine};
pub use source::{CheckReport, Counts, check, files, parse_paths, read};
pub use tree::{MAX_DEPTH, MAX_DOCUMENT_BYTES, MAX_FILE_BYTES};
pub use warning::warnings;

use crate::{
    grant::GrantDocument, identity::WorkloadDocument, name::ResourceName, scope::ScopeDocument,
};

/// The version of the manifests this code reads.
pub const API_VERSION: &str = "agentguard.dev/v1alpha1";

/// Whether it is known when the grants in a text were created, which a `ttl` counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creation {
    /// As in a file: a `ttl` is an error.
    Unknown,
    /// As in a custom resource, an API call or a command.
    At(Timestamp),
}

/// The kinds of manifests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Scope,
    Grant,
    /// A grant that no namespace owns; the same as a [`Self::Grant`] wherever there are none.
    ClusterGrant,
    Workload,
}

/// One valid document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manifest {
    Scope(Located<ScopeDocument>),
    Grant(Located<GrantDocument>),
    Workload(Located<WorkloadDocument>),
}

/// A document and where it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<D> {
    pub document: D,
    pub origin: Origin,
    places: Places,
}

/// Where a document begins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    pub file: String,
    pub position: Position,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Scope, Self::Grant, Self::ClusterGrant, Self::Workload];

    /// The word in `kind`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scope => "Scope",
            Self::Grant => "Grant",
            Self::ClusterGrant => "ClusterGrant",
            Self::Workload => "Workload",
        }
    }
}

impl Manifest {
    /// Which kind of manifest this is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Scope(_) => Kind::Scope,
            Self::Grant(_) => Kind::Grant,
            Self::Workload(_) => Kind::Workload,
        }
    }

    /// `metadata.name`.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Scope(scope) => scope.document.name.as_str(),
            Self::Grant(grant) => grant.document.id.as_str(),
            Self::Workload(workload) => workload.document.name.as_str(),
        }
    }

    /// Where the document begins.
    #[must_use]
    pub const fn origin(&self) -> &Origin {
        match self {
            Self::Scope(scope) => &scope.origin,
            Self::Grant(grant) => &grant.origin,
            Self::Workload(workload) => &workload.origin,
        }
    }

    /// The document as a manifest again.
    #[must_use]
    pub fn to_manifest_json(&self) -> serde_json::Value {
        match self {
            Self::Scope(scope) => scope.document.to_manifest_json(),
            Self::Grant(grant) => grant.document.to_manifest_json(),
            Self::Workload(workload) => workload.document.to_manifest_json(),
        }
    }
}

impl<D> Located<D> {
    /// An error about a field of this document that was valid by itself.
    fn error(
        &self,
        field: &str,
        value: Option<&str>,
        message: String,
        remedy: String,
    ) -> ManifestError {
        ManifestError {
            file: self.origin.file.clone(),
            position: Some(self.position_of(field)),
            field: Some(field.to_owned()),
            value: value.map(error::shortened),
            message,
            remedy,
        }
    }

    fn position_of(&self, field: &str) -> Position {
        self.places.get(field).copied().unwrap_or(self.origin.position)
    }
}

/// Reads every document of `bytes`; `file` says in errors where they came from.
///
/// The errors are in the order of the text. A document with an error is not among the manifests.
#[must_use]
pub fn parse_text(
    file: &str,
    bytes: &[u8],
    creation: Creation,
) -> (Vec<Manifest>, Vec<ManifestError>) {
    let problems = Problems::new(file);
    let mut manifests = Vec::new();
    for document in tree::documents(bytes, &problems) {
        let places = RefCell::default();
        let before = problems.count();
        let body = read_document(&Value::document(&document.root, &problems, &places), creation);
        let is_sound = document.is_sound && problems.count() == before;
        if let Some(body) = body.filter(|_| is_sound) {
            let origin = Origin { file: file.to_owned(), position: document.root.position };
            manifests.push(body.located(origin, places.into_inner()));
        }
    }
    (manifests, problems.into_errors())
}

/// A document of one of the kinds, before it is said where it stood.
enum Body {
    Scope(ScopeDocument),
    Grant(GrantDocument),
    Workload(WorkloadDocument),
}

impl Body {
    fn located(self, origin: Origin, places: Places) -> Manifest {
        match self {
            Self::Scope(document) => Manifest::Scope(Located { document, origin, places }),
            Self::Grant(document) => Manifest::Grant(Located { document, origin, places }),
            Self::Workload(document) => Manifest::Workload(Located { document, origin, places }),
        }
    }
}

fn read_document(document: &Value<'_>, creation: Creation) -> Option<Body> {
    let [version, kind, metadata, spec] =
        document.fields(["apiVersion", "kind", "metadata", "spec"])?;
    version.required(|value| {
        let text = value.text()?;
        if text != API_VERSION {
            value.refuse("is not a version this agentguard reads", format!("write {API_VERSION}"));
        }
        Some(())
    });
    let kind = kind.required(|value| value.one_of(&Kind::ALL, Kind::as_str));
    let metadata = metadata.required(|value| {
        let [name, namespace] = value.fields(["name", "namespace"])?;
        let name = name.required(|name| {
            name.note();
            name.parse()
        });
        let namespace = namespace.optional(|value| read_namespace(value, kind));
        Some((name?, namespace?))
    });
    let (name, namespace) = metadata.unzip();
    spec.required(|spec| match kind? {
        Kind::Scope => scope::read(name, spec).map(Body::Scope),
        Kind::Grant | Kind::ClusterGrant => {
            grant::read(name, namespace.flatten(), spec, creation).map(Body::Grant)
        }
        Kind::Workload => workload::read(name, spec).map(Body::Workload),
    })
}

/// Only a grant can be one of a namespace.
fn read_namespace(value: &Value<'_>, kind: Option<Kind>) -> Option<ResourceName> {
    match kind {
        None => None,
        Some(Kind::Grant) => scope::read_label_name(value),
        Some(kind @ (Kind::Scope | Kind::ClusterGrant | Kind::Workload)) => {
            let message = format!("is a namespace, which a {} does not have", kind.as_str());
            value.refuse(message, "remove it");
            None
        }
    }
}
