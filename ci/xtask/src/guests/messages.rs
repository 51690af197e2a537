//! Messages that a guest sends as `defmt` frames between the lines of its console.
//!
//! A frame ends with a zero byte, and text is never zero; what lies before a zero is therefore
//! some lines of text, then one frame.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use defmt_decoder::{Encoding, StreamDecoder, Table};

/// Decodes what a particular image sends.
pub struct Messages {
    table: Table,
}

impl Messages {
    /// Reads the image's table of format strings.
    pub fn of(image: &Path) -> Result<Self> {
        let content = fs::read(image)?;
        let table = Table::parse(&content)
            .map_err(|error| error.context("cannot read the image's defmt section"))?
            .context("the image has no defmt section: was it built with the feature `defmt`?")?;
        anyhow::ensure!(table.encoding() == Encoding::Rzcobs, "only rzCOBS frames are known");
        Ok(Self { table })
    }

    /// The lines of a whole console, frames turned into text.
    pub fn decode(&self, console: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut parts: Vec<&[u8]> = console.split(|&byte| byte == 0).collect();
        let rest = parts.pop().unwrap_or_default();
        for part in parts {
            self.decode_part(part, &mut lines);
        }
        lines.extend(text_lines(rest));
        lines
    }

    fn decode_part(&self, part: &[u8], lines: &mut Vec<String>) {
        // A frame may hold a byte that looks like the end of a line: the longest text first.
        let mut starts: Vec<usize> = part
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'\n')
            .map(|(at, _)| at + 1)
            .collect();
        starts.insert(0, 0);
        for start in starts.into_iter().rev() {
            let (text, frame) = part.split_at(start);
            if let Ok(text) = std::str::from_utf8(text)
                && let Some(message) = self.decode_frame(frame)
            {
                lines.extend(text_lines(text.as_bytes()));
                lines.push(message);
                return;
            }
        }
        lines.extend(text_lines(part));
    }

    fn decode_frame(&self, frame: &[u8]) -> Option<String> {
        if frame.is_empty() {
            return None;
        }
        let mut decoder: Box<dyn StreamDecoder + '_> = self.table.new_stream_decoder();
        decoder.received(frame);
        decoder.received(&[0]);
        let message = decoder.decode().ok()?;
        Some(message.display(false).to_string())
    }
}

/// The bytes of a line that `xxd -p` has written.
pub fn bytes(hexadecimal: &str) -> Vec<u8> {
    let digits: Vec<u8> = hexadecimal
        .chars()
        .filter_map(|digit| digit.to_digit(16))
        .map(|digit| digit as u8)
        .collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn text_lines(text: &[u8]) -> impl Iterator<Item = String> {
    let text = String::from_utf8_lossy(text).into_owned();
    text.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_is_read() {
        assert_eq!(bytes("00ff7a\n"), [0, 0xff, b'z']);
    }
}
