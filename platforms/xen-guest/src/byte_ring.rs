//! A ring of bytes in a shared page, one direction: XenStore's and the console's
//! (`io/xs_wire.h`, `io/console.h`).
//!
//! Both indices run freely; the number of bytes in the ring is their difference. The other side may
//! write anything anywhere, so an impossible difference is an error, and the bytes are only moved,
//! never borrowed.

use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering, fence};

/// The other side's index cannot be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadIndex;

/// One direction.
pub(crate) struct ByteRing {
    bytes: *mut u8,
    size: u32,
    consumer: *const AtomicU32,
    producer: *const AtomicU32,
}

// SAFETY: it is no more than addresses of a shared page; the memory is accessed by atomics and by
// copies whose places the indices keep apart, by users who take turns.
unsafe impl Send for ByteRing {}

impl ByteRing {
    /// # Safety
    ///
    /// `page` is mapped for good and 4-byte aligned; within it are `size` bytes (a power of two) at
    /// `bytes`, and the indices at `consumer` and `producer` (all in bytes). This domain is the only
    /// one here to read, or the only one to write, by this ring, and does so from one place.
    pub(crate) unsafe fn new(
        page: *mut u8,
        bytes: usize,
        size: u32,
        consumer: usize,
        producer: usize,
    ) -> Self {
        debug_assert!(size.is_power_of_two());
        Self {
            bytes: page.wrapping_add(bytes),
            size,
            consumer: page.wrapping_add(consumer).cast(),
            producer: page.wrapping_add(producer).cast(),
        }
    }

    /// The indices: (consumer, producer).
    fn indices(&self) -> (&AtomicU32, &AtomicU32) {
        // SAFETY: `new`'s promise: mapped for good and aligned.
        unsafe { (&*self.consumer, &*self.producer) }
    }

    /// Bytes in the ring now.
    pub(crate) fn used(&self) -> Result<u32, BadIndex> {
        let (consumer, producer) = self.indices();
        let used = producer.load(Ordering::Acquire).wrapping_sub(consumer.load(Ordering::Acquire));
        if used > self.size { Err(BadIndex) } else { Ok(used) }
    }

    /// Writes as many of the bytes as there is room for; says how many.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<usize, BadIndex> {
        let room = self.size - self.used()?;
        let count = (room as usize).min(bytes.len());
        // The reader has read what is overwritten now before it moved its index.
        fence(Ordering::SeqCst);
        let (_, producer) = self.indices();
        let start = producer.load(Ordering::Relaxed);
        let (to_end, rest) = self.split(start, count);
        // SAFETY: both parts are within the ring's bytes, and the reader does not read there.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(start), to_end);
            ptr::copy_nonoverlapping(bytes.as_ptr().add(to_end), self.bytes, rest);
        }
        producer.store(start.wrapping_add(count as u32), Ordering::Release);
        Ok(count)
    }

    /// Reads as many bytes as there are, at most `bytes.len()`; says how many.
    pub(crate) fn read(&mut self, bytes: &mut [u8]) -> Result<usize, BadIndex> {
        let count = (self.used()? as usize).min(bytes.len());
        let (consumer, _) = self.indices();
        let start = consumer.load(Ordering::Relaxed);
        let (to_end, rest) = self.split(start, count);
        // SAFETY: both parts are within the ring's bytes and the destination. A peer that writes
        // there nevertheless can make the bytes arbitrary, which they are anyway.
        unsafe {
            ptr::copy_nonoverlapping(self.at(start).cast_const(), bytes.as_mut_ptr(), to_end);
            ptr::copy_nonoverlapping(self.bytes.cast_const(), bytes.as_mut_ptr().add(to_end), rest);
        }
        // The bytes are read before the writer is told that it may overwrite them.
        fence(Ordering::SeqCst);
        consumer.store(start.wrapping_add(count as u32), Ordering::Release);
        Ok(count)
    }

    fn at(&self, index: u32) -> *mut u8 {
        self.bytes.wrapping_add((index & (self.size - 1)) as usize)
    }

    /// Splits `count` bytes from `index` on at the ring's end.
    fn split(&self, index: u32, count: usize) -> (usize, usize) {
        let to_end = ((self.size - (index & (self.size - 1))) as usize).min(count);
        (to_end, count - to_end)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::sync::atomic::Ordering;
    use std::boxed::Box;
    use std::vec::Vec;

    use super::{BadIndex, ByteRing};

    fn ring(start: u32) -> (ByteRing, ByteRing) {
        let page: *mut u8 = Box::into_raw(Box::new([0_u64; 9])).cast();
        // SAFETY: 64 bytes and two words behind them, leaked; one end writes, the other reads.
        let ends =
            unsafe { (ByteRing::new(page, 0, 64, 64, 68), ByteRing::new(page, 0, 64, 64, 68)) };
        ends.0.indices().0.store(start, Ordering::Relaxed);
        ends.0.indices().1.store(start, Ordering::Relaxed);
        ends
    }

    #[test]
    fn bytes_come_out_as_they_went_in_across_the_wrap_of_the_indices() {
        let (mut writer, mut reader) = ring(u32::MAX - 100);
        let (mut sent, mut received) = (Vec::new(), Vec::new());
        for round in 0..50_u8 {
            let chunk: Vec<u8> = (0..round % 23 + 1).map(|i| i.wrapping_mul(round)).collect();
            let count = writer.write(&chunk).unwrap();
            sent.extend_from_slice(&chunk[..count]);
            let mut buffer = [0; 17];
            let count = reader.read(&mut buffer).unwrap();
            received.extend_from_slice(&buffer[..count]);
        }
        let mut buffer = [0; 64];
        let count = reader.read(&mut buffer).unwrap();
        received.extend_from_slice(&buffer[..count]);
        assert_eq!(sent, received);
    }

    #[test]
    fn a_full_ring_takes_nothing() {
        let (mut writer, mut reader) = ring(7);
        assert_eq!(writer.write(&[1; 100]), Ok(64));
        assert_eq!(writer.write(&[1; 100]), Ok(0));
        assert_eq!(reader.read(&mut [0; 3]), Ok(3));
        assert_eq!(writer.write(&[1; 100]), Ok(3));
    }

    #[test]
    fn an_impossible_index_is_an_error() {
        let (mut writer, mut reader) = ring(0);
        writer.indices().1.store(65, Ordering::Relaxed);
        assert_eq!(reader.read(&mut [0; 3]), Err(BadIndex));
        writer.indices().1.store(0, Ordering::Relaxed);
        writer.indices().0.store(1, Ordering::Relaxed);
        assert_eq!(writer.write(&[0; 3]), Err(BadIndex));
    }
}
