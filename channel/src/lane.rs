//! What a change of lanes puts on the wire and into shared memory: the published stay and the REWIND frame (LANES).

use crate::layout::Direction;
use crate::sync::{Ordering, fence};

/// Bytes of a REWIND on the anchor, with the escape byte before it.
pub const REWIND_LEN: usize = 16;

/// A stay on the ring, as its sender announces it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Stay {
    /// Generation, never 0.
    pub generation: u32,
    /// Offset of the first byte on the ring (S).
    pub start: u64,
    /// A byte different from the first on the ring.
    pub escape: u8,
}

/// The end of a confirmed stay: the sender goes on over the anchor at `resume` (A).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rewind {
    /// Generation of the stay that ends.
    pub generation: u32,
    /// Stream offset of the raw byte that follows.
    pub resume: u64,
    /// The sender has shut: after these bytes comes the end of the stream, and the other direction may stay where it is.
    pub last: bool,
}

const LEFT: u8 = 1;
const SHUT: u8 = 2;

impl Rewind {
    /// The frame: escape byte, "VS", kind (1 left, 2 shut), generation, offset; big-endian.
    pub fn encode(self, escape: u8) -> [u8; REWIND_LEN] {
        let mut out = [0; REWIND_LEN];
        out[0] = escape;
        out[1..4].copy_from_slice(&[b'V', b'S', if self.last { SHUT } else { LEFT }]);
        out[4..8].copy_from_slice(&self.generation.to_be_bytes());
        out[8..].copy_from_slice(&self.resume.to_be_bytes());
        out
    }

    /// The frame's meaning, if it is one with this escape byte.
    pub fn decode(frame: &[u8; REWIND_LEN], escape: u8) -> Option<Self> {
        let (head, rest) = frame.split_first_chunk::<4>()?;
        let (generation, resume) = rest.split_first_chunk::<4>()?;
        let [first, b'V', b'S', kind @ (LEFT | SHUT)] = *head else { return None };
        (first == escape).then_some(Self {
            generation: u32::from_be_bytes(*generation),
            resume: u64::from_be_bytes(*resume.first_chunk()?),
            last: kind == SHUT,
        })
    }
}

/// A byte that differs from `first`.
pub fn escape_for(first: u8) -> u8 {
    !first
}

impl Direction {
    /// Producer: publishes the stay, and learns whether the consumer had closed the generation before (then the stay does
    /// not count, and must be cancelled before a byte is put on the ring).
    ///
    /// The producer stores the stay, then loads `reader.sealed`; the consumer stores `sealed`, then loads the stay
    /// ([`Direction::close_unopened`]); with the fences at least one sees the other. If both do, the producer cancels,
    /// and the consumer finds the first raw byte different from the escape.
    pub fn publish_stay(&self, stay: Stay) -> bool {
        self.tail.tail.store(stay.start, Ordering::Relaxed);
        self.head.head.store(stay.start, Ordering::Relaxed);
        self.reader.taken.store(stay.start, Ordering::Relaxed);
        self.stay.start.store(stay.start, Ordering::Relaxed);
        self.stay.escape.store(u32::from(stay.escape), Ordering::Relaxed);
        // Release: what was stored above is visible to who sees the generation. Pairs with the Acquire in `stay`.
        self.stay.generation.store(stay.generation, Ordering::Release);
        fence(Ordering::SeqCst);
        self.reader.sealed.load(Ordering::Relaxed) == 0
    }

    /// Consumer: the stay, if it is published with this generation.
    pub fn stay(&self, generation: u32) -> Option<Stay> {
        // Acquire: pairs with the Release in `publish_stay`.
        if self.stay.generation.load(Ordering::Acquire) != generation {
            return None;
        }
        Some(Stay {
            generation,
            start: self.stay.start.load(Ordering::Relaxed),
            escape: self.stay.escape.load(Ordering::Relaxed) as u8,
        })
    }

    /// Consumer: closes the generation if no stay is published yet, and says whether it did. If it did, the producer will
    /// not put a frame on the anchor for this generation.
    pub fn close_unopened(&self, generation: u32) -> bool {
        self.reader.sealed.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.stay(generation).is_none()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_rewind_round_trips_and_a_tenants_bytes_are_none() {
        let rewind = Rewind { generation: 7, resume: 0x0102_0304_0506_0708, last: false };
        let frame = rewind.encode(b'x');
        assert_eq!(frame, *b"xVS\x01\0\0\0\x07\x01\x02\x03\x04\x05\x06\x07\x08");
        assert_eq!(Rewind::decode(&frame, b'x'), Some(rewind));
        assert_eq!(Rewind::decode(&frame, b'y'), None);
        let last = Rewind { last: true, ..rewind };
        assert_eq!(Rewind::decode(&last.encode(b'x'), b'x'), Some(last));
        assert_eq!(Rewind::decode(b"xVS\x03\0\0\0\x07\x01\x02\x03\x04\x05\x06\x07\x08", b'x'), None);
    }

    #[test]
    fn the_escape_differs_from_the_first_byte() {
        assert!((0..=255).all(|b| escape_for(b) != b));
    }
}
