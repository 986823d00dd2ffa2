//! What happens to a denied request.

/// Per workload: whether a denial only leaves a record or is refused too.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Record, let through.
    Audit = 0,
    /// Record, refuse.
    Enforce = 1,
}

impl Mode {
    pub const ALL: [Self; 2] = [Self::Audit, Self::Enforce];

    /// The word used in manifests, records and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::Enforce => "enforce",
        }
    }
}

/// A code that names no [`Mode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownMode(pub u8);

impl TryFrom<u8> for Mode {
    type Error = UnknownMode;

    fn try_from(code: u8) -> Result<Self, UnknownMode> {
        Self::ALL.into_iter().find(|mode| *mode as u8 == code).ok_or(UnknownMode(code))
    }
}
