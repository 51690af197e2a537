//! A configuration file (TOML) of which every mistake is told, with its line and what it is about.

use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeOwned, IntoDeserializer};
use toml::Spanned;
use toml::de::{DeTable, Error};

/// A mistake in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1 on.
    pub line: usize,
    /// The setting, with the table that it is in; empty if the text is no TOML.
    pub field: String,
    /// What is wrong.
    pub words: String,
}

/// All mistakes in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: ", self.line)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.words)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.0.iter().enumerate() {
            let start = if number == 0 { "" } else { "\n" };
            write!(f, "{start}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A configuration file that is being read. Mistakes are collected, so that all are told at once.
#[derive(Debug)]
pub struct Document<'t> {
    text: &'t str,
    problems: Vec<Problem>,
}

impl<'t> Document<'t> {
    /// A text, and what is in it as far as that can be read.
    pub fn parse(text: &'t str) -> (Self, DeTable<'t>) {
        let mut document = Self { text, problems: Vec::new() };
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            document.note_error("", 0..0, &error);
        }
        (document, table.into_inner())
    }

    /// Reads the settings of one table. `place` is the table's name, with a dot at its end. Each
    /// setting is read and checked by itself first, so that one mistake does not hide the next.
    pub fn settings<T: DeserializeOwned + Default>(
        &mut self,
        place: &str,
        table: DeTable<'t>,
        check: impl Fn(&T) -> Result<(), String>,
    ) -> T {
        let before = self.problems.len();
        for (key, value) in table.iter() {
            let field = format!("{place}{}", key.get_ref());
            let mut alone = DeTable::new();
            alone.insert(key.clone(), value.clone());
            match read::<T>(alone) {
                Err(error) => self.note_error(&field, key.span(), &error),
                Ok(setting) => {
                    if let Err(words) = check(&setting) {
                        self.note(&field, key.span(), words);
                    }
                }
            }
        }
        if self.problems.len() > before {
            return T::default();
        }
        read(table).unwrap_or_else(|error| {
            self.note_error(place.trim_end_matches('.'), 0..0, &error);
            T::default()
        })
    }

    /// Adds a mistake that is at `span` of the text.
    pub fn note(&mut self, field: &str, span: Range<usize>, words: impl fmt::Display) {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        self.problems.push(Problem { line, field: field.into(), words: words.to_string() });
    }

    fn note_error(&mut self, field: &str, span: Range<usize>, error: &Error) {
        self.note(field, error.span().unwrap_or(span), error.message());
    }

    /// The end.
    ///
    /// # Errors
    ///
    /// All mistakes, in the order of the text, if there are some.
    pub fn finish(mut self) -> Result<(), Problems> {
        self.problems.sort_by_key(|problem| problem.line);
        if self.problems.is_empty() { Ok(()) } else { Err(Problems(self.problems)) }
    }
}

fn read<T: DeserializeOwned>(table: DeTable<'_>) -> Result<T, Error> {
    T::deserialize(Spanned::new(0..0, table).into_deserializer())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Settings {
        size: u32,
        name: String,
    }

    fn parse(text: &str) -> Result<Settings, Problems> {
        let (mut document, table) = Document::parse(text);
        let check = |settings: &Settings| match settings.size {
            0..10 => Ok(()),
            size => Err(format!("{size} is too large")),
        };
        let settings = document.settings("the.", table, check);
        document.finish().map(|()| settings)
    }

    #[test]
    fn every_mistake_is_told_with_its_line() {
        let text = "size = 11\n\nname = 3\ncolour = 1\n";
        let told = parse(text).unwrap_err().to_string();
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(lines[0], "line 1: the.size: 11 is too large");
        assert!(lines[1].starts_with("line 3: the.name: invalid type: integer `3`"), "{told}");
        assert!(lines[2].starts_with("line 4: the.colour: unknown field `colour`"), "{told}");
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn what_is_no_toml_is_told_with_its_line() {
        let Problems(problems) = parse("size = 1\nname = \"x\nsize = 2").unwrap_err();
        assert_eq!(problems[0].line, 2, "{problems:?}");
    }

    #[test]
    fn what_is_right_is_read() {
        let settings = Settings { size: 3, name: "x".into() };
        assert_eq!(parse("name = \"x\"\nsize = 3"), Ok(settings));
        assert_eq!(parse(""), Ok(Settings::default()));
    }
}
