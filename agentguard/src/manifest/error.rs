//! What is wrong with a manifest, and where.

use std::fmt;

/// How much of a refused value an error shows, in characters.
const SHOWN_CHARACTERS: usize = 80;

/// A place in a text; both count from 1, columns in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

/// One thing that is wrong with a manifest.
///
/// Displays as `file:line:column: field: "value" message; remedy`, without the parts that do not
/// apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The file, or what else the text came from.
    pub file: String,
    /// Nothing when it is the whole file that is wrong.
    pub position: Option<Position>,
    /// The path of the field from the document down, such as `spec.egress[0].ports`.
    pub field: Option<String>,
    /// The refused value, as long as it is one scalar; shortened when very long.
    pub value: Option<String>,
    /// The problem, as the predicate of a sentence about the value or the field.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

/// Something in a valid manifest that its author should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestWarning(pub ManifestError);

impl ManifestError {
    /// An error about a whole file.
    #[must_use]
    pub fn of_file(file: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            position: None,
            field: None,
            value: None,
            message: message.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for ManifestError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, position, field, value, message, remedy } = self;
        formatter.write_str(file)?;
        if let Some(Position { line, column }) = position {
            write!(formatter, ":{line}:{column}")?;
        }
        formatter.write_str(":")?;
        if let Some(field) = field {
            write!(formatter, " {field}:")?;
        }
        if let Some(value) = value {
            write!(formatter, " {value:?}")?;
        }
        write!(formatter, " {message}; {remedy}")
    }
}

impl std::error::Error for ManifestError {}

impl fmt::Display for ManifestWarning {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// `text`, cut where an error line would become unreadable.
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Splits `problem; remedy`, the shape that all errors of text types have.
pub(super) fn problem_and_remedy(sentence: &str) -> (&str, &str) {
    sentence.split_once("; ").unwrap_or((sentence, "correct it"))
}
