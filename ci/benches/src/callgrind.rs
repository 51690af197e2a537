//! What callgrind counted, as gungraun tells it.

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::process::Command;

/// Instructions of each case of a bench, as callgrind counted them.
pub fn instructions(bench: &str, words: &[&str]) -> Result<BTreeMap<String, u64>, Box<dyn Error>> {
    let output = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["bench", "--quiet", "--package", "pvblk-benches", "--bench", bench])
        .args(words)
        .env("CARGO_TERM_COLOR", "never")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("the bench {bench} failed:\n{text}{said}").into());
    }
    let mut counts = BTreeMap::new();
    let mut case = None;
    for line in text.lines() {
        if let Some((head, _)) = line.split_once(":(") {
            case = head.split_whitespace().last().map(str::to_owned);
        } else if let Some(rest) = line.trim_start().strip_prefix("Instructions:")
            && let Some(case) = case.take()
        {
            let digits = rest.trim_start().split('|').next().unwrap_or_default();
            counts.insert(case, digits.trim().parse()?);
        }
    }
    Ok(counts)
}
