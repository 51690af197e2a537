//! A connection whose whole exchange has one deadline.
//!
//! A time limit for each read is none: a client that sends a byte now and then, or takes one, keeps
//! every such limit and holds up all others for as long as it likes.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Bytes that one call of the system writes at most. Linux applies the time limit of a local socket to
/// each packet that it cuts a longer write into, so that one call could last without end.
const WRITE_MOST: usize = 4096;

/// A stream whose reads and writes can be given a time limit.
pub trait Timed {
    /// Limits the next reads and writes.
    ///
    /// # Errors
    ///
    /// What the system says.
    fn limit(&self, limit: Duration) -> io::Result<()>;
}

impl Timed for TcpStream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit)).and_then(|()| self.set_write_timeout(Some(limit)))
    }
}

impl Timed for UnixStream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit)).and_then(|()| self.set_write_timeout(Some(limit)))
    }
}

/// A stream that can be read and written until a moment. Then both fail with `TimedOut`.
#[derive(Debug)]
pub struct Deadline<'s, S> {
    stream: &'s S,
    end: Instant,
}

impl<S> Clone for Deadline<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Deadline<'_, S> {}

impl<'s, S: Timed> Deadline<'s, S> {
    /// The exchange has to be over when `patience` is.
    pub fn new(stream: &'s S, patience: Duration) -> Self {
        Self { stream, end: Instant::now() + patience }
    }

    fn limit(&self) -> io::Result<()> {
        // A limit of 0 would be none.
        let left = self.end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        self.stream.limit(left.ok_or(io::ErrorKind::TimedOut)?)
    }
}

impl<'s, S: Timed> Read for Deadline<'s, S>
where
    &'s S: Read,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.limit()?;
        let mut stream = self.stream;
        stream.read(buffer)
    }
}

impl<'s, S: Timed> Write for Deadline<'s, S>
where
    &'s S: Write,
{
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.limit()?;
        let mut stream = self.stream;
        stream.write(&buffer[..buffer.len().min(WRITE_MOST)])
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut stream = self.stream;
        stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// How long the exchange may take, and a client that would keep it up for two minutes.
    const PATIENCE: Duration = Duration::from_millis(100);
    const PAUSE: Duration = Duration::from_millis(5);
    const BYTES: usize = 24_000;

    #[test]
    fn a_client_that_drips_is_not_listened_to_for_ever() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let client = thread::spawn(move || {
            for sent in 0..BYTES {
                if theirs.write_all(b"x").is_err() {
                    return sent;
                }
                thread::sleep(PAUSE);
            }
            BYTES
        });
        let error = Deadline::new(&ours, PATIENCE).read_to_end(&mut Vec::new()).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock));
        drop(ours);
        assert!(client.join().unwrap() < BYTES);
    }

    #[test]
    fn a_client_that_takes_its_answer_by_bytes_is_not_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let client = thread::spawn(move || {
            for taken in 0..BYTES {
                // Enough that there is room again and again.
                if theirs.read(&mut [0; 4096]).unwrap_or(0) == 0 {
                    return taken;
                }
                thread::sleep(PAUSE);
            }
            BYTES
        });
        let answer = vec![0; 4096 * BYTES];
        let error = Deadline::new(&ours, PATIENCE).write_all(&answer).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock));
        drop(ours);
        assert!(client.join().unwrap() < BYTES);
    }
}
