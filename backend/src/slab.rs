//! Slabs: the shared memory that this host creates for its guests, or that they lend it, and the pool of their segments.
//!
//! A slab is one sealed memfd, or pages of a virtual machine's memory ([`lent`]), with a fixed set of mappers ([`SlabKey`]), because a mapping cannot be taken back: what
//! two programs once shared serves only these two again. Segments are handed out, reset and populated; they come back
//! either to be reused, after every mapper has said that it uses the generation no longer, or to be lost with the slab.

#![deny(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vsocket_channel::layout::{
    BELLS, Geometry, LAYOUT_VERSION, SEGMENT_HEADER_LEN, SLAB_HEADER_LEN, SLAB_MAGIC, SegmentHeader,
};
use vsocket_channel::reason::Reason;
use vsocket_channel::sync::Ordering;

mod bell;
mod lent;
#[allow(unsafe_code)] // its mapping
mod memory;

pub use bell::Doorbell;
pub use lent::Want;
pub use memory::{Memory, Piece, View};

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
    /// The other host that it serves.
    fn peer(&self) -> u32 {
        match self {
            Self::Direct(..) => u32::MAX,
            Self::Fabric(_, peer) => *peer,
        }
    }

    /// Whether this program is one of the mappers.
    fn has(&self, program: Program) -> bool {
        match self {
            Self::Direct(a, b) => *a == program || *b == program,
            Self::Fabric(a, _) => *a == program,
        }
    }

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

/// A slab with its descriptors.
#[derive(Debug)]
pub struct Slab {
    key: SlabKey,
    /// The memory's descriptor, for the mappers. Lent memory has none here: its guest has it.
    pub memfd: Option<Arc<OwnedFd>>,
    /// Both sides' bells.
    pub bells: [[Doorbell; BELLS]; 2],
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
        let far = match key {
            SlabKey::Direct(..) => bells()?,
            // The backend is one waiter: its four bells are one.
            SlabKey::Fabric(..) => {
                let one = Doorbell::new()?;
                [(); BELLS].map(|()| one.clone())
            }
        };
        Ok(Self::new(key, memory, Some(Arc::new(memfd)), [bells()?, far]))
    }

    fn new(key: SlabKey, memory: Memory, memfd: Option<Arc<OwnedFd>>, bells: [[Doorbell; BELLS]; 2]) -> Self {
        let (header, geometry) = (memory.header(), memory.geometry());
        header.magic.store(SLAB_MAGIC, Ordering::Relaxed);
        header.version.store(LAYOUT_VERSION, Ordering::Relaxed);
        header.segments.store(geometry.segments(), Ordering::Relaxed);
        header.ring_len.store(geometry.ring_len() as u64, Ordering::Relaxed);
        let free = (0..geometry.segments()).rev().collect();
        let memory = Arc::new(memory);
        Self { key, memfd, bells, memory, free, populated: 0, in_use: 0, retired: false }
    }

    /// Whether its memory is a guest's.
    pub fn is_lent(&self) -> bool {
        self.memfd.is_none()
    }

    /// The vport of side 0's program.
    pub fn vport(&self) -> u32 {
        match self.key {
            SlabKey::Direct(program, _) | SlabKey::Fabric(program, _) => program.0,
        }
    }

    /// Whether this backend is one of the mappers.
    pub fn is_fabric(&self) -> bool {
        matches!(self.key, SlabKey::Fabric(..))
    }

    /// Makes a segment ready for a generation.
    fn prepare(&mut self, index: u32) -> io::Result<()> {
        let geometry = self.memory.geometry();
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

fn bells() -> io::Result<[Doorbell; BELLS]> {
    let (a, b, c, d) = (Doorbell::new()?, Doorbell::new()?, Doorbell::new()?, Doorbell::new()?);
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
    /// Vports whose guests bring their own memory.
    lenders: HashMap<u32, lent::Lender>,
    last: u64,
}

/// A slab that the event loop must know of, or forget.
#[derive(Debug)]
pub enum Change {
    /// Watch its bell.
    Created(u64),
    /// Ask this vport's guest for the memory of this slab.
    Wanted(u32, u64),
    /// It is no more. Its descriptors and memory live until this value is dropped.
    Gone(u64, Box<Slab>),
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

    /// The slab that the next segment for this key is in.
    fn with_free(&self, key: SlabKey) -> Option<u64> {
        let mut known = self.by_key.get(&key).into_iter().flatten().copied().rev();
        known.find(|n| self.slabs.get(n).is_some_and(|s| !s.retired && !s.free.is_empty()))
    }

    fn take_from(&mut self, number: u64) -> io::Result<SegmentId> {
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
        self.insert(self.last, slab);
        Ok(self.last)
    }

    fn insert(&mut self, number: u64, slab: Slab) {
        self.by_key.entry(slab.key).or_default().push(number);
        self.slabs.insert(number, slab);
        self.idle.push_back(number);
        self.changes.push(Change::Created(number));
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
        self.retire_all(|key| key.names(vport));
    }

    /// A program has ended: nothing that it maps is handed out again.
    pub fn retire_program(&mut self, program: Program) {
        self.forget_wants(program);
        self.retire_all(|key| key.has(program));
    }

    fn retire_all(&mut self, of: impl Fn(&SlabKey) -> bool) {
        let mut empty = Vec::new();
        for (number, slab) in &mut self.slabs {
            if of(&slab.key) {
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
        if slab.is_lent() {
            self.returned(slab.vport());
        }
        self.changes.push(Change::Gone(number, Box::new(slab)));
    }
}

impl Segments for Pool {
    fn take(&mut self, key: SlabKey, ring_len: u64) -> Taken {
        let number = match (self.with_free(key), self.lender_of(key)) {
            (Some(number), _) => Ok(number),
            (None, Some(vport)) => return self.ask(vport, key, ring_len),
            (None, None) => self.create(key, ring_len),
        };
        match number.and_then(|number| self.take_from(number)) {
            Ok(id) => Taken::Segment(id),
            Err(error) => {
                tracing::warn!(%error, "no memory for a segment");
                Taken::Nothing(Reason::Quota)
            }
        }
    }

    fn look(&mut self, key: SlabKey, ring_len: u64) -> bool {
        match self.lender_of(key).filter(|_| self.with_free(key).is_none()) {
            // Who has none at all is offered as well, and declined when it comes to it.
            Some(vport) => self.ask(vport, key, ring_len) != Taken::Coming,
            None => true,
        }
    }
}

const _: () = assert!(SEGMENTS <= u64::BITS && SEGMENT_HEADER_LEN >= size_of::<SegmentHeader>());

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{SealFlags, fcntl_get_seals, ftruncate};
    use vsocket_channel::Side;

    const KEY: SlabKey = SlabKey::Direct((0, 1), (1, 1));

    #[test]
    fn a_slab_is_sealed_and_describes_itself() {
        let mut pool = Pool::default();
        let id = pool.take(KEY, 4096).segment().unwrap();
        let slab = pool.slab(id.slab).unwrap();
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        assert_eq!(fcntl_get_seals(slab.memfd.as_ref().unwrap()).unwrap(), seals);
        assert!(ftruncate(slab.memfd.as_ref().unwrap(), 0).is_err());
        assert_eq!(slab.memory.header().magic.load(Ordering::Relaxed), SLAB_MAGIC);
        assert_eq!(slab.memory.header().segments.load(Ordering::Relaxed), SEGMENTS);
    }

    #[test]
    fn two_mappings_see_the_same_ring() {
        let mut pool = Pool::default();
        let id = pool.take(KEY, 4096).segment().unwrap();
        let slab = pool.slab(id.slab).unwrap();
        let other = Memory::map(slab.memfd.as_ref().unwrap(), slab.memory.geometry()).unwrap();
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

    #[test]
    fn the_slabs_of_a_program_that_has_ended_go_and_no_others() {
        let mut pool = Pool::default();
        let its = [KEY, SlabKey::Direct((2, 9), (0, 1)), SlabKey::Fabric((0, 1), 0)];
        let others =
            [SlabKey::Direct((0, 2), (1, 1)), SlabKey::Direct((1, 1), (2, 1)), SlabKey::Fabric((1, 1), 0)];
        for key in its.into_iter().chain(others) {
            let id = pool.take(key, 4096).segment().unwrap();
            pool.give_back(id, true);
        }
        let used = pool.take(KEY, 4096).segment().unwrap();
        pool.retire_program((0, 1));
        assert_eq!(pool.len(), others.len() + 1);
        let late = pool.take(KEY, 4096).segment().unwrap();
        assert_ne!(late.slab, used.slab);
        pool.give_back(used, true);
        assert!(pool.slab(used.slab).is_none() && pool.slab(late.slab).is_some());
    }
}
