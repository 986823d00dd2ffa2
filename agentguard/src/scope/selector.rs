//! Label selectors as Kubernetes' NetworkPolicy has them.
//!
//! Pure. A selector always asks for something: there is no way to make one that selects everything
//! by being empty.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::name::text_type;

/// The longest name of a label, and the longest value, in bytes.
const MAX_LABEL_BYTES: usize = 63;

/// Labels of a pod or of a namespace.
pub type Labels = BTreeMap<String, String>;

/// Which pods or namespaces are meant: those of which every requirement holds. Never empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LabelSelector {
    /// `matchLabels`, each key once.
    pub labels: Vec<(LabelKey, LabelValue)>,
    /// `matchExpressions`.
    pub expressions: Vec<Requirement>,
}

/// One of `matchExpressions`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Requirement {
    /// The label is there and has one of the values, of which there is at least one.
    In(LabelKey, Vec<LabelValue>),
    /// The label is not there, or has none of the values.
    NotIn(LabelKey, Vec<LabelValue>),
    Exists(LabelKey),
    DoesNotExist(LabelKey),
}

/// The word of a [`Requirement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

/// The key of a label: a name, or a DNS subdomain, `/` and a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LabelKey(String);

text_type!(LabelKey);

/// The value of a label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LabelValue(String);

text_type!(LabelValue);

/// Why a text is no [`LabelKey`] or [`LabelValue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    #[error("is longer than {MAX_LABEL_BYTES} bytes, which no label is; write what the label says")]
    TooLong,
    #[error(
        "contains {0:?}; a label has only letters, digits, `-`, `_` and `.`, and begins and ends \
         with a letter or digit"
    )]
    Character(char),
    #[error("begins or ends with neither a letter nor a digit; write it as the label is written")]
    Edge,
    #[error("has an empty part; write a name, or a DNS name, `/` and a name")]
    Empty,
    #[error("has a prefix that is no DNS name; write one such as example.org/name")]
    Prefix,
}

impl Operator {
    pub const ALL: [Self; 4] = [Self::In, Self::NotIn, Self::Exists, Self::DoesNotExist];

    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::In => "In",
            Self::NotIn => "NotIn",
            Self::Exists => "Exists",
            Self::DoesNotExist => "DoesNotExist",
        }
    }
}

impl LabelSelector {
    /// Whether these are the labels of one that is meant.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        let has = |(key, value): &(LabelKey, LabelValue)| {
            labels.get(key.as_str()).is_some_and(|found| found == value.as_str())
        };
        self.labels.iter().all(has)
            && self.expressions.iter().all(|requirement| requirement.holds(labels))
    }
}

impl Requirement {
    fn holds(&self, labels: &Labels) -> bool {
        let is_one_of = |key: &LabelKey, values: &[LabelValue]| {
            labels
                .get(key.as_str())
                .is_some_and(|found| values.iter().any(|value| value.as_str() == found))
        };
        match self {
            Self::In(key, values) => is_one_of(key, values),
            Self::NotIn(key, values) => !is_one_of(key, values),
            Self::Exists(key) => labels.contains_key(key.as_str()),
            Self::DoesNotExist(key) => !labels.contains_key(key.as_str()),
        }
    }
}

/// As `kubectl --selector` takes it.
impl fmt::Display for LabelSelector {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels = self.labels.iter().map(|(key, value)| format!("{key}={value}"));
        let expressions = self.expressions.iter().map(ToString::to_string);
        formatter.write_str(&labels.chain(expressions).collect::<Vec<_>>().join(","))
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &[LabelValue]| {
            values.iter().map(LabelValue::as_str).collect::<Vec<_>>().join(",")
        };
        match self {
            Self::In(key, values) => write!(formatter, "{key} in ({})", list(values)),
            Self::NotIn(key, values) => write!(formatter, "{key} notin ({})", list(values)),
            Self::Exists(key) => write!(formatter, "{key}"),
            Self::DoesNotExist(key) => write!(formatter, "!{key}"),
        }
    }
}

impl FromStr for LabelKey {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let name = match text.split_once('/') {
            None => text,
            Some((prefix, name)) => {
                prefix
                    .parse::<crate::name::ResourceName>()
                    .map_err(|_not_a_name| LabelError::Prefix)?;
                name
            }
        };
        check_name(name)?;
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for LabelValue {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        check_name(text)?;
        Ok(Self(text.to_owned()))
    }
}

fn check_name(name: &str) -> Result<(), LabelError> {
    let edge = |c: char| c.is_ascii_alphanumeric();
    let inside = |c: char| edge(c) || matches!(c, '-' | '_' | '.');
    if name.is_empty() {
        return Err(LabelError::Empty);
    }
    if name.len() > MAX_LABEL_BYTES {
        return Err(LabelError::TooLong);
    }
    if let Some(stranger) = name.chars().find(|c| !inside(*c)) {
        return Err(LabelError::Character(stranger));
    }
    if name.starts_with(edge) && name.ends_with(edge) { Ok(()) } else { Err(LabelError::Edge) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_requirement_must_hold() {
        let key = |text: &str| text.parse::<LabelKey>().unwrap();
        let value = |text: &str| text.parse::<LabelValue>().unwrap();
        let selector = LabelSelector {
            labels: vec![(key("app"), value("db"))],
            expressions: vec![
                Requirement::In(key("tier"), vec![value("a"), value("b")]),
                Requirement::NotIn(key("zone"), vec![value("x")]),
                Requirement::Exists(key("example.org/owner")),
                Requirement::DoesNotExist(key("retired")),
            ],
        };
        let good = [("app", "db"), ("tier", "b"), ("example.org/owner", "")];
        assert!(selector.matches(&labels(&good)));
        for (at, changed) in [
            (0, ("app", "web")),
            (0, ("other", "db")),
            (1, ("tier", "c")),
            (1, ("zone", "x")),
            (2, ("owner", "")),
        ] {
            let mut wrong = good;
            wrong[at] = changed;
            assert!(!selector.matches(&labels(&wrong)), "{changed:?}");
        }
        for more in [("zone", "x"), ("retired", "no")] {
            let wrong: Vec<_> = good.into_iter().chain([more]).collect();
            assert!(!selector.matches(&labels(&wrong)), "{more:?}");
        }
        assert_eq!(
            selector.to_string(),
            "app=db,tier in (a,b),zone notin (x),example.org/owner,!retired"
        );
    }

    #[test]
    fn a_label_is_read_as_kubernetes_reads_it() {
        for text in ["app", "app.kubernetes.io/name", "A_b.c-d", "0"] {
            assert_eq!(text.parse::<LabelKey>().unwrap().as_str(), text);
        }
        let long = "a".repeat(64);
        for (text, reason) in [
            ("", LabelError::Empty),
            ("a/", LabelError::Empty),
            ("/a", LabelError::Prefix),
            ("A.org/a", LabelError::Prefix),
            ("a/b/c", LabelError::Character('/')),
            ("a b", LabelError::Character(' ')),
            ("-a", LabelError::Edge),
            ("a.", LabelError::Edge),
            (long.as_str(), LabelError::TooLong),
        ] {
            assert_eq!(text.parse::<LabelKey>(), Err(reason), "{text:?}");
        }
        assert_eq!("a/b".parse::<LabelValue>(), Err(LabelError::Character('/')));
    }
}
