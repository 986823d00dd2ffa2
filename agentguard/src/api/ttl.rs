//! How long something lasts, as people write it: `90m`, `8h`, `1d 12h`.

use std::time::Duration;

use jiff::{Span, SpanRelativeTo};

/// The longest that can be asked for; what is to last longer names its end or is `never`.
pub const LONGEST: Duration = Duration::from_hours(24 * 366);

/// Why a text is not a time to live.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TtlError {
    #[error("{0:?} is not a length of time; write it as 90m, 8h or 2d")]
    Unreadable(String),
    #[error("{0:?} is not longer than nothing; write it as 90m, 8h or 2d")]
    NotPositive(String),
    #[error("{0:?} is longer than 366 days; name the end with --until, or say --never")]
    TooLong(String),
}

/// Reads a time to live. Days have 24 hours; months and years, which have no fixed length, are not
/// understood.
///
/// # Errors
/// If it is no length of time, not positive or above [`LONGEST`].
pub fn parse_ttl(text: &str) -> Result<Duration, TtlError> {
    let unreadable = || TtlError::Unreadable(text.to_owned());
    let span: Span = text.parse().map_err(|_| unreadable())?;
    let signed = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| unreadable())?;
    if !signed.is_positive() {
        return Err(TtlError::NotPositive(text.to_owned()));
    }
    let ttl = signed.unsigned_abs();
    if ttl > LONGEST { Err(TtlError::TooLong(text.to_owned())) } else { Ok(ttl) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_s_spellings_are_understood() {
        for (text, seconds) in
            [("90m", 5400), ("8h", 28800), ("2d", 172_800), ("1d 12h", 129_600), ("1h30m", 5400)]
        {
            assert_eq!(parse_ttl(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn what_has_no_fixed_or_positive_length_is_refused() {
        for text in ["", "8", "soon", "0s", "-8h", "8h ago", "1mo", "1y", "9999999d"] {
            assert!(parse_ttl(text).is_err(), "{text}");
        }
    }
}
