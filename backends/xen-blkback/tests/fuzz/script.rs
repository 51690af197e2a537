//! Segments, taken from a script.

use pvblk_simulated::Script;

use super::raw::Seg;

/// A segment, of one of the references, or of another one; most are sound.
pub fn segment(script: &mut Script, references: &[u32]) -> Seg {
    let choice = script.below(64);
    let reference = match references.get(choice % (references.len() + 1)) {
        Some(reference) => *reference,
        None => script.number32(),
    };
    let (first, last) = match script.byte() {
        0..128 => (0, 7),
        bits @ 128..192 => (bits % 8, 7),
        bits @ 192..240 => (bits % 8, bits / 8 % 8),
        _ => (script.byte(), script.byte()),
    };
    (reference, first, last)
}
