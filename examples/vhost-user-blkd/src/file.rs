//! A file with options, for what the command line does not say: its settings are the command line's
//! long options.
//!
//! ```toml
//! file = "/srv/web.img"
//! queues = 4
//! read-only = true
//! ```

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, CommandFactory, FromArgMatches};
use pvblk_daemon::document::{Document, Problems};
use toml::de::DeValue;

use crate::cli::Cli;

/// What a file says: option by option, as the command line would.
pub type Settings = BTreeMap<String, String>;

/// The options that there are, and what the file among them says. Mistakes on the command line end the
/// program.
///
/// # Errors
///
/// What is wrong with the file.
pub fn read(words: &[OsString]) -> Result<(Cli, Settings)> {
    let (words, settings) = with_file(words)?;
    Ok((parse_all(words).unwrap_or_else(|error| error.exit()), settings))
}

/// The same once more, in a program that goes on.
///
/// # Errors
///
/// What is wrong with either.
pub fn reread(words: &[OsString]) -> Result<(Cli, Settings)> {
    let (words, settings) = with_file(words)?;
    Ok((parse_all(words)?, settings))
}

/// The words of the command line, and before them those of the file that it names.
fn with_file(words: &[OsString]) -> Result<(Vec<OsString>, Settings)> {
    let settings = named(words).map(|file| read_file(&file)).transpose()?.unwrap_or_default();
    let of_file = settings.iter().map(|(name, value)| word(name, value).into());
    let (program, rest) = words.split_first().context("the program has no name")?;
    let all = [program.clone()].into_iter().chain(of_file).chain(rest.iter().cloned());
    Ok((all.collect(), settings))
}

fn parse_all(words: Vec<OsString>) -> Result<Cli, clap::Error> {
    // What comes later counts.
    let matches = Cli::command().args_override_self(true).try_get_matches_from(words)?;
    Cli::from_arg_matches(&matches)
}

/// The file that the command line names.
fn named(words: &[OsString]) -> Option<PathBuf> {
    let command = Cli::command().ignore_errors(true).disable_help_flag(true);
    let matches = command.disable_version_flag(true).try_get_matches_from(words).ok()?;
    matches.get_one::<PathBuf>("config").cloned()
}

fn word(name: &str, value: &str) -> String {
    if value.is_empty() { format!("--{name}") } else { format!("--{name}={value}") }
}

fn read_file(path: &Path) -> Result<Settings> {
    let place = || format!("cannot read the configuration {}", path.display());
    let text = std::fs::read_to_string(path).with_context(place)?;
    parse(&text).map_err(|problems| anyhow!("{}:\n{problems}", path.display()))
}

fn parse(text: &str) -> Result<Settings, Problems> {
    let (mut document, table) = Document::parse(text);
    let command = Cli::command();
    let mut settings = Settings::new();
    for (key, value) in table {
        let name = key.get_ref().as_ref();
        match command.get_arguments().find(|arg| arg.get_long() == Some(name)) {
            Some(arg) if !matches!(name, "config" | "check") => match setting(arg, value.get_ref())
            {
                Ok(Some(value)) => drop(settings.insert(name.into(), value)),
                Ok(None) => {}
                Err(words) => document.note(name, key.span(), words),
            },
            _ => document.note(name, key.span(), "there is no such option"),
        }
    }
    document.finish().map(|()| settings)
}

/// What an option is given by a file, if it is given at all.
fn setting(arg: &Arg, value: &DeValue<'_>) -> Result<Option<String>, String> {
    let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
    let value = match value {
        DeValue::Boolean(value) if is_flag => return Ok(value.then(String::new)),
        _ if is_flag => return Err("true or false is expected".into()),
        DeValue::String(text) if !text.is_empty() => text.clone().into_owned(),
        DeValue::Integer(number) => number.as_str().to_owned(),
        _ => return Err("a text or a number is expected".into()),
    };
    let name = arg.get_long().unwrap_or_default();
    // By itself, so that the line is known. What else is missing is not its fault.
    match Cli::command().try_get_matches_from(["", &word(name, &value)]) {
        Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            Err(line.trim_start_matches("error: ").to_owned())
        }
        _ => Ok(Some(value)),
    }
}

/// The options that two files say differently.
pub fn differences<'s>(one: &'s Settings, other: &'s Settings) -> Vec<&'s str> {
    let differs = |name: &&String| one.get(*name) != other.get(*name);
    let mut names: Vec<_> = one.keys().chain(other.keys()).filter(differs).map(|n| &**n).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_the_command_line_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("web.toml");
        std::fs::write(&file, "memory = \"1M\"\nqueues = 2\nread-only = true\nshare = false\n")
            .unwrap();
        let words = ["x", "--socket", "s", "--queues", "8", "--config"].map(OsString::from);
        let words: Vec<_> = words.into_iter().chain([file.into()]).collect();
        let (cli, settings) = read(&words).unwrap();
        assert_eq!((cli.device.queues, cli.device.read_only, cli.store.share), (8, true, false));
        assert_eq!(cli.source().unwrap().to_string(), "memory:1M");
        assert_eq!(settings.len(), 3);
    }

    #[test]
    fn every_mistake_is_told_with_its_line() {
        let text = "queues = \"x\"\ncolour = 1\n\npacked = 3\nserial = false\nconfig = \"y\"\n";
        let Problems(problems) = parse(text).unwrap_err();
        let places: Vec<_> =
            problems.iter().map(|problem| (problem.line, &*problem.field)).collect();
        assert_eq!(
            places,
            [(1, "queues"), (2, "colour"), (4, "packed"), (5, "serial"), (6, "config")]
        );
        assert!(problems[0].words.contains("invalid value 'x'"), "{}", problems[0]);
    }

    #[test]
    fn what_differs_is_named() {
        let of = |text| parse(text).unwrap();
        let (one, other) =
            (of("queues = 2\nshare = true\npacked = true"), of("queues = 3\npacked = true"));
        assert_eq!(differences(&one, &other), ["queues", "share"]);
    }
}
