//! Slabs: the shared memory that this host creates for its guests, and the pool of their segments.
//!
//! A slab is one sealed memfd with a fixed set of mappers ([`SlabKey`]), because a mapping cannot be taken back: what
//! two programs once shared serves only these two again. Segments are handed out, reset and populated; they come back
//! either to be reused, after every mapper has said that it uses the generation no longer, or to be lost with the slab.
//!
//! All of this module's unsafe code is mapping memory and laying the contract's types over it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use vsocket_channel::Side;
use vsocket_channel::layout::{
    BELLS, Geometry, LAYOUT_VERSION, SEGMENT_HEADER_LEN, SLAB_HEADER_LEN, SLAB_MAGIC, SegmentHeader,
    SlabHeader,
};
use vsocket_channel::reason::Reason;
use vsocket_channel::ring::Bytes;
use vsocket_channel::sync::Ordering;

use crate::fabric::Region;

/// Segments of one slab.
pub const SEGMENTS: u32 = 16;
/// Slabs that are kept although none of their segments is in use.
const IDLE: usize = 8;

/// A program of a guest: the vport's number, and the agent's number for the program.
pub type Program = (u32, u64);

/// Who maps a slab.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SlabKey {
    /// Two programs on this host, side 0 first.
    Direct(Program, Program),
    /// A program (side 0) and this backend (side 1), for connections to one other host, or to guests of this one
    /// ([`RELAY`](crate::relay::RELAY)).
    Fabric(Program, u32),
}

impl SlabKey {
    fn names(&self, vport: u32) -> bool {
        match self {
            Self::Direct(a, b) => a.0 == vport || b.0 == vport,
            Self::Fabric(program, _) => program.0 == vport,
        }
    }
}

/// A segment of a slab.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SegmentId {
    /// The slab's number.
    pub slab: u64,
    /// Its index in the slab.
    pub index: u32,
}

/// A mapped slab. Guests write to it at any time, so nothing here gives a reference to anything but atomics.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    geometry: Geometry,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is reached only through atomics and the raw copies of
// `Bytes` and `Region`.
unsafe impl Send for Memory {}
// SAFETY: as for Send.
unsafe impl Sync for Memory {}

impl Memory {
    /// Makes the memory of a slab, whose size nobody can change.
    ///
    /// # Errors
    ///
    /// What the system does not give.
    pub fn create(geometry: Geometry) -> io::Result<(OwnedFd, Self)> {
        let memfd = memfd_create(c"vsocket-slab", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memfd, geometry.slab_len() as u64)?;
        fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let memory = Self::map(&memfd, geometry)?;
        Ok((memfd, memory))
    }

    /// Maps a slab of this geometry.
    ///
    /// # Errors
    ///
    /// What `mmap` says.
    pub fn map(memfd: impl AsFd, geometry: Geometry) -> io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that Rust knows.
        let base = unsafe { mmap(std::ptr::null_mut(), geometry.slab_len(), protection, flags, memfd, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, geometry })
    }

    /// The slab's first page.
    pub fn header(&self) -> &SlabHeader {
        // SAFETY: the mapping begins page-aligned, is longer than the header, and lives as long as `self`; the header is
        // `Shared`: atomics only, any bit pattern valid.
        unsafe { self.base.cast().as_ref() }
    }

    /// The slab's sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The header of a segment.
    pub fn segment(&self, index: u32) -> Option<&SegmentHeader> {
        let at = self.geometry.segment_offset(index)?;
        // SAFETY: `at` is a multiple of a page inside the mapping, which is long enough for the whole segment; otherwise
        // as for `header`.
        Some(unsafe { self.base.add(at).cast().as_ref() })
    }

    /// The ring of the direction that begins at `from`. It is valid as long as `self`.
    pub fn ring(&self, index: u32, from: Side) -> Option<Bytes> {
        let at = self.geometry.ring_offset(index, from)?;
        // SAFETY: offset and length are the geometry's, so inside the mapping; the length is a power of two. The caller
        // keeps `self` beside the ring, as documented (`View` does).
        Some(unsafe { Bytes::new(self.base.as_ptr().add(at), self.geometry.ring_len()) })
    }

    /// The whole slab as a region for a fabric, which keeps it mapped.
    pub fn region(self: &Arc<Self>) -> Region {
        // SAFETY: the mapping is as long as the geometry says, readable and writable, and is unmapped when the last Arc,
        // of which the region holds one, goes; it is sealed against shrinking; this process holds references only to
        // the atomics of the headers.
        unsafe { Region::new(self.base, self.geometry.slab_len(), self.clone()) }
    }

    /// Takes the pages of `len` bytes at `at` from the system now, not at the first access.
    ///
    /// # Errors
    ///
    /// If there are none.
    pub(crate) fn populate(&self, at: usize, len: usize) -> io::Result<()> {
        debug_assert!(at + len <= self.geometry.slab_len());
        let from = self.base.as_ptr().wrapping_add(at).cast();
        // SAFETY: the range lies in our mapping (callers pass the geometry's offsets), and populating changes no byte.
        match unsafe { madvise(from, len, Advice::LinuxPopulateWrite) } {
            // A kernel before 5.14 cannot; the pages then come at the first access.
            Err(Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: base and length are those of `map`; references and rings borrow from or stand beside an Arc of self.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.geometry.slab_len()) };
    }
}

/// One segment, with the mapping it lies in.
#[derive(Clone, Debug)]
pub struct View {
    memory: Arc<Memory>,
    index: u32,
    /// The ring of direction 0 → 1, and of 1 → 0.
    pub rings: [Bytes; 2],
}

impl View {
    /// The segment `index` of `memory`, if it has one.
    pub fn new(memory: &Arc<Memory>, index: u32) -> Option<Self> {
        let rings = [memory.ring(index, Side::Zero)?, memory.ring(index, Side::One)?];
        Some(Self { memory: memory.clone(), index, rings })
    }

    /// The segment's header.
    pub fn header(&self) -> &SegmentHeader {
        self.memory.segment(self.index).expect("`new` has checked the index")
    }

    /// The slab's header, with the bells.
    pub fn slab(&self) -> &SlabHeader {
        self.memory.header()
    }

    /// Where the ring of the direction that begins at `from` is in the slab.
    pub fn ring_offset(&self, from: Side) -> usize {
        self.memory.geometry.ring_offset(self.index, from).expect("`new` has checked the index")
    }
}

/// A slab with its descriptors.
#[derive(Debug)]
pub struct Slab {
    key: SlabKey,
    /// The memory's descriptor, for the mappers.
    pub memfd: Arc<OwnedFd>,
    /// The eventfds of both sides' bells.
    pub bells: [[Arc<OwnedFd>; BELLS]; 2],
    /// Our own mapping.
    pub memory: Arc<Memory>,
    free: Vec<u32>,
    /// Bit n: segment n has its pages.
    populated: u64,
    in_use: u32,
    /// A mapper has died in a way that leaves unknown who still writes: nothing is handed out any more.
    retired: bool,
}

impl Slab {
    fn create(key: SlabKey, geometry: Geometry) -> io::Result<Self> {
        let (memfd, memory) = Memory::create(geometry)?;
        memory.populate(0, SLAB_HEADER_LEN)?;
        let header = memory.header();
        header.magic.store(SLAB_MAGIC, Ordering::Relaxed);
        header.version.store(LAYOUT_VERSION, Ordering::Relaxed);
        header.segments.store(geometry.segments(), Ordering::Relaxed);
        header.ring_len.store(geometry.ring_len() as u64, Ordering::Relaxed);
        let far = match key {
            SlabKey::Direct(..) => bells()?,
            // The backend is one waiter: its four bells are one.
            SlabKey::Fabric(..) => {
                let one = bell()?;
                [(); BELLS].map(|()| one.clone())
            }
        };
        Ok(Self {
            key,
            memfd: Arc::new(memfd),
            bells: [bells()?, far],
            memory: Arc::new(memory),
            free: (0..geometry.segments()).rev().collect(),
            populated: 0,
            in_use: 0,
            retired: false,
        })
    }

    /// Whether this backend is one of the mappers.
    pub fn is_fabric(&self) -> bool {
        matches!(self.key, SlabKey::Fabric(..))
    }

    /// Makes a segment ready for a generation.
    fn prepare(&mut self, index: u32) -> io::Result<()> {
        let geometry = self.memory.geometry;
        let at = geometry.segment_offset(index).ok_or(io::ErrorKind::InvalidInput)?;
        if self.populated & 1 << index == 0 {
            self.memory.populate(at, geometry.segment_len())?;
            self.populated |= 1 << index;
        }
        let header = self.memory.segment(index).ok_or(io::ErrorKind::InvalidInput)?;
        header.directions.iter().for_each(vsocket_channel::layout::Direction::reset);
        let backend_waits = self.is_fabric();
        header.waiters[0].mask.store(0, Ordering::Relaxed);
        header.waiters[1].mask.store(u32::from(backend_waits), Ordering::Release);
        Ok(())
    }
}

/// The eventfd of a bell.
pub(crate) fn bell() -> io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
}

fn bells() -> io::Result<[Arc<OwnedFd>; BELLS]> {
    let (a, b, c, d) = (bell()?, bell()?, bell()?, bell()?);
    Ok([a, b, c, d])
}

/// What there is for one who wants a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taken {
    /// A segment, ready for a generation.
    Segment(SegmentId),
    /// Nothing yet: the guest was asked for memory, and `Pairing::handle_memory` tells when there is news of it.
    Coming,
    /// Nothing, and why.
    Nothing(Reason),
}

impl Taken {
    /// The segment, if there is one.
    pub fn segment(self) -> Option<SegmentId> {
        match self {
            Self::Segment(id) => Some(id),
            Self::Coming | Self::Nothing(_) => None,
        }
    }
}

/// Who gives segments to the pairing: the pool, or a test.
pub trait Segments {
    /// A segment ready for a generation. A new slab has rings of `ring_len` bytes.
    fn take(&mut self, key: SlabKey, ring_len: u64) -> Taken;
    /// Whether [`take`](Self::take) would have one now; if that is a matter of time only, it is asked for.
    fn look(&mut self, key: SlabKey, ring_len: u64) -> bool;
}

/// All slabs of this host.
#[derive(Debug, Default)]
pub struct Pool {
    slabs: HashMap<u64, Slab>,
    by_key: HashMap<SlabKey, Vec<u64>>,
    /// Slabs without a segment in use, the longest idle first.
    idle: VecDeque<u64>,
    /// Slabs that have come or gone since the daemon last asked.
    changes: Vec<Change>,
    last: u64,
}

/// A slab that the event loop must know of, or forget.
#[derive(Debug)]
pub enum Change {
    /// Watch its bell.
    Created(u64),
    /// It is no more. Its descriptors and memory live until this value is dropped.
    Gone(u64, Slab),
}

impl Pool {
    /// The slab with this number.
    pub fn slab(&self, number: u64) -> Option<&Slab> {
        self.slabs.get(&number)
    }

    /// A segment's view.
    pub fn view(&self, id: SegmentId) -> Option<View> {
        View::new(&self.slabs.get(&id.slab)?.memory, id.index)
    }

    /// How many slabs there are.
    pub fn len(&self) -> usize {
        self.slabs.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.slabs.is_empty()
    }

    /// What came and went.
    pub fn changes(&mut self) -> std::vec::Drain<'_, Change> {
        self.changes.drain(..)
    }

    fn try_take(&mut self, key: SlabKey, ring_len: u64) -> io::Result<SegmentId> {
        let known = self.by_key.get(&key).into_iter().flatten().copied();
        let slab = known.rev().find(|n| self.slabs.get(n).is_some_and(|s| !s.retired && !s.free.is_empty()));
        let number = match slab {
            Some(number) => number,
            None => self.create(key, ring_len)?,
        };
        let slab = self.slabs.get_mut(&number).ok_or(io::ErrorKind::NotFound)?;
        let index = *slab.free.last().ok_or(io::ErrorKind::OutOfMemory)?;
        slab.prepare(index)?;
        slab.free.pop();
        slab.in_use += 1;
        if slab.in_use == 1 {
            self.idle.retain(|n| *n != number);
        }
        Ok(SegmentId { slab: number, index })
    }

    fn create(&mut self, key: SlabKey, ring_len: u64) -> io::Result<u64> {
        let geometry = Geometry::new(SEGMENTS, ring_len).ok_or(io::ErrorKind::InvalidInput)?;
        let slab = Slab::create(key, geometry)?;
        self.last += 1;
        self.slabs.insert(self.last, slab);
        self.by_key.entry(key).or_default().push(self.last);
        self.idle.push_back(self.last);
        self.changes.push(Change::Created(self.last));
        Ok(self.last)
    }

    /// Takes a segment back. Without `reuse` it is lost: someone may write to it still.
    pub fn give_back(&mut self, id: SegmentId, reuse: bool) {
        let Some(slab) = self.slabs.get_mut(&id.slab) else { return };
        slab.in_use -= 1;
        if reuse {
            slab.free.push(id.index);
        }
        if slab.in_use > 0 {
            return;
        }
        if slab.retired || slab.free.is_empty() {
            self.remove(id.slab);
        } else {
            self.idle.push_back(id.slab);
            if self.idle.len() > IDLE
                && let Some(oldest) = self.idle.pop_front()
            {
                self.remove(oldest);
            }
        }
    }

    /// The agent of a vport has gone: nothing that its programs map is handed out again.
    pub fn retire(&mut self, vport: u32) {
        let mut empty = Vec::new();
        for (number, slab) in &mut self.slabs {
            if slab.key.names(vport) {
                slab.retired = true;
                if slab.in_use == 0 {
                    empty.push(*number);
                }
            }
        }
        for number in empty {
            self.remove(number);
        }
    }

    fn remove(&mut self, number: u64) {
        self.idle.retain(|n| *n != number);
        let Some(slab) = self.slabs.remove(&number) else { return };
        if let Some(numbers) = self.by_key.get_mut(&slab.key) {
            numbers.retain(|n| *n != number);
            if numbers.is_empty() {
                self.by_key.remove(&slab.key);
            }
        }
        self.changes.push(Change::Gone(number, slab));
    }
}

impl Segments for Pool {
    fn take(&mut self, key: SlabKey, ring_len: u64) -> Taken {
        match self.try_take(key, ring_len) {
            Ok(id) => Taken::Segment(id),
            Err(error) => {
                tracing::warn!(%error, "no memory for a segment");
                Taken::Nothing(Reason::Quota)
            }
        }
    }

    fn look(&mut self, _key: SlabKey, _ring_len: u64) -> bool {
        true
    }
}

const _: () = assert!(SEGMENTS <= u64::BITS && SEGMENT_HEADER_LEN >= size_of::<SegmentHeader>());

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fcntl_get_seals;

    const KEY: SlabKey = SlabKey::Direct((0, 1), (1, 1));

    #[test]
    fn a_slab_is_sealed_and_describes_itself() {
        let mut pool = Pool::default();
        let id = pool.take(KEY, 4096).segment().unwrap();
        let slab = pool.slab(id.slab).unwrap();
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        assert_eq!(fcntl_get_seals(&slab.memfd).unwrap(), seals);
        assert!(ftruncate(&slab.memfd, 0).is_err());
        assert_eq!(slab.memory.header().magic.load(Ordering::Relaxed), SLAB_MAGIC);
        assert_eq!(slab.memory.header().segments.load(Ordering::Relaxed), SEGMENTS);
    }

    #[test]
    fn two_mappings_see_the_same_ring() {
        let mut pool = Pool::default();
        let id = pool.take(KEY, 4096).segment().unwrap();
        let slab = pool.slab(id.slab).unwrap();
        let other = Memory::map(&slab.memfd, slab.memory.geometry()).unwrap();
        pool.view(id).unwrap().rings[1].put(4090, b"wraps around");
        let mut got = [0; 12];
        other.ring(id.index, Side::One).unwrap().get(4090, &mut got);
        assert_eq!(&got, b"wraps around");
    }

    #[test]
    fn a_segment_comes_back_reset_and_a_lost_one_never() {
        let mut pool = Pool::default();
        let id = pool.take(KEY, 4096).segment().unwrap();
        pool.view(id).unwrap().header().directions[0].stay.sealed.store(1, Ordering::Relaxed);
        pool.give_back(id, true);
        assert_eq!(pool.take(KEY, 4096), Taken::Segment(id));
        assert_eq!(pool.view(id).unwrap().header().directions[0].stay.sealed.load(Ordering::Relaxed), 0);
        let held = pool.take(KEY, 4096).segment().unwrap();
        pool.give_back(id, false);
        for _ in 0..2 * SEGMENTS {
            assert_ne!(pool.take(KEY, 4096), Taken::Segment(id));
        }
        assert_ne!(held, id);
    }

    #[test]
    fn other_mappers_get_another_slab() {
        let mut pool = Pool::default();
        let a = pool.take(KEY, 4096).segment().unwrap();
        let b = pool.take(SlabKey::Direct((0, 1), (1, 2)), 4096).segment().unwrap();
        let c = pool.take(SlabKey::Fabric((0, 1), 0), 4096).segment().unwrap();
        assert!(a.slab != b.slab && b.slab != c.slab);
        let waits = |id| pool.view(id).unwrap().header().waiters[1].mask.load(Ordering::Relaxed);
        assert_eq!((waits(a), waits(c)), (0, 1));
    }

    #[test]
    fn idle_slabs_are_few_and_the_retired_go_at_once() {
        let mut pool = Pool::default();
        for program in 0..2 * IDLE as u64 {
            let id = pool.take(SlabKey::Direct((0, program), (1, 1)), 4096).segment().unwrap();
            pool.give_back(id, true);
        }
        assert_eq!(pool.len(), IDLE);
        let used = pool.take(SlabKey::Direct((0, 1), (2, 1)), 4096).segment().unwrap();
        pool.retire(1);
        assert_eq!(pool.len(), 1);
        pool.retire(2);
        assert_eq!(pool.len(), 1);
        pool.give_back(used, true);
        assert!(pool.is_empty());
        assert!(pool.changes().any(|c| matches!(c, Change::Gone(n, _) if n == used.slab)));
    }
}
