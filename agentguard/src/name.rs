//! The name of a manifest, and what all types that are text with a grammar share.
//!
//! Every error of such a type reads `problem; remedy`. The value is added by whoever reports the
//! error, because only the reporter knows where it came from.

use std::str::FromStr;

/// The longest name, in bytes.
const MAX_BYTES: usize = 253;

/// Gives a one-field text type its reading side: `as_str`, `Display`, `Serialize`.
macro_rules! text_type {
    ($type:ty) => {
        impl $type {
            /// The text as it was written.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str(&self.0)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    };
}

pub(crate) use text_type;

/// `metadata.name`: an RFC 1123 subdomain, as Kubernetes asks for, unique per kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceName(String);

text_type!(ResourceName);

/// Why a text is no [`ResourceName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResourceNameError {
    #[error("is empty; write a name such as github-read")]
    Empty,
    #[error("is longer than {MAX_BYTES} bytes; write a shorter name")]
    TooLong,
    #[error("has upper-case letters; write {0}")]
    UpperCase(String),
    #[error("contains {0:?}; a name has only a-z, 0-9, `-` and `.`")]
    Character(char),
    #[error(
        "has a part that is empty or begins or ends with `-`; begin and end every part between \
         dots with a letter or digit"
    )]
    Edge,
}

impl FromStr for ResourceName {
    type Err = ResourceNameError;

    fn from_str(text: &str) -> Result<Self, ResourceNameError> {
        if text.is_empty() {
            return Err(ResourceNameError::Empty);
        }
        if text.len() > MAX_BYTES {
            return Err(ResourceNameError::TooLong);
        }
        let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '.');
        if let Some(stranger) = text.chars().find(|c| !allowed(c.to_ascii_lowercase())) {
            return Err(ResourceNameError::Character(stranger));
        }
        if text.contains(|c: char| c.is_ascii_uppercase()) {
            return Err(ResourceNameError::UpperCase(text.to_ascii_lowercase()));
        }
        let edged = |part: &str| part.is_empty() || part.starts_with('-') || part.ends_with('-');
        if text.split('.').any(edged) {
            return Err(ResourceNameError::Edge);
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subdomain_is_a_name() {
        for text in ["a", "github-read", "a.b-c.d", "0"] {
            assert_eq!(text.parse::<ResourceName>().unwrap().as_str(), text);
        }
    }

    #[test]
    fn anything_else_is_refused_with_its_reason() {
        let long = "a".repeat(254);
        let cases = [
            ("", ResourceNameError::Empty),
            (long.as_str(), ResourceNameError::TooLong),
            ("Git", ResourceNameError::UpperCase("git".to_owned())),
            ("a_b", ResourceNameError::Character('_')),
            ("a b", ResourceNameError::Character(' ')),
            ("ä", ResourceNameError::Character('ä')),
            ("-a", ResourceNameError::Edge),
            ("a-", ResourceNameError::Edge),
            ("a..b", ResourceNameError::Edge),
            ("a.", ResourceNameError::Edge),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<ResourceName>(), Err(reason), "{text:?}");
        }
    }
}
