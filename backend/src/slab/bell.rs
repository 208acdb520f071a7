//! Doorbells: what wakes one who has announced that it sleeps.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// Rings that a guest's stream takes before it is to be read empty: far fewer bytes than its kernel has room for.
const RINGS: u32 = 4096;

/// Rings that lie in a stream, for nobody who waits for a doorbell reads it.
#[derive(Debug, Default)]
struct Rings {
    count: AtomicU32,
    full: Arc<AtomicBool>,
}

/// A doorbell of one side. An eventfd, or a stream of a virtual machine.
#[derive(Debug, Clone)]
pub struct Doorbell {
    fd: Arc<OwnedFd>,
    rings: Option<Arc<Rings>>,
}

impl Doorbell {
    /// An eventfd.
    ///
    /// # Errors
    ///
    /// If the system has no more.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd: Arc::new(fd), rings: None })
    }

    /// A stream, non-blocking. `full` is set when it, or another one with this flag, is to be read empty.
    pub fn stream(stream: OwnedFd, full: Arc<AtomicBool>) -> Self {
        Self { fd: Arc::new(stream), rings: Some(Arc::new(Rings { full, ..Rings::default() })) }
    }

    /// Rings. One that takes no more has been rung.
    pub fn ring(&self) {
        let rung = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        if let (Some(rings), Ok(_)) = (&self.rings, rung)
            && rings.count.fetch_add(1, Ordering::Relaxed) + 1 == RINGS
        {
            rings.full.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it is to be read empty: says so once.
    pub fn take_full(&self) -> bool {
        let full = |rings: &&Arc<Rings>| rings.count.load(Ordering::Relaxed) >= RINGS;
        self.rings.as_ref().filter(full).is_some_and(|rings| rings.count.swap(0, Ordering::Relaxed) > 0)
    }

    /// Its descriptor, to go beside a message.
    pub fn fd(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    /// For registration with the event loop.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn a_stream_says_once_that_it_is_full() {
        let flags = SocketFlags::NONBLOCK;
        let (a, _b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let full = Arc::new(AtomicBool::new(false));
        let bell = Doorbell::stream(a, full.clone());
        let mut buffer = [0; 8 * RINGS as usize];
        for round in 0..2 {
            for n in 0..RINGS {
                assert!(!full.load(Ordering::Relaxed) && !bell.take_full());
                bell.ring();
                if n % 64 == 0 {
                    let _ = rustix::io::read(&_b, &mut buffer);
                }
            }
            assert!(full.swap(false, Ordering::Relaxed) && bell.take_full(), "round {round}");
            assert!(!bell.take_full());
        }
    }
}
