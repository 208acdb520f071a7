//! One connection's bytes between two guests of this host that share no memory, for one generation. Sans-IO: all it does
//! is done by [`Relay::pump`].
//!
//! Each guest has a segment of its own, in which it is side 0 and this backend side 1, as on a lane to another host: a
//! guest cannot tell the two apart. What one publishes in its direction 0 appears in the other's direction 1, copied once,
//! from ring to ring, at the same stream offset:
//!
//! | one guest's direction 0 | the other guest's direction 1 |
//! |---|---|
//! | a stay is published | is published there; then confirmed. Its reader had closed the generation: sealed |
//! | bytes are published | are copied and published; then their space is given back |
//! | its reader is closed | the reader is gone |
//!
//! Undelivered bytes are thus in the sender's ring, whatever happens here.
//!
//! Every word a guest may write is copied once and checked; one that cannot be ends this relay ([`BadIndex`]). A relay
//! that is dropped has touched either memory for the last time.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use vsocket_channel::bell::publish_fence;
use vsocket_channel::layout::BELLS;
use vsocket_channel::ring::{BadIndex, Ring};

use crate::metrics::Traffic;
use crate::slab::View;

#[cfg(test)]
mod tests;

/// Stands for the peer in the key of a slab whose segments are relayed: a number that no peer has.
pub const RELAY: u32 = u32::MAX;

/// Bytes that are copied before they are published: the reader begins, and the writer goes on, while the next are copied.
const PIECE: usize = 32 << 10;
/// Bytes of one direction that a relay copies before the next has its turn.
const TURN: usize = 256 << 10;

/// From one guest to the other.
#[derive(Debug, Default)]
struct Way {
    /// The stay was published, here.
    open: bool,
    /// The other's ring holds everything below.
    at: u64,
    /// The reader is gone, or has refused the stay.
    closed: bool,
}

/// See the module. A guest's place, 0 or 1, is also that of the way that begins at it.
#[derive(Debug)]
pub struct Relay {
    generation: u32,
    views: [View; 2],
    ways: [Way; 2],
    /// Which guests are to be woken.
    ring_due: [bool; 2],
    /// What it has carried, as either guest sees it.
    pub traffic: [Traffic; 2],
}

impl Relay {
    /// A relay between these two segments.
    pub fn new(generation: u32, views: [View; 2]) -> Self {
        let (ways, traffic) = (Default::default(), Default::default());
        Self { generation, views, ways, ring_due: [false; 2], traffic }
    }

    /// Carries what there is, and rings: `ring` gets the guest's place and the number of its bell. Says which guests had
    /// something to carry.
    ///
    /// # Errors
    ///
    /// [`BadIndex`] of a guest: the relay must be withdrawn.
    pub fn pump(&mut self, ring: &mut impl FnMut(usize, usize)) -> Result<[bool; 2], BadIndex> {
        let mut worked = [false; 2];
        for (from, worked) in worked.iter_mut().enumerate() {
            *worked = self.open(from);
            *worked |= self.carry(from)?;
        }
        for guest in 0..2 {
            if std::mem::take(&mut self.ring_due[guest]) {
                self.wake(guest, ring);
            }
        }
        Ok(worked)
    }

    /// Before the backend sleeps: a guest is to ring when it has made room that the other's bytes wait for. To be followed
    /// by the announcement on a slab's bell and one more [`pump`](Self::pump).
    pub fn arm(&self) {
        for (from, way) in self.ways.iter().enumerate().filter(|(_, way)| way.is_running()) {
            if self.source(from).available(way.at).is_ok_and(|waiting| waiting > 0) {
                self.target(from).indices.stay.want_space.store(1, Ordering::Relaxed);
            }
        }
    }

    /// The ring that a guest writes.
    fn source(&self, from: usize) -> Ring<'_> {
        let view = &self.views[from];
        Ring { indices: &view.header().directions[0], bytes: &view.rings[0] }
    }

    /// The ring that the other guest reads.
    fn target(&self, from: usize) -> Ring<'_> {
        let view = &self.views[1 - from];
        Ring { indices: &view.header().directions[1], bytes: &view.rings[1] }
    }

    /// Passes a guest's stay on, if it has published one by now.
    fn open(&mut self, from: usize) -> bool {
        if self.ways[from].open {
            return false;
        }
        let (source, target) = (self.source(from), self.target(from));
        let Some(stay) = source.indices.stay(self.generation) else { return false };
        let taken = target.indices.publish_stay(stay);
        let reader = &source.indices.reader;
        if taken {
            reader.confirmed.store(self.generation, Ordering::Release);
        } else {
            reader.sealed.store(1, Ordering::Release);
        }
        self.ring_due[if taken { 1 - from } else { from }] = true;
        self.ways[from] = Way { open: true, at: stay.start, closed: !taken };
        true
    }

    /// Copies a guest's bytes to the other.
    fn carry(&mut self, from: usize) -> Result<bool, BadIndex> {
        if !self.ways[from].is_running() {
            return Ok(false);
        }
        let (source, target) = (self.source(from), self.target(from));
        if target.indices.reader.closed.load(Ordering::Acquire) != 0 {
            source.indices.reader.closed.store(1, Ordering::Release);
            (self.ways[from].closed, self.ring_due[from]) = (true, true);
            return Ok(true);
        }
        let (mut at, mut pieces, mut done, mut left) = (self.ways[from].at, 0, 0, 0);
        while done < TURN {
            let ready = source.available(at)?;
            let len = ready.min(target.space(at)?).min(PIECE);
            if len == 0 {
                break;
            }
            target.bytes.copy(source.bytes, at, len);
            at = at.wrapping_add(len as u64);
            target.publish(at);
            // Only now: until the other's ring holds them, they are in this one.
            source.release(at);
            (pieces, done, left) = (pieces + 1, done + len, ready - len);
        }
        if done == 0 {
            return Ok(false);
        }
        let taken = target.indices.tail.tail.load(Ordering::Relaxed);
        source.indices.reader.taken.store(taken, Ordering::Release);
        let wanted = wants_room(source, left);
        self.ways[from].at = at;
        self.ring_due[1 - from] = true;
        self.ring_due[from] |= wanted;
        self.count(from, done as u64, pieces);
        Ok(true)
    }

    fn count(&mut self, from: usize, bytes: u64, pieces: u64) {
        let sent = Traffic { tx_bytes: bytes, tx_segments: pieces, ..Traffic::default() };
        let received = Traffic { rx_bytes: bytes, rx_segments: pieces, ..Traffic::default() };
        self.traffic[from].add(sent);
        self.traffic[1 - from].add(received);
    }

    /// Wakes a guest's waiters of this connection. What they are to see is published before.
    fn wake(&self, guest: usize, ring: &mut impl FnMut(usize, usize)) {
        publish_fence();
        let view = &self.views[guest];
        let mask = view.header().waiters[0].mask.load(Ordering::Relaxed);
        let bells = &view.slab().bells[0];
        for (bit, bell) in bells.iter().enumerate().take(BELLS) {
            if mask & 1 << bit != 0 && bell.take() {
                ring(guest, bit);
            }
        }
    }
}

impl Way {
    fn is_running(&self) -> bool {
        self.open && !self.closed
    }
}

/// Whether a writer, who was just given room and has `left` bytes in its ring, waits for it, and there is enough to go on
/// with.
fn wants_room(ring: Ring<'_>, left: usize) -> bool {
    publish_fence();
    let want = &ring.indices.stay.want_space;
    left <= ring.bytes.len() / 4 * 3
        && want.load(Ordering::Relaxed) != 0
        && want.swap(0, Ordering::AcqRel) != 0
}
