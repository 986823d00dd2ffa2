//! What a `Workload` manifest says: which processes act as which identity.
//!
//! Knows nothing of YAML; [`crate::manifest`] builds these values.

use std::{fmt, str::FromStr};

use agentguard_common::Mode;

use super::spiffe::SpiffeId;
use crate::{
    name::{ResourceName, text_type},
    pattern::{PathPattern, PathPatternError},
};

/// The longest unit name, in bytes.
const MAX_UNIT_BYTES: usize = 255;
/// The unit types that own a cgroup.
const UNIT_SUFFIXES: [&str; 3] = [".service", ".scope", ".slice"];

/// A workload that is declared rather than discovered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadDocument {
    pub name: ResourceName,
    pub selector: Selector,
    pub spiffe_id: SpiffeId,
    pub mode: Mode,
}

/// Which cgroups are the workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// Every cgroup whose path matches.
    Cgroup(CgroupPattern),
    /// The cgroup of one systemd unit.
    SystemdUnit(SystemdUnit),
}

/// A path below the cgroup v2 root, `*` standing for text within one name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupPattern(PathPattern);

/// The name of a unit that owns a cgroup, such as `researcher.service`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemdUnit(String);

text_type!(SystemdUnit);

/// Why a text is no [`CgroupPattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CgroupPatternError {
    #[error("is the root cgroup, which is the whole host; name a cgroup below it")]
    Root,
    #[error(transparent)]
    Path(#[from] PathPatternError),
}

/// Why a text is no [`SystemdUnit`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SystemdUnitError {
    #[error("is longer than {MAX_UNIT_BYTES} bytes; write a shorter unit name")]
    TooLong,
    #[error("has a wildcard; name one unit, or select by cgroup")]
    Wildcard,
    #[error(
        "contains {0:?}; a unit name has only letters, digits and `:`, `-`, `_`, `.`, `\\`, `@`"
    )]
    Character(char),
    #[error("has no cgroup of its own; name a unit that ends with .service, .scope or .slice")]
    Suffix,
    #[error("is a template; name one of its instances, such as {0}")]
    Template(String),
    #[error("is the root slice, which is the whole host; name a unit below it")]
    Root,
}

impl CgroupPattern {
    /// Whether the cgroup at `path`, absolute below the cgroup v2 root, is meant.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        self.0.matches(path)
    }

    /// The names from the cgroup root down, for a walk of the hierarchy.
    #[must_use]
    pub fn pattern(&self) -> &PathPattern {
        &self.0
    }
}

impl FromStr for CgroupPattern {
    type Err = CgroupPatternError;

    fn from_str(text: &str) -> Result<Self, CgroupPatternError> {
        let pattern: PathPattern = text.parse()?;
        if pattern.is_root() {
            return Err(CgroupPatternError::Root);
        }
        Ok(Self(pattern))
    }
}

impl fmt::Display for CgroupPattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl FromStr for SystemdUnit {
    type Err = SystemdUnitError;

    fn from_str(text: &str) -> Result<Self, SystemdUnitError> {
        if text.len() > MAX_UNIT_BYTES {
            return Err(SystemdUnitError::TooLong);
        }
        if text.contains('*') {
            return Err(SystemdUnitError::Wildcard);
        }
        let allowed =
            |c: &char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | '\\' | '@');
        if let Some(stranger) = text.chars().find(|c| !allowed(c)) {
            return Err(SystemdUnitError::Character(stranger));
        }
        let parts = UNIT_SUFFIXES.iter().find_map(|suffix| {
            let stem = text.strip_suffix(suffix)?;
            (!stem.is_empty()).then_some((stem, suffix))
        });
        match parts {
            None => Err(SystemdUnitError::Suffix),
            Some(("-", &".slice")) => Err(SystemdUnitError::Root),
            Some((stem, suffix)) if stem.ends_with('@') => {
                Err(SystemdUnitError::Template(format!("{stem}1{suffix}")))
            }
            Some(_) => Ok(Self(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_pattern_matches_paths_below_the_cgroup_root() {
        let pattern: CgroupPattern = "/agents.slice/researcher-*.service".parse().unwrap();
        assert!(pattern.matches("/agents.slice/researcher-1.service"));
        assert!(!pattern.matches("/agents.slice/researcher-1.service/worker"));
        assert!(!pattern.matches("/agents.slice"));
        assert_eq!(pattern.to_string(), "/agents.slice/researcher-*.service");
    }

    #[test]
    fn the_root_cgroup_is_no_workload() {
        assert_eq!("/".parse::<CgroupPattern>(), Err(CgroupPatternError::Root));
    }

    #[test]
    fn a_unit_that_owns_a_cgroup_is_accepted() {
        for text in
            ["a.service", "user@1000.service", "agents.slice", "run-u1.scope", "a\\x2d.service"]
        {
            assert_eq!(text.parse::<SystemdUnit>().unwrap().as_str(), text);
        }
    }

    #[test]
    fn any_other_unit_is_refused_with_its_reason() {
        let long = format!("{}.service", "a".repeat(250));
        let cases = [
            (long.as_str(), SystemdUnitError::TooLong),
            ("a*.service", SystemdUnitError::Wildcard),
            ("a/b.service", SystemdUnitError::Character('/')),
            ("a.timer", SystemdUnitError::Suffix),
            (".service", SystemdUnitError::Suffix),
            ("", SystemdUnitError::Suffix),
            ("a@.service", SystemdUnitError::Template("a@1.service".to_owned())),
            ("-.slice", SystemdUnitError::Root),
        ];
        for (text, reason) in cases {
            assert_eq!(text.parse::<SystemdUnit>(), Err(reason), "{text:?}");
        }
    }
}
