//! The template that makes SPIFFE IDs of what is known of a pod or a container.
//!
//! Pure text. What is filled in comes from whoever may write pods, so it never adds a path segment
//! and never removes one: a value that is no single segment makes no identity.

use std::fmt;
use std::str::FromStr;

use super::spiffe::{SpiffeId, SpiffeIdError, SpiffePrefix};

/// What a template's variables stand for. What is not known is `None`.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    pub trust_domain: &'a str,
    pub namespace: Option<&'a str>,
    pub service_account: Option<&'a str>,
    pub pod: Option<&'a str>,
    pub container: Option<&'a str>,
    /// Labels of the pod, or of the container where there is no pod.
    pub labels: &'a dyn Labels,
}

/// Labels by their keys.
pub trait Labels: fmt::Debug {
    fn label(&self, key: &str) -> Option<&str>;
}

impl Labels for std::collections::BTreeMap<String, String> {
    fn label(&self, key: &str) -> Option<&str> {
        self.get(key).map(String::as_str)
    }
}

/// How workload identities are made: `spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityTemplate {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(Variable),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Variable {
    TrustDomain,
    Namespace,
    ServiceAccount,
    Pod,
    Container,
    Label(String),
}

/// Why a text is no [`IdentityTemplate`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("begins otherwise than spiffe://{{trust_domain}}/; begin it so")]
    Beginning,
    #[error("has a `{{` without its `}}`; close it")]
    Open,
    #[error("has a `}}` without its `{{`; remove it")]
    Close,
    #[error(
        "has the variable {{{0}}}; use trust_domain, namespace, service_account, pod, container or label:KEY"
    )]
    Unknown(String),
    #[error("has no variable after the trust domain, so that all agents would be one; add one")]
    Constant,
    #[error("makes no SPIFFE ID: it {0}")]
    Grammar(#[from] SpiffeIdError),
}

/// Why a template makes no identity of these values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    #[error("its {0} is not known yet")]
    NotKnown(String),
    #[error("its {variable} {value:?} can be no part of a SPIFFE ID: it {error}")]
    Value { variable: String, value: String, error: SpiffeIdError },
    #[error("the identity {text:?} is none: it {error}")]
    Identity { text: String, error: SpiffeIdError },
}

impl fmt::Display for Variable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TrustDomain => formatter.write_str("trust domain"),
            Self::Namespace => formatter.write_str("namespace"),
            Self::ServiceAccount => formatter.write_str("service account"),
            Self::Pod => formatter.write_str("pod"),
            Self::Container => formatter.write_str("container"),
            Self::Label(key) => write!(formatter, "label {key}"),
        }
    }
}

impl Variable {
    fn parse(name: &str) -> Result<Self, TemplateError> {
        Ok(match name {
            "trust_domain" => Self::TrustDomain,
            "namespace" => Self::Namespace,
            "service_account" => Self::ServiceAccount,
            "pod" => Self::Pod,
            "container" => Self::Container,
            _ => match name.strip_prefix("label:").filter(|key| !key.is_empty()) {
                Some(key) => Self::Label(key.to_owned()),
                None => return Err(TemplateError::Unknown(name.to_owned())),
            },
        })
    }

    fn value<'a>(&self, values: &Values<'a>) -> Option<&'a str> {
        match self {
            Self::TrustDomain => Some(values.trust_domain),
            Self::Namespace => values.namespace,
            Self::ServiceAccount => values.service_account,
            Self::Pod => values.pod,
            Self::Container => values.container,
            Self::Label(key) => values.labels.label(key),
        }
        .filter(|value| !value.is_empty())
    }
}

impl IdentityTemplate {
    /// The template where none is configured.
    pub const DEFAULT: &'static str = "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}";

    /// The template as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether two containers of one pod can have two identities.
    #[must_use]
    pub fn tells_containers_apart(&self) -> bool {
        self.parts.contains(&Part::Variable(Variable::Container))
    }

    /// Whether an identity is a service account's.
    #[must_use]
    pub fn names_service_account(&self) -> bool {
        self.parts.contains(&Part::Variable(Variable::ServiceAccount))
    }

    /// Whether an identity is one pod's or container's alone, so that it is gone for good with it.
    #[must_use]
    pub fn is_of_one_pod(&self) -> bool {
        self.parts.contains(&Part::Variable(Variable::Pod)) || self.tells_containers_apart()
    }

    /// The identity of what `values` describe.
    ///
    /// # Errors
    ///
    /// When something is not known, or can be no part of a SPIFFE ID.
    pub fn render(&self, values: &Values<'_>) -> Result<SpiffeId, RenderError> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(words) => text.push_str(words),
                Part::Variable(variable) => {
                    let value = variable
                        .value(values)
                        .ok_or_else(|| RenderError::NotKnown(variable.to_string()))?;
                    if *variable != Variable::TrustDomain {
                        is_one_segment(value).map_err(|error| RenderError::Value {
                            variable: variable.to_string(),
                            value: value.to_owned(),
                            error,
                        })?;
                    }
                    text.push_str(value);
                }
            }
        }
        text.parse().map_err(|error| RenderError::Identity { text, error })
    }

    /// What all identities of a namespace begin with, and no identity of another; `None` where the
    /// template does not keep namespaces apart by their place in the path.
    #[must_use]
    pub fn of_namespace(&self, trust_domain: &str, namespace: &str) -> Option<SpiffePrefix> {
        is_one_segment(namespace).ok()?;
        let mut text = String::new();
        let mut rest = self.parts.iter();
        for part in rest.by_ref() {
            match part {
                Part::Text(words) => text.push_str(words),
                Part::Variable(Variable::TrustDomain) => text.push_str(trust_domain),
                Part::Variable(Variable::Namespace) => {
                    // Only a segment of its own tells `a` from `ab`.
                    let begins = text.ends_with('/');
                    let ends =
                        matches!(rest.next(), Some(Part::Text(after)) if after.starts_with('/'));
                    if !begins || !ends {
                        return None;
                    }
                    return format!("{text}{namespace}/").parse().ok();
                }
                Part::Variable(_) => return None,
            }
        }
        None
    }
}

/// Whether a value can stand in a path without being more than a part of one segment.
fn is_one_segment(value: &str) -> Result<(), SpiffeIdError> {
    if value.contains('/') {
        return Err(SpiffeIdError::PathCharacter('/'));
    }
    format!("spiffe://t/{value}").parse::<SpiffeId>().map(drop)
}

impl FromStr for IdentityTemplate {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        if !text.starts_with("spiffe://{trust_domain}/") {
            return Err(TemplateError::Beginning);
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let Some((before, after)) = rest.split_once('{') else {
                parts.push(Part::Text(rest.to_owned()));
                break;
            };
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            let (name, after) = after.split_once('}').ok_or(TemplateError::Open)?;
            if name.contains('{') {
                return Err(TemplateError::Open);
            }
            parts.push(Part::Variable(Variable::parse(name)?));
            rest = after;
        }
        let is_stray = |part: &Part| matches!(part, Part::Text(words) if words.contains('}'));
        if parts.iter().any(is_stray) {
            return Err(TemplateError::Close);
        }
        let varies = |part: &Part| matches!(part, Part::Variable(variable) if *variable != Variable::TrustDomain);
        if !parts.iter().any(varies) {
            return Err(TemplateError::Constant);
        }
        let template = Self { text: text.to_owned(), parts };
        let labels = Anything;
        let example = Values {
            trust_domain: "t",
            namespace: Some("n"),
            service_account: Some("s"),
            pod: Some("p"),
            container: Some("c"),
            labels: &labels,
        };
        match template.render(&example) {
            Ok(_) => Ok(template),
            Err(RenderError::Identity { error, .. } | RenderError::Value { error, .. }) => {
                Err(error.into())
            }
            Err(RenderError::NotKnown(what)) => Err(TemplateError::Unknown(what)),
        }
    }
}

/// Every label there is.
#[derive(Debug)]
struct Anything;

impl Labels for Anything {
    fn label(&self, _key: &str) -> Option<&str> {
        Some("l")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn values(labels: &BTreeMap<String, String>) -> Values<'_> {
        Values {
            trust_domain: "example.org",
            namespace: Some("agents"),
            service_account: Some("researcher"),
            pod: Some("researcher-0"),
            container: Some("main"),
            labels,
        }
    }

    #[test]
    fn an_identity_is_made_of_what_is_known() {
        let labels = BTreeMap::from([("app.kubernetes.io/name".to_owned(), "r".to_owned())]);
        for (template, identity) in [
            (IdentityTemplate::DEFAULT, "spiffe://example.org/ns/agents/sa/researcher"),
            ("spiffe://{trust_domain}/{pod}.{container}", "spiffe://example.org/researcher-0.main"),
            (
                "spiffe://{trust_domain}/a/{label:app.kubernetes.io/name}",
                "spiffe://example.org/a/r",
            ),
        ] {
            let template: IdentityTemplate = template.parse().unwrap();
            assert_eq!(template.render(&values(&labels)).unwrap().as_str(), identity);
        }
    }

    #[test]
    fn what_is_not_known_makes_no_identity() {
        let labels = BTreeMap::new();
        let template: IdentityTemplate = IdentityTemplate::DEFAULT.parse().unwrap();
        let unknown = Values { service_account: None, ..values(&labels) };
        assert_eq!(
            template.render(&unknown),
            Err(RenderError::NotKnown("service account".to_owned()))
        );
        let empty = Values { service_account: Some(""), ..values(&labels) };
        assert!(template.render(&empty).is_err());
    }

    #[test]
    fn no_value_reaches_out_of_its_segment() {
        let template: IdentityTemplate =
            "spiffe://{trust_domain}/ns/{namespace}/x/{label:who}".parse().unwrap();
        for value in ["a/b", "..", ".", "a b", "a%2fb", "a?b", "a#b", "ä", "/"] {
            let labels = BTreeMap::from([("who".to_owned(), value.to_owned())]);
            assert!(template.render(&values(&labels)).is_err(), "{value:?}");
        }
    }

    #[test]
    fn a_template_that_makes_none_is_refused() {
        for (text, error) in [
            ("spiffe://example.org/{pod}", TemplateError::Beginning),
            ("spiffe://{trust_domain}/{pod", TemplateError::Open),
            ("spiffe://{trust_domain}/{po{d}", TemplateError::Open),
            ("spiffe://{trust_domain}/pod}", TemplateError::Close),
            ("spiffe://{trust_domain}/agent", TemplateError::Constant),
            ("spiffe://{trust_domain}/{uid}", TemplateError::Unknown("uid".to_owned())),
            ("spiffe://{trust_domain}/{label:}", TemplateError::Unknown("label:".to_owned())),
            (
                "spiffe://{trust_domain}/{pod}/",
                TemplateError::Grammar(SpiffeIdError::TrailingSlash),
            ),
        ] {
            assert_eq!(text.parse::<IdentityTemplate>(), Err(error), "{text:?}");
        }
    }

    #[test]
    fn a_namespace_is_a_prefix_only_where_it_is_a_segment() {
        let of = |template: &str| {
            let template: IdentityTemplate = template.parse().unwrap();
            template.of_namespace("example.org", "a").map(|prefix| prefix.to_string())
        };
        assert_eq!(of(IdentityTemplate::DEFAULT).as_deref(), Some("spiffe://example.org/ns/a/"));
        assert_eq!(of("spiffe://{trust_domain}/ns-{namespace}/sa/{service_account}"), None);
        assert_eq!(of("spiffe://{trust_domain}/{namespace}-{pod}"), None);
        assert_eq!(of("spiffe://{trust_domain}/sa/{service_account}/ns/{namespace}"), None);
        assert_eq!(of("spiffe://{trust_domain}/{pod}"), None);
    }
}
