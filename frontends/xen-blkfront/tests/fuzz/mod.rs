//! The bodies of the fuzz targets of `ci/fuzz`, which the tests run on the corpus, too.

mod backend;
mod store;

pub use backend::hostile_backend;
pub use store::store_stream;

/// Decisions, taken from bytes; all zero when there are no more.
pub struct Script {
    bytes: Vec<u8>,
    at: usize,
}

impl Script {
    pub fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), at: 0 }
    }

    pub fn is_over(&self) -> bool {
        self.at >= self.bytes.len()
    }

    pub fn byte(&mut self) -> u8 {
        let byte = self.bytes.get(self.at).copied();
        self.at += usize::from(byte.is_some());
        byte.unwrap_or(0)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound.max(1)
    }

    pub fn number16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Small numbers take one byte, others five.
    pub fn number32(&mut self) -> u32 {
        match self.byte() {
            0xFF => u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()]),
            small => small.into(),
        }
    }

    pub fn number64(&mut self) -> u64 {
        u64::from(self.number32()) | u64::from(self.number32()) << 32
    }

    /// Up to `most` bytes.
    pub fn some(&mut self, most: usize) -> Vec<u8> {
        let count = usize::from(self.byte()).min(most).min(self.bytes.len() - self.at);
        self.at += count;
        self.bytes[self.at - count..self.at].to_vec()
    }
}
