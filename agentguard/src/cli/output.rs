//! What is shown: tables for people, JSON for programs.
//!
//! What is shown to people has its control characters escaped: names and paths are chosen by
//! workloads, and a terminal obeys them.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table};
use serde::Serialize;

use super::exit::Failure;
use crate::api::types::Problem;

/// The form of what is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
}

/// Whether words are coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    Plain,
    Coloured,
}

impl Colour {
    /// Coloured only on a terminal that can, and never with `NO_COLOR` set to anything.
    #[must_use]
    pub fn choose(is_terminal: bool, no_color: Option<&OsStr>, term: Option<&OsStr>) -> Self {
        let unwanted = no_color.is_some_and(|value| !value.is_empty());
        if is_terminal && !unwanted && term.is_some_and(|term| term != "dumb") {
            Self::Coloured
        } else {
            Self::Plain
        }
    }
}

/// What a word means, by which it is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    Neutral,
    Good,
    Careful,
    Bad,
}

/// Where things are shown.
pub struct Console<'a> {
    pub out: &'a mut dyn Write,
    pub err: &'a mut dyn Write,
    pub colour: Colour,
    /// Of `err`, which may be a terminal when `out` is none.
    pub err_colour: Colour,
    /// Columns of the terminal; absent where there is none, and nothing is wrapped.
    pub width: Option<u16>,
}

impl Console<'_> {
    /// Columns of the terminal this process writes to; absent where it can not be told.
    #[must_use]
    pub fn terminal_width() -> Option<u16> {
        Table::new().width()
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    /// If it can not be written.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *self.out, value)?;
        self.out.write_all(b"\n")
    }

    /// Writes a table; with no rows, `nothing` instead.
    ///
    /// # Errors
    /// If it can not be written.
    pub fn table(&mut self, rows: &Rows, nothing: &str) -> io::Result<()> {
        if rows.rows.is_empty() {
            return writeln!(self.out, "{nothing}");
        }
        let mut table = Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        match self.colour {
            Colour::Coloured => table.enforce_styling(),
            Colour::Plain => table.force_no_tty(),
        };
        if let Some(width) = self.width {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
        }
        let bold = |title: &&str| Cell::new(title).add_attribute(Attribute::Bold);
        table.set_header(rows.header.iter().map(bold));
        for row in &rows.rows {
            table.add_row(row.iter().map(|(text, tone)| match tone {
                Tone::Neutral => Cell::new(text),
                Tone::Good => Cell::new(text).fg(Color::Green),
                Tone::Careful => Cell::new(text).fg(Color::Yellow),
                Tone::Bad => Cell::new(text).fg(Color::Red),
            }));
        }
        if let Some(first) = table.column_mut(0) {
            first.set_padding((0, 1));
        }
        for line in table.lines() {
            writeln!(self.out, "{}", line.trim_end())?;
        }
        Ok(())
    }

    /// Writes `name: value` lines, aligned.
    ///
    /// # Errors
    /// If it can not be written.
    pub fn fields(&mut self, fields: &[(&str, String, Tone)]) -> io::Result<()> {
        let width = fields.iter().map(|(name, ..)| name.len()).max().unwrap_or(0) + 1;
        for (name, value, tone) in fields {
            let name = format!("{name}:");
            let value = tint(&clean(value), *tone, self.colour);
            writeln!(self.out, "{name:width$} {value}")?;
        }
        Ok(())
    }

    /// Says why it failed, on the error stream.
    pub fn failure(&mut self, failure: &Failure, format: Format) {
        let written = match format {
            Format::Json => {
                let problem = Problem {
                    error: failure.error.clone(),
                    remedy: failure.remedy.clone(),
                    details: failure.details.clone(),
                };
                serde_json::to_writer(&mut *self.err, &problem)
                    .map_err(io::Error::from)
                    .and_then(|()| self.err.write_all(b"\n"))
            }
            Format::Table => {
                let label = tint("error:", Tone::Bad, self.err_colour);
                let mut text = format!("{label} {}\n", clean(&failure.error));
                for line in &failure.details {
                    let _ = writeln!(text, "  {}", clean(line));
                }
                if let Some(remedy) = &failure.remedy {
                    let _ = writeln!(text, "help: {}", clean(remedy));
                }
                self.err.write_all(text.as_bytes())
            }
        };
        // Where even this can not be said, the exit status says it.
        let _ = written;
    }

    /// Says something the user should know, on the error stream.
    pub fn note(&mut self, label: &str, tone: Tone, text: &str) {
        let label = tint(label, tone, self.err_colour);
        // As above.
        let _ = writeln!(self.err, "{label} {}", clean(text));
    }
}

/// A table to be.
pub struct Rows {
    header: Vec<&'static str>,
    rows: Vec<Vec<(String, Tone)>>,
}

impl Rows {
    #[must_use]
    pub fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    pub fn push(&mut self, row: impl IntoIterator<Item = (String, Tone)>) {
        self.rows.push(row.into_iter().map(|(text, tone)| (clean(&text), tone)).collect());
    }
}

/// A neutral cell.
#[must_use]
pub fn plain(value: impl ToString) -> (String, Tone) {
    (value.to_string(), Tone::Neutral)
}

/// A neutral cell, `-` where there is nothing.
#[must_use]
pub fn or_dash(value: Option<impl ToString>) -> (String, Tone) {
    plain(value.map_or_else(|| "-".to_owned(), |value| value.to_string()))
}

/// `text` coloured by what it means.
#[must_use]
pub fn tint(text: &str, tone: Tone, colour: Colour) -> String {
    let code = match (colour, tone) {
        (Colour::Plain, _) | (Colour::Coloured, Tone::Neutral) => return text.to_owned(),
        (Colour::Coloured, Tone::Good) => 32,
        (Colour::Coloured, Tone::Careful) => 33,
        (Colour::Coloured, Tone::Bad) => 31,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// `text` without what a terminal would obey: control characters, and those that turn the
/// direction of writing or take no room.
#[must_use]
pub fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    for c in text.chars() {
        let invisible = matches!(
            c,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        );
        if c.is_control() || invisible {
            cleaned.extend(c.escape_default());
        } else {
            cleaned.push(c);
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_is_only_for_a_terminal_and_never_with_no_color() {
        let term = Some(OsStr::new("xterm"));
        assert_eq!(Colour::choose(true, None, term), Colour::Coloured);
        assert_eq!(Colour::choose(true, Some(OsStr::new("")), term), Colour::Coloured);
        assert_eq!(Colour::choose(true, Some(OsStr::new("0")), term), Colour::Plain);
        assert_eq!(Colour::choose(false, None, term), Colour::Plain);
        assert_eq!(Colour::choose(true, None, Some(OsStr::new("dumb"))), Colour::Plain);
        assert_eq!(Colour::choose(true, None, None), Colour::Plain);
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        assert_eq!(clean("a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
        assert_eq!(clean("\u{9b}31m\u{202e}gpj"), "\\u{9b}31m\\u{202e}gpj");
        assert_eq!(clean("café 名"), "café 名");
    }
}
