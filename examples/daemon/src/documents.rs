//! Man pages and completions of shells, from the definition of a command line.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Command, ValueEnum};
use clap_complete::{Shell, generate_to};

/// Writes `man/NAME.8`, one for each subcommand (`man/NAME-SUBCOMMAND.8`), and `completions/`.
///
/// # Errors
///
/// If the files cannot be written.
pub fn write(command: Command, folder: &Path) -> Result<()> {
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    for folder in [&man, &completions] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let name = command.get_name().to_owned();
    for shell in Shell::value_variants() {
        generate_to(*shell, &mut command.clone(), &name, &completions)?;
    }
    let mut command = command.disable_help_subcommand(true);
    command.build();
    page(&command, &name, &man)?;
    for subcommand in command.get_subcommands() {
        page(subcommand, &format!("{name}-{}", subcommand.get_name()), &man)?;
    }
    Ok(())
}

/// A page of section 8: commands for administrators.
fn page(command: &Command, title: &str, folder: &Path) -> Result<()> {
    let path = folder.join(format!("{title}.8"));
    let mut text = Vec::new();
    let man = clap_mangen::Man::new(command.clone()).title(title.to_uppercase()).section("8");
    man.render(&mut text)?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    #[test]
    fn every_command_has_its_page() {
        let folder = tempfile::tempdir().unwrap();
        let speed = Arg::new("speed").long("speed").help("how fast it runs");
        let command = Command::new("walker")
            .about("Walks")
            .subcommand(Command::new("run").about("Walks faster").arg(speed.clone()));
        write(command, folder.path()).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(read("man/walker.8").contains("walker\\-run(8)"), "{}", read("man/walker.8"));
        assert!(read("man/walker-run.8").contains("how fast it runs"));
        assert_eq!(fs::read_dir(folder.path().join("man")).unwrap().count(), 2);
        assert!(read("completions/walker.bash").contains("--speed"));
        assert!(read("completions/_walker").contains("--speed"));
    }
}
