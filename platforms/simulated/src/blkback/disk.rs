//! The medium, with a write cache that a crash loses.

use std::collections::BTreeMap;

const SECTOR: usize = 512;

pub(super) struct Disk {
    bytes: Vec<u8>,
    /// What the medium holds where the cache is newer, by sector.
    durable: BTreeMap<u64, Box<[u8]>>,
    cached: bool,
}

impl Disk {
    pub(super) fn new(sectors: u64, cached: bool) -> Self {
        Self { bytes: vec![0; sectors as usize * SECTOR], durable: BTreeMap::new(), cached }
    }

    pub(super) fn set_cached(&mut self, cached: bool) {
        self.cached = cached;
        if !cached {
            self.flush();
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What a crash would leave.
    pub(super) fn durable_bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for (sector, old) in &self.durable {
            let at = *sector as usize * SECTOR;
            bytes[at..at + SECTOR].copy_from_slice(old);
        }
        bytes
    }

    pub(super) fn resize(&mut self, sectors: u64) {
        self.bytes.resize(sectors as usize * SECTOR, 0);
        self.durable.retain(|sector, _| *sector < sectors);
    }

    /// Sets bytes behind the frontend's back; they are durable.
    pub(super) fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        let sectors = (offset / SECTOR) as u64..(offset + bytes.len()).div_ceil(SECTOR) as u64;
        for sector in sectors {
            self.durable.remove(&sector);
        }
    }

    /// The caller checked the extent when it took the request; a shrink may have come since.
    pub(super) fn read(&self, sector: u64, bytes: &mut [u8]) -> bool {
        let at = sector as usize * SECTOR;
        match self.bytes.get(at..at + bytes.len()) {
            Some(source) => {
                bytes.copy_from_slice(source);
                true
            }
            None => false,
        }
    }

    pub(super) fn write(&mut self, sector: u64, bytes: &[u8]) -> bool {
        let at = sector as usize * SECTOR;
        if at + bytes.len() > self.bytes.len() {
            return false;
        }
        if self.cached {
            for index in 0..bytes.len() / SECTOR {
                let old = at + index * SECTOR;
                let old = &self.bytes[old..old + SECTOR];
                self.durable.entry(sector + index as u64).or_insert_with(|| old.into());
            }
        }
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        true
    }

    pub(super) fn flush(&mut self) {
        self.durable.clear();
    }

    /// Loses the cache.
    pub(super) fn crash(&mut self) {
        self.bytes = self.durable_bytes();
        self.durable.clear();
    }
}
