//! Absolute paths in which `*` stands for any text within one name.
//!
//! Knows nothing of files or cgroups: it compares text with text. Only `*` is special; every other
//! character stands for itself.

use std::{fmt, str::FromStr};

/// The longest path the kernel resolves, in bytes, without its final NUL.
const MAX_PATH_BYTES: usize = 4095;
/// The longest name of one file, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// A normalised absolute path whose names may hold `*`. No names at all is the root, `/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathPattern {
    names: Vec<String>,
}

/// Why a text is no [`PathPattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathPatternError {
    #[error("is not an absolute path; begin it with `/`")]
    Relative,
    #[error("has an empty name; write every `/` once and none at the end")]
    EmptyName,
    #[error("has the name `{0}` in it; write the path without `.` and `..`")]
    DotName(String),
    #[error("has `**` where one name is expected; write `*` to match within one name")]
    DoubleStar,
    #[error("has a control character (U+{:04X}); remove it", *.0 as u32)]
    Control(char),
    #[error("is longer than {MAX_PATH_BYTES} bytes; write a shorter path")]
    TooLong,
    #[error("has a name of more than {MAX_NAME_BYTES} bytes; write a shorter name")]
    NameTooLong,
}

impl PathPattern {
    /// The names from the root down, each a literal or a pattern with `*`.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Whether this is `/` itself.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether no name holds a `*`, so that exactly one path matches.
    #[must_use]
    pub fn is_literal(&self) -> bool {
        !self.names.iter().any(|name| name.contains('*'))
    }

    /// Whether `path`, absolute and normalised, is one of the paths meant.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        path_names(path).is_some_and(|names| {
            names.len() == self.names.len() && self.matches_beginning_of(&names)
        })
    }

    /// Whether `path`, absolute and normalised, lies below one of the directories meant.
    #[must_use]
    pub fn matches_above(&self, path: &str) -> bool {
        path_names(path).is_some_and(|names| {
            names.len() > self.names.len() && self.matches_beginning_of(&names)
        })
    }

    fn matches_beginning_of(&self, names: &[&str]) -> bool {
        self.names.iter().zip(names).all(|(pattern, name)| name_matches(pattern, name))
    }
}

impl FromStr for PathPattern {
    type Err = PathPatternError;

    fn from_str(text: &str) -> Result<Self, PathPatternError> {
        let Some(below_root) = text.strip_prefix('/') else {
            return Err(PathPatternError::Relative);
        };
        if text.len() > MAX_PATH_BYTES {
            return Err(PathPatternError::TooLong);
        }
        if let Some(control) = text.chars().find(|c| c.is_control()) {
            return Err(PathPatternError::Control(control));
        }
        if below_root.is_empty() {
            return Ok(Self { names: Vec::new() });
        }
        let names = below_root.split('/').map(checked_name).collect::<Result<_, _>>()?;
        Ok(Self { names })
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.names.is_empty() {
            return formatter.write_str("/");
        }
        self.names.iter().try_for_each(|name| write!(formatter, "/{name}"))
    }
}

/// Whether `name` is one of those that `pattern` means. `*` stands for any text, also none.
///
/// Takes time proportional to the product of the lengths at worst.
#[must_use]
pub fn name_matches(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(mut left) = name.strip_prefix(head) else {
        return false;
    };
    let (middle, tail) = rest.rsplit_once('*').unwrap_or(("", rest));
    for piece in middle.split('*') {
        // The leftmost place is always as good as a later one: it leaves the most text over.
        match left.find(piece) {
            Some(place) => left = &left[place + piece.len()..],
            None => return false,
        }
    }
    left.ends_with(tail)
}

fn checked_name(name: &str) -> Result<String, PathPatternError> {
    match name {
        "" => Err(PathPatternError::EmptyName),
        "." | ".." => Err(PathPatternError::DotName(name.to_owned())),
        name if name.contains("**") => Err(PathPatternError::DoubleStar),
        name if name.len() > MAX_NAME_BYTES => Err(PathPatternError::NameTooLong),
        name => Ok(name.to_owned()),
    }
}

/// The names of a normalised absolute path; nothing when it is not one.
fn path_names(path: &str) -> Option<Vec<&str>> {
    let below_root = path.strip_prefix('/')?;
    if below_root.is_empty() {
        return Some(Vec::new());
    }
    let names: Vec<&str> = below_root.split('/').collect();
    let normal = names.iter().all(|name| !matches!(*name, "" | "." | ".."));
    normal.then_some(names)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition: `*` takes nothing, or one character and goes on.
    fn specification(pattern: &[char], name: &[char]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some(('*', rest)), None) => specification(rest, name),
            (Some(('*', rest)), Some((_, left))) => {
                specification(rest, name) || specification(pattern, left)
            }
            (Some((p, rest)), Some((n, left))) => p == n && specification(rest, left),
            (None, Some(_)) | (Some(_), None) => false,
        }
    }

    proptest! {
        #[test]
        fn name_matching_agrees_with_its_definition(
            pattern in "[ab*é]{0,7}",
            name in "[abé]{0,9}",
        ) {
            let characters = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(
                name_matches(&pattern, &name),
                specification(&characters(&pattern), &characters(&name))
            );
        }
    }

    #[test]
    fn a_star_stays_within_one_name() {
        let pattern: PathPattern = "/agents.slice/researcher-*.service".parse().unwrap();
        assert!(pattern.matches("/agents.slice/researcher-1.service"));
        assert!(pattern.matches("/agents.slice/researcher-.service"));
        assert!(!pattern.matches("/agents.slice/researcher-1/x.service"));
        assert!(!pattern.matches("/agents.slice/researcher-1.service/child"));
        assert!(!pattern.matches("/agents.slice/../researcher-1.service"));
        assert!(!pattern.matches("agents.slice/researcher-1.service"));
    }

    #[test]
    fn the_root_is_above_everything_but_itself() {
        let root: PathPattern = "/".parse().unwrap();
        assert!(root.is_root());
        assert!(root.matches("/"));
        assert!(root.matches_above("/bin/sh"));
        assert!(!root.matches_above("/"));
        assert!(!root.matches_above("/bin/../sh"));
    }

    #[test]
    fn a_path_that_is_not_absolute_and_normal_is_refused() {
        let cases = [
            ("bin/sh", PathPatternError::Relative),
            ("", PathPatternError::Relative),
            ("/bin//sh", PathPatternError::EmptyName),
            ("/bin/", PathPatternError::EmptyName),
            ("/bin/../sh", PathPatternError::DotName("..".to_owned())),
            ("/./sh", PathPatternError::DotName(".".to_owned())),
            ("/a/**/b", PathPatternError::DoubleStar),
            ("/a/b**", PathPatternError::DoubleStar),
            ("/a\u{7}", PathPatternError::Control('\u{7}')),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<PathPattern>(), Err(reason), "{text:?}");
        }
        let long = format!("/{}", "a/".repeat(3000));
        assert_eq!(long.parse::<PathPattern>(), Err(PathPatternError::TooLong));
        let name = format!("/{}", "a".repeat(256));
        assert_eq!(name.parse::<PathPattern>(), Err(PathPatternError::NameTooLong));
    }
}
