//! Which functions of an image the instructions are in.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::Result;

use super::text::Symbols;

const SHOWN: usize = 30;

/// Prints the functions in which most instructions are, between one marker of the plugin's profile
/// and the next: `section` counts the stretches of one guest, of which each has `requests`.
pub fn print(
    profile: &Path,
    image: &Path,
    title: &str,
    section: usize,
    requests: f64,
) -> Result<()> {
    let symbols = Symbols::read(image)?;
    let text = fs::read_to_string(profile)?;
    let Some(lines) = text.split("MARK\n").nth(section) else { return Ok(()) };
    let mut functions = HashMap::<String, u64>::new();
    for line in lines.lines() {
        let Some((address, count)) = line.split_once(' ') else { continue };
        let name = match symbols.at(u64::from_str_radix(address, 16)?) {
            Some(function) => function.name.clone(),
            None => "(no symbol)".to_owned(),
        };
        *functions.entry(name).or_default() += count.parse::<u64>()?;
    }
    let mut functions: Vec<(String, u64)> = functions.into_iter().collect();
    functions.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    println!("\n{title}: our guest's instructions a request, by function");
    for (name, count) in functions.iter().take(SHOWN) {
        println!("  {:9.1}  {name}", *count as f64 / requests);
    }
    Ok(())
}
