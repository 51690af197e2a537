//! Words of the command line.

/// The value of `key=value` in a command line, whose words are separated by blanks; the last one
/// counts.
#[must_use]
pub fn argument<'a>(command_line: &'a str, key: &str) -> Option<&'a str> {
    command_line
        .split_ascii_whitespace()
        .rev()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::argument;

    #[test]
    fn arguments_are_whole_words_and_the_last_counts() {
        let line = "mode=read disk=xvda  mode=write modest=1";
        assert_eq!(argument(line, "mode"), Some("write"));
        assert_eq!(argument(line, "modes"), None);
        assert_eq!(argument(line, "disk"), Some("xvda"));
        assert_eq!(argument("", "disk"), None);
    }
}
