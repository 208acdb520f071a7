//! The shared memory's layout, top to bottom in address order, with its sizes asserted.

use crate::sync::{AtomicU32, AtomicU64};

/// First word of a slab: "vsk-slab" in little-endian bytes.
pub const SLAB_MAGIC: u64 = u64::from_le_bytes(*b"vsk-slab");
/// Version of this layout.
pub const LAYOUT_VERSION: u32 = 3;
/// Bytes of a slab's header.
pub const SLAB_HEADER_LEN: usize = 4096;
/// Bytes of a segment's header.
pub const SEGMENT_HEADER_LEN: usize = 4096;
/// Doorbells of one side of a slab; waiters beyond this number share one.
pub const BELLS: usize = 4;
/// Smallest ring: one page, so that rings stay page-aligned.
pub const RING_MIN: usize = 4096;
/// Largest ring.
pub const RING_MAX: usize = 1 << 30;

/// Types that both sides may lay over shared memory.
///
/// # Safety
///
/// The type holds no pointers and no padding that matters, any bit pattern is a valid value, and every field that the
/// other side may write is an atomic.
pub unsafe trait Shared {}

/// One doorbell of one side: has a waiter announced its sleep, and on which processor does it run.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Bell {
    /// 1 while a waiter sleeps or is about to; the one who takes it to 0 writes the eventfd.
    pub sleeping: AtomicU32,
    /// The processor on which the waiter last ran, plus one; 0 is unknown.
    pub cpu: AtomicU32,
}

/// First page of a slab.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct SlabHeader {
    /// [`SLAB_MAGIC`].
    pub magic: AtomicU64,
    /// [`LAYOUT_VERSION`].
    pub version: AtomicU32,
    /// How many segments follow.
    pub segments: AtomicU32,
    /// Bytes of one ring.
    pub ring_len: AtomicU64,
    /// The doorbells of side 0 and side 1.
    pub bells: [[Bell; BELLS]; 2],
}

/// The producer's hot line.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Head {
    /// Stream offset after the last published byte.
    pub head: AtomicU64,
}

/// What the producer writes rarely: the stay and its end.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Stay {
    /// Generation of the stay; 0 until `start` and `escape` are published.
    pub generation: AtomicU32,
    /// The escape byte.
    pub escape: AtomicU32,
    /// Offset of the first byte that travels on the ring (S).
    pub start: AtomicU64,
    /// 1 after the producer has left the ring.
    pub sealed: AtomicU32,
    /// 1 while the producer wants to hear of free space.
    pub want_space: AtomicU32,
    /// 1 when the producer's connection was aborted (reset).
    pub aborted: AtomicU32,
}

/// The consumer's hot line.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Tail {
    /// Stream offset up to which the consumer has taken bytes for good: it may be overwritten below.
    pub tail: AtomicU64,
}

/// What the consumer writes rarely.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Reader {
    /// Generation of the stay that the far end is known to hold (`fabric`; a direct lane needs none).
    pub confirmed: AtomicU32,
    /// 1 after the consumer has closed this generation: a stay published later does not count.
    pub sealed: AtomicU32,
    /// Not 0 when what is sent now reaches nobody. 1: the reader's kernel socket is shut both ways, and answers with a reset;
    /// 2, on a direct lane: the application has gone, and its agent reads what still comes.
    pub closed: AtomicU32,
    /// Stream offset below which the far end's application is known to have taken everything (`fabric`; on a direct lane
    /// the tail says it). Not before the stay's start, and it may lag behind.
    pub taken: AtomicU64,
}

/// One direction of one generation of a connection.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Direction {
    /// Producer, per message.
    pub head: Head,
    /// Producer, per stay.
    pub stay: Stay,
    /// Consumer, per read.
    pub tail: Tail,
    /// Consumer, per stay.
    pub reader: Reader,
}

/// First page of a segment.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct SegmentHeader {
    /// Side 0 → side 1, then side 1 → side 0.
    pub directions: [Direction; 2],
    /// Which bells of side 0, of side 1 belong to waiters of this connection (bit n: bell n).
    pub waiters: [Waiters; 2],
}

/// A side's waiters for one connection.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Waiters {
    /// Bit n set: ring bell n.
    pub mask: AtomicU32,
}

// SAFETY: all fields are atomics of fixed size; repr(C); no pointers; any bit pattern is valid.
unsafe impl Shared for SlabHeader {}
// SAFETY: as above.
unsafe impl Shared for SegmentHeader {}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Bell>() == 64);
    assert!(size_of::<SlabHeader>() == 64 + 2 * BELLS * 64);
    assert!(size_of::<SlabHeader>() <= SLAB_HEADER_LEN);
    assert!(core::mem::offset_of!(SlabHeader, bells) == 64);
    assert!(size_of::<Direction>() == 256);
    assert!(core::mem::offset_of!(Direction, stay) == 64);
    assert!(core::mem::offset_of!(Direction, tail) == 128);
    assert!(core::mem::offset_of!(Direction, reader) == 192);
    assert!(core::mem::offset_of!(SegmentHeader, waiters) == 512);
    assert!(size_of::<SegmentHeader>() <= SEGMENT_HEADER_LEN);
};

/// Sizes of a slab, checked: what a control message announced, or what the host is about to create.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    segments: u32,
    ring_len: usize,
}

impl Geometry {
    /// A geometry with `segments` segments and rings of `ring_len` bytes, a power of two between [`RING_MIN`] and
    /// [`RING_MAX`].
    pub fn new(segments: u32, ring_len: u64) -> Option<Self> {
        let ring_len = usize::try_from(ring_len).ok()?;
        let fits = ring_len.is_power_of_two() && (RING_MIN..=RING_MAX).contains(&ring_len);
        (fits && (1..=1024).contains(&segments)).then_some(Self { segments, ring_len })
    }

    /// How many segments.
    pub fn segments(self) -> u32 {
        self.segments
    }

    /// Bytes of a ring.
    pub fn ring_len(self) -> usize {
        self.ring_len
    }

    /// Bytes of a segment.
    pub fn segment_len(self) -> usize {
        SEGMENT_HEADER_LEN + 2 * self.ring_len
    }

    /// Bytes of the whole slab.
    pub fn slab_len(self) -> usize {
        SLAB_HEADER_LEN + self.segments as usize * self.segment_len()
    }

    /// Where segment `index` begins in the slab, if it has one.
    pub fn segment_offset(self, index: u32) -> Option<usize> {
        (index < self.segments).then(|| SLAB_HEADER_LEN + index as usize * self.segment_len())
    }

    /// Where the ring of direction `from` → other begins in the slab.
    pub fn ring_offset(self, index: u32, from: crate::Side) -> Option<usize> {
        Some(self.segment_offset(index)? + SEGMENT_HEADER_LEN + from.index() * self.ring_len)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::Side;

    #[test]
    fn geometry_refuses_what_does_not_fit() {
        assert!(Geometry::new(0, 4096).is_none());
        assert!(Geometry::new(1025, 4096).is_none());
        assert!(Geometry::new(1, 2048).is_none());
        assert!(Geometry::new(1, 4097).is_none());
        assert!(Geometry::new(1, 2 << 30).is_none());
    }

    #[test]
    fn segments_stand_one_after_the_other() {
        let g = Geometry::new(2, 8192).unwrap();
        assert_eq!(g.segment_offset(0), Some(4096));
        assert_eq!(g.ring_offset(0, Side::Zero), Some(8192));
        assert_eq!(g.ring_offset(0, Side::One), Some(16384));
        assert_eq!(g.segment_offset(1), Some(4096 + 4096 + 16384));
        assert_eq!(g.segment_offset(2), None);
        assert_eq!(g.slab_len(), 4096 + 2 * (4096 + 16384));
    }
}
