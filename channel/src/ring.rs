//! The byte ring: one producer, one consumer, indices that are stream offsets.
//!
//! The producer owns `head`, the consumer `tail`. Each end keeps its own index privately and trusts only the copy it
//! has checked of the other's: `tail ≤ head ≤ tail + size`, in wrapping arithmetic. An index that fails is an error
//! of its own, which ends that connection and nothing else.

use crate::layout::Direction;
use crate::sync::Ordering;

/// The other side wrote an index that cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadIndex {
    /// What was read from shared memory.
    pub found: u64,
    /// This side's own index.
    pub own: u64,
}

impl core::fmt::Display for BadIndex {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "ring index {} cannot be, with ours at {}", self.found, self.own)
    }
}

impl core::error::Error for BadIndex {}

/// The bytes of a ring: shared memory that the other side may write at any time, so it is only ever copied.
#[derive(Clone, Debug)]
pub struct Bytes {
    #[cfg(not(loom))]
    base: *mut u8,
    #[cfg(loom)]
    cells: std::sync::Arc<Vec<loom::cell::UnsafeCell<u8>>>,
    mask: u64,
}

/// Long copies are made in pieces of this size. For long ones the C library chooses `rep movsb` where the processor says that it
/// is fast. An emulated one says so too, and takes it byte by byte, at a quarter of the speed; on a real one the pieces make no
/// difference.
#[cfg(not(loom))]
const PIECE: usize = 2048;

/// Copies `len` bytes.
///
/// # Safety
///
/// As for `copy_nonoverlapping`.
#[cfg(not(loom))]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    let mut done = 0;
    while len - done >= 2 * PIECE {
        // SAFETY: `done + PIECE ≤ len`, and the caller vouches for all of `len`.
        unsafe { core::ptr::copy_nonoverlapping(from.add(done), to.add(done), PIECE) };
        done += PIECE;
        // Or the compiler makes one long copy of the pieces again.
        core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
    }
    // SAFETY: as above.
    unsafe { core::ptr::copy_nonoverlapping(from.add(done), to.add(done), len - done) };
}

// SAFETY: the pointer names shared memory that any thread may copy from and to; which part belongs to whom is decided by
// the indices, and a violation by the other side garbles only bytes that it may garble anyway.
#[cfg(not(loom))]
unsafe impl Send for Bytes {}
// SAFETY: as for Send.
#[cfg(not(loom))]
unsafe impl Sync for Bytes {}

#[cfg(not(loom))]
impl Bytes {
    /// The ring of `len` bytes at `base`.
    ///
    /// # Safety
    ///
    /// `base` points to `len` readable and writable bytes for as long as the value or a clone of it lives; `len` is a
    /// power of two.
    pub unsafe fn new(base: *mut u8, len: usize) -> Self {
        debug_assert!(len.is_power_of_two());
        Self { base, mask: len as u64 - 1 }
    }

    /// The longest piece that begins at stream offset `at` and does not wrap, at most `len` bytes: its place in the ring
    /// and its length. For gather lists (`writev`, RDMA).
    pub fn piece(&self, at: u64, len: usize) -> (usize, usize) {
        let from = (at & self.mask) as usize;
        (from, len.min(self.len() - from))
    }

    /// The address of a place that [`Bytes::piece`] named.
    pub fn address(&self, place: usize) -> *mut u8 {
        debug_assert!(place as u64 <= self.mask);
        self.base.wrapping_add(place)
    }

    /// Copies `src` to the ring at stream offset `at`. `src` is at most as long as the ring.
    pub fn put(&self, at: u64, src: &[u8]) {
        let (from, first) = self.piece(at, src.len());
        // SAFETY: `from + first ≤ len` by `piece`, and the rest fits before `from` as src is at most the ring's length;
        // the source is private memory, so the two do not overlap.
        unsafe {
            copy(src.as_ptr(), self.base.add(from), first);
            copy(src.as_ptr().add(first), self.base, src.len() - first);
        }
    }

    /// Copies the ring's bytes at stream offset `at` to `dst`, which is at most as long as the ring.
    pub fn get(&self, at: u64, dst: &mut [u8]) {
        let (from, first) = self.piece(at, dst.len());
        // SAFETY: as in `put`, with source and destination exchanged.
        unsafe {
            copy(self.base.add(from), dst.as_mut_ptr(), first);
            copy(self.base, dst.as_mut_ptr().add(first), dst.len() - first);
        }
    }

    /// Copies the `len` bytes at stream offset `at` of another ring to the same offset of this one, with nothing between.
    /// `len` is at most the length of the shorter ring.
    pub fn copy(&self, from: &Self, at: u64, len: usize) {
        debug_assert!(len <= self.len().min(from.len()));
        let mut done = 0;
        while done < len {
            let at = at.wrapping_add(done as u64);
            let (source, piece) = from.piece(at, len - done);
            let (target, piece) = self.piece(at, piece);
            // SAFETY: by `piece` both pieces lie in their rings. They may overlap: whoever gave us the memory of two rings
            // may have given the same twice, and garbles nothing but its own bytes.
            unsafe { core::ptr::copy(from.base.add(source), self.base.add(target), piece) };
            done += piece;
        }
    }
}

#[cfg(loom)]
impl Bytes {
    fn for_loom(len: usize) -> Self {
        let cells = (0..len).map(|_| loom::cell::UnsafeCell::new(0)).collect();
        Self { cells: std::sync::Arc::new(cells), mask: len as u64 - 1 }
    }

    /// Copies `src` to the ring at stream offset `at`.
    pub fn put(&self, at: u64, src: &[u8]) {
        for (i, byte) in src.iter().enumerate() {
            // SAFETY: loom checks that no other thread touches the cell meanwhile.
            self.cells[((at + i as u64) & self.mask) as usize].with_mut(|p| unsafe { *p = *byte });
        }
    }

    /// Copies the ring's bytes at stream offset `at` to `dst`.
    pub fn get(&self, at: u64, dst: &mut [u8]) {
        for (i, byte) in dst.iter_mut().enumerate() {
            // SAFETY: loom checks that no other thread writes the cell meanwhile.
            *byte = self.cells[((at + i as u64) & self.mask) as usize].with(|p| unsafe { *p });
        }
    }
}

impl Bytes {
    /// Bytes of the ring.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.mask as usize + 1
    }
}

/// One direction's ring as one end sees it.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// The shared indices.
    pub indices: &'a Direction,
    /// The shared bytes.
    pub bytes: &'a Bytes,
}

impl Ring<'_> {
    /// Producer: bytes that may be written now, with `head` the producer's own index.
    ///
    /// # Errors
    ///
    /// [`BadIndex`] if the consumer's index lies outside what was produced.
    pub fn space(&self, head: u64) -> Result<usize, BadIndex> {
        // Acquire: pairs with the consumer's Release in `release`, so that its reads of the space are over.
        let tail = self.indices.tail.tail.load(Ordering::Acquire);
        let used = head.wrapping_sub(tail);
        if used > self.bytes.len() as u64 {
            return Err(BadIndex { found: tail, own: head });
        }
        Ok(self.bytes.len() - used as usize)
    }

    /// Producer: publishes everything below `head`, which was copied in with [`Bytes::put`].
    pub fn publish(&self, head: u64) {
        // Release: the bytes become visible before the index. Pairs with the Acquire in `available`.
        self.indices.head.head.store(head, Ordering::Release);
    }

    /// Consumer: bytes that may be read now, with `tail` the consumer's own index.
    ///
    /// # Errors
    ///
    /// [`BadIndex`] if the producer's index lies outside the ring's window.
    pub fn available(&self, tail: u64) -> Result<usize, BadIndex> {
        // Acquire: pairs with the producer's Release in `publish`.
        let head = self.indices.head.head.load(Ordering::Acquire);
        let ready = head.wrapping_sub(tail);
        if ready > self.bytes.len() as u64 {
            return Err(BadIndex { found: head, own: tail });
        }
        Ok(ready as usize)
    }

    /// Consumer: gives everything below `tail` back to the producer.
    pub fn release(&self, tail: u64) {
        // Release: the reads are over before the space is free. Pairs with the Acquire in `space`.
        self.indices.tail.tail.store(tail, Ordering::Release);
    }
}

impl Direction {
    /// Host: makes the direction ready for a new generation.
    pub fn reset(&self) {
        for word in [
            &self.stay.generation,
            &self.stay.escape,
            &self.stay.sealed,
            &self.stay.want_space,
            &self.stay.aborted,
            &self.reader.confirmed,
            &self.reader.sealed,
            &self.reader.closed,
        ] {
            word.store(0, Ordering::Relaxed);
        }
        self.stay.start.store(0, Ordering::Relaxed);
        self.tail.tail.store(0, Ordering::Relaxed);
        self.head.head.store(0, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// A ring in private memory, both ends in one place.
    struct Both {
        direction: Direction,
        bytes: Bytes,
        memory: *mut [u8],
    }

    impl Both {
        fn new(len: usize, start: u64) -> Self {
            let memory = Box::into_raw(vec![0u8; len].into_boxed_slice());
            // SAFETY: the allocation lives until `drop`, and `len` is a power of two in every test.
            let bytes = unsafe { Bytes::new(memory.cast::<u8>(), len) };
            // SAFETY: a Direction is atomics only, for which zero is valid.
            let direction: Direction = unsafe { core::mem::zeroed() };
            direction.head.head.store(start, Ordering::Relaxed);
            direction.tail.tail.store(start, Ordering::Relaxed);
            Self { direction, bytes, memory }
        }

        fn ring(&self) -> Ring<'_> {
            Ring { indices: &self.direction, bytes: &self.bytes }
        }
    }

    impl Drop for Both {
        fn drop(&mut self) {
            // SAFETY: made by Box::into_raw in `new`, and freed once.
            drop(unsafe { Box::from_raw(self.memory) });
        }
    }

    proptest! {
        #[test]
        fn a_ring_is_a_queue(start in prop_oneof![Just(0u64), Just(u64::MAX - 20), any::<u64>()],
                             calls in prop::collection::vec((any::<bool>(), 0usize..24), 1..200)) {
            let both = Both::new(16, start);
            let ring = both.ring();
            let (mut head, mut tail, mut next) = (start, start, 0u8);
            let mut model = VecDeque::new();
            for (produce, want) in calls {
                if produce {
                    let n = want.min(ring.space(head).unwrap());
                    prop_assert_eq!(ring.space(head).unwrap(), 16 - model.len());
                    let bytes: Vec<u8> = (0..n).map(|_| { next = next.wrapping_add(1); next }).collect();
                    both.bytes.put(head, &bytes);
                    head = head.wrapping_add(n as u64);
                    ring.publish(head);
                    model.extend(bytes);
                } else {
                    prop_assert_eq!(ring.available(tail).unwrap(), model.len());
                    let mut got = vec![0; want.min(model.len())];
                    both.bytes.get(tail, &mut got);
                    tail = tail.wrapping_add(got.len() as u64);
                    ring.release(tail);
                    prop_assert_eq!(got.clone(), model.drain(..got.len()).collect::<Vec<_>>());
                }
            }
        }

        #[test]
        fn a_bad_index_is_an_error(own in any::<u64>(), found in any::<u64>()) {
            let both = Both::new(16, own);
            both.direction.head.head.store(found, Ordering::Relaxed);
            prop_assert_eq!(both.ring().available(own).is_ok(), found.wrapping_sub(own) <= 16);
            both.direction.tail.tail.store(found, Ordering::Relaxed);
            prop_assert_eq!(both.ring().space(own).is_ok(), own.wrapping_sub(found) <= 16);
        }
    }

    #[test]
    fn bytes_go_from_ring_to_ring_at_their_offset() {
        for (from_len, to_len) in [(16, 32), (32, 16), (16, 16)] {
            for at in [0, 9, 13, 31, u64::MAX - 4] {
                let (from, to) = (Both::new(from_len, 0), Both::new(to_len, 0));
                let (sent, mut got) = (*b"0123456789abcdef", [0; 16]);
                from.bytes.put(at, &sent);
                to.bytes.copy(&from.bytes, at, 16);
                to.bytes.get(at, &mut got);
                assert_eq!(got, sent, "{from_len} {to_len} {at}");
            }
        }
    }

    #[test]
    fn two_threads_pass_a_megabyte_in_order() {
        let both = Both::new(64, u64::MAX - 1000);
        let total = 1u64 << 20;
        std::thread::scope(|s| {
            let ring = both.ring();
            s.spawn(move || {
                let (mut head, mut sent) = (u64::MAX - 1000, 0u64);
                while sent < total {
                    let n = (ring.space(head).unwrap() as u64).min(total - sent).min(13);
                    let piece: Vec<u8> = (sent..sent + n).map(|i| (i % 251) as u8).collect();
                    ring.bytes.put(head, &piece);
                    head = head.wrapping_add(n);
                    sent += n;
                    ring.publish(head);
                    if n == 0 {
                        std::thread::yield_now();
                    }
                }
            });
            let (mut tail, mut seen) = (u64::MAX - 1000, 0u64);
            while seen < total {
                let mut piece = vec![0; ring.available(tail).unwrap()];
                ring.bytes.get(tail, &mut piece);
                for byte in &piece {
                    assert_eq!(*byte, (seen % 251) as u8);
                    seen += 1;
                }
                tail = tail.wrapping_add(piece.len() as u64);
                ring.release(tail);
                if piece.is_empty() {
                    std::thread::yield_now();
                }
            }
        });
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::bell;
    use crate::layout::{Bell, Head, Reader, Stay, Tail};
    use crate::sync::{AtomicU32, AtomicU64};
    use loom::sync::Arc;
    use loom::thread;

    fn direction() -> Direction {
        let w = || AtomicU32::new(0);
        Direction {
            head: Head { head: AtomicU64::new(0) },
            stay: Stay {
                generation: w(),
                escape: w(),
                start: AtomicU64::new(0),
                sealed: w(),
                want_space: w(),
                aborted: w(),
            },
            tail: Tail { tail: AtomicU64::new(0) },
            reader: Reader { confirmed: w(), sealed: w(), closed: w(), taken: AtomicU64::new(0) },
        }
    }

    /// Three bytes through a ring of two: each arrives once, in order, and loom sees no two threads in one cell.
    #[test]
    fn loom_bytes_arrive_in_order() {
        loom::model(|| {
            let direction = Arc::new(direction());
            let bytes = Bytes::for_loom(2);
            let (d, b) = (direction.clone(), bytes.clone());
            let producer = thread::spawn(move || {
                let ring = Ring { indices: &d, bytes: &b };
                let mut head = 0;
                while head < 3 {
                    if ring.space(head).unwrap() > 0 {
                        b.put(head, &[head as u8 + 1]);
                        head += 1;
                        ring.publish(head);
                    } else {
                        thread::yield_now();
                    }
                }
            });
            let ring = Ring { indices: &direction, bytes: &bytes };
            let mut tail = 0;
            while tail < 3 {
                if ring.available(tail).unwrap() > 0 {
                    let mut byte = [0];
                    bytes.get(tail, &mut byte);
                    assert_eq!(u64::from(byte[0]), tail + 1);
                    tail += 1;
                    ring.release(tail);
                } else {
                    thread::yield_now();
                }
            }
            producer.join().unwrap();
        });
    }

    /// A waiter that announces, looks and then sleeps is woken or has seen the byte, in every interleaving.
    #[test]
    fn loom_no_wake_up_is_lost() {
        loom::model(|| {
            let direction = Arc::new(direction());
            let bytes = Bytes::for_loom(2);
            let bell = Arc::new(Bell { sleeping: AtomicU32::new(0), cpu: AtomicU32::new(0) });
            let eventfd = Arc::new(AtomicU32::new(0));
            let (d, b, r, e) = (direction.clone(), bytes.clone(), bell.clone(), eventfd.clone());
            let producer = thread::spawn(move || {
                let ring = Ring { indices: &d, bytes: &b };
                b.put(0, &[7]);
                ring.publish(1);
                bell::publish_fence();
                if r.take() {
                    e.fetch_add(1, Ordering::SeqCst);
                }
            });
            bell.announce();
            let saw = Ring { indices: &direction, bytes: &bytes }.available(0).unwrap() > 0;
            producer.join().unwrap();
            // Had it slept without having seen the byte, only the eventfd could have woken it.
            assert!(saw || eventfd.load(Ordering::SeqCst) == 1);
        });
    }
}
