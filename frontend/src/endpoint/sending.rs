//! Sending: raw, onto the ring, and off it again.

use super::{DEAF, Endpoint, Result, lock_errno};
use crate::kernel;
use crate::lane::Violation;
use crate::lane::tx::{Due, Phase, TxState};
use crate::memory::Bound;
use crate::record::{Guard, status};
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, IoSlice};
use rustix::net::SendFlags;
use std::sync::atomic::Ordering;
use vsocket_channel::message::Lane;

impl Endpoint<'_> {
    /// Sends what can be sent now.
    ///
    /// # Errors
    ///
    /// `AGAIN` if nothing can, else what `send(2)` would say.
    pub fn send(&self, bufs: &[IoSlice<'_>], flags: SendFlags) -> Result<usize> {
        let sent = match self.record.tx.take() {
            Ok(taken) => {
                let mut tx = taken.open();
                self.recover_tx(&mut tx);
                self.send_locked(&mut tx, bufs, flags)
            }
            Err(error) => Err(lock_errno(error)),
        };
        let Err(error) = sent else { return sent };
        if error == Errno::PIPE {
            // The agent may just have taken the kernel's word why, which it records before it gives this lock back.
            drop(self.lock_rx());
        }
        let untold = error != Errno::AGAIN && self.record.take(status::UNTOLD);
        Err(if untold { self.reset_errno() } else { error })
    }

    fn send_locked(
        &self,
        tx: &mut Guard<'_, TxState>,
        bufs: &[IoSlice<'_>],
        flags: SendFlags,
    ) -> Result<usize> {
        let len = slices_len(bufs);
        loop {
            if self.record.is(status::BROKEN | status::TX_SHUT) {
                self.hear_reset();
                return Err(Errno::PIPE);
            }
            match tx.phase().map_err(|v| self.violated(v))? {
                Phase::Anchor => {
                    if let Some(n) = if len > 0 { self.try_switch(tx, bufs)? } else { None } {
                        return Ok(n);
                    }
                    let n = send_anchor(self.anchor, bufs, flags)?;
                    tx.sent_raw(n as u64);
                    self.record.tx_off.store(tx.off, Ordering::Relaxed);
                    return Ok(n);
                }
                Phase::Ring => {
                    if self.nobody_reads(tx.generation) {
                        if len == 0 && !kernel::has_closed(self.anchor) {
                            return Ok(0);
                        }
                        // What the kernel makes of that, it does on the anchor.
                        self.record.leave.fetch_max(tx.generation, Ordering::AcqRel);
                    }
                    if self.record.leave.load(Ordering::Acquire) >= tx.generation {
                        self.seal(tx)?;
                        continue;
                    }
                    return self.send_ring(tx, bufs, len);
                }
                Phase::Draining => {
                    if !self.pump(tx)? {
                        return Err(Errno::AGAIN);
                    }
                }
            }
        }
    }

    /// Whether the application across has shut both directions, or has gone.
    fn nobody_reads(&self, generation: u32) -> bool {
        let reader = |bound: &Bound| bound.tx().indices.reader.closed.load(Ordering::Relaxed);
        self.bound_for(generation).is_some_and(|bound| reader(bound) != 0)
    }

    fn send_ring(&self, tx: &mut Guard<'_, TxState>, bufs: &[IoSlice<'_>], len: usize) -> Result<usize> {
        let Some(bound) = self.bound_for(tx.generation) else { return Err(self.violated(Violation::Phase)) };
        let ring = bound.tx();
        let mut space = bound.tx_space(tx.off, len).map_err(|_| self.violated(Violation::Index))?;
        if space == 0 && len > 0 {
            ring.indices.stay.want_space.store(1, Ordering::Relaxed);
            vsocket_channel::bell::publish_fence();
            space = bound.tx_space(tx.off, len).map_err(|_| self.violated(Violation::Index))?;
            if space == 0 {
                return Err(Errno::AGAIN);
            }
        }
        let mut done = 0;
        for buf in bufs {
            let n = buf.len().min(space - done);
            ring.bytes.put(tx.off.wrapping_add(done as u64), &buf[..n]);
            done += n;
            if done == space {
                break;
            }
        }
        tx.sent_ring(done as u64);
        // Recorded, then shown: the head of who dies between must not be ahead of the record.
        tx.commit();
        ring.publish(tx.off);
        self.record.tx_off.store(tx.off, Ordering::Relaxed);
        self.count(0, bound.lane, done);
        bound.ring_far();
        self.wake_watchdog(bound);
        Ok(done)
    }

    pub(super) fn count(&self, direction: usize, lane: Lane, n: usize) {
        let counter = if lane == Lane::Fabric { &self.record.fabric } else { &self.record.direct };
        // Only the direction's lock holder writes it.
        let was = counter[direction].load(Ordering::Relaxed);
        counter[direction].store(was + n as u64, Ordering::Relaxed);
    }

    fn wake_watchdog(&self, bound: &Bound) {
        let Some((header, eventfd)) = self.watchdog.filter(|_| bound.lane == Lane::Fabric) else { return };
        if header.watchdog.load(Ordering::Relaxed) != 0 && header.watchdog.swap(0, Ordering::AcqRel) != 0 {
            let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
        }
    }

    /// Switches to the committed generation, if there is one and the kernel agrees on the offset, and says how many bytes
    /// the ring took.
    fn try_switch(&self, tx: &mut Guard<'_, TxState>, bufs: &[IoSlice<'_>]) -> Result<Option<usize>> {
        let ready = self.record.ready.load(Ordering::Acquire);
        if ready <= tx.generation || ready <= self.record.leave.load(Ordering::Acquire) {
            return Ok(None);
        }
        let Some(bound) = self.bound_for(ready) else { return Ok(None) };
        if bound.tx().indices.reader.closed.load(Ordering::Acquire) != 0 {
            // Nobody will read there; what the kernel makes of that, it does on the anchor.
            self.record.leave.fetch_max(ready, Ordering::AcqRel);
            return Ok(None);
        }
        let connector = self.record.connector.load(Ordering::Relaxed) != 0;
        match kernel::counters(self.anchor, connector) {
            Ok(Some(c)) if c.sends && c.tx == tx.wire => {}
            Ok(None) => return Ok(None),
            _ => {
                // Bytes moved that we did not see: this generation is not for us.
                self.record.leave.fetch_max(ready, Ordering::AcqRel);
                return Ok(None);
            }
        }
        let Some(first) = bufs.iter().find_map(|b| b.first()) else { return Ok(None) };
        let stay = tx.switch(ready, *first);
        let ring = bound.tx();
        let mut done = 0;
        for buf in bufs {
            let n = buf.len().min(ring.bytes.len() - done);
            ring.bytes.put(tx.off.wrapping_add(done as u64), &buf[..n]);
            done += n;
        }
        // These bytes are accepted before anyone can see the stay: so the byte at S is settled, whichever way it travels.
        tx.sent_ring(done as u64);
        tx.commit();
        if ring.indices.publish_stay(stay) {
            if bound.lane == Lane::Direct {
                tx.confirm();
            }
            ring.publish(tx.off);
            self.settle_tx(tx);
            self.count(0, bound.lane, done);
            bound.ring_far();
            self.wake_watchdog(bound);
        } else {
            // The receiver had closed the generation: the stay is cancelled, and what it took drains from the ring.
            self.record.leave.fetch_max(ready, Ordering::AcqRel);
            self.seal(tx)?;
            self.pump(tx)?;
        }
        Ok(Some(done))
    }

    /// Seals the stay and begins to drain.
    pub(super) fn seal(&self, tx: &mut Guard<'_, TxState>) -> Result<()> {
        let Some(bound) = self.bound_for(tx.generation) else { return Err(self.violated(Violation::Phase)) };
        let direction = bound.tx().indices;
        let (confirmed, acknowledged) = match bound.lane {
            Lane::Fabric => (
                direction.reader.confirmed.load(Ordering::Acquire) == tx.generation,
                direction.tail.tail.load(Ordering::Acquire),
            ),
            _ => (false, tx.off),
        };
        let deaf = direction.reader.closed.load(Ordering::Acquire) == DEAF && bound.lane != Lane::Fabric;
        match self.untaken(tx, bound) {
            // Its kernel socket, which is shut both ways, answers a frame with a reset; on a fabric lane it is not yet.
            _ if deaf && acknowledged == tx.off => {
                tx.abandon();
                Ok(())
            }
            Some(taken) => tx.seal_untaken(taken),
            None => tx.seal(confirmed, acknowledged),
        }
        .map_err(|v| self.violated(v))?;
        tx.commit();
        direction.stay.sealed.store(1, Ordering::Release);
        bound.ring_far();
        self.settle_tx(tx);
        Ok(())
    }

    /// Writes what is due to the anchor. True when nothing is due any more.
    pub(super) fn pump(&self, tx: &mut TxState) -> Result<bool> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            let sent = match tx.due() {
                Due::Nothing => {
                    self.settle_tx(tx);
                    return Ok(true);
                }
                Due::Frame { frame, done } => rustix::net::send(self.anchor, &frame[done..], flags),
                Due::Raw { from, to } => {
                    let Some(bound) = self.bound_for(tx.generation) else {
                        return Err(self.violated(Violation::Phase));
                    };
                    let mut piece = [0; 16384];
                    let n = (to - from).min(piece.len() as u64) as usize;
                    bound.tx().bytes.get(from, &mut piece[..n]);
                    rustix::net::send(self.anchor, &piece[..n], flags)
                }
            };
            match sent {
                Ok(n) => tx.drained(n as u64),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(other) => {
                    self.broken(other);
                    return Err(other);
                }
            }
        }
    }

    /// Leaves generations up to this one: seals the sender's stay, if it is in one, and writes what can be written now.
    /// True when nothing is left to drain.
    pub fn leave(&self, generation: u32) -> Result<bool> {
        self.leave_because(generation, false)
    }

    fn leave_because(&self, generation: u32, shut: bool) -> Result<bool> {
        self.record.leave.fetch_max(generation, Ordering::AcqRel);
        let mut tx = self.lock_tx()?;
        if tx.phase() == Ok(Phase::Ring) && tx.generation <= generation {
            if shut {
                tx.shut();
            }
            self.seal(&mut tx)?;
        }
        match tx.phase().map_err(|v| self.violated(v))? {
            Phase::Draining => self.pump(&mut tx),
            _ => Ok(true),
        }
    }

    /// Leaves the ring for good, before something that only the anchor can carry.
    ///
    /// # Errors
    ///
    /// `AGAIN` while something must be drained first.
    pub fn stay_on_anchor(&self) -> Result<()> {
        if self.leave(u32::MAX)? { Ok(()) } else { Err(Errno::AGAIN) }
    }

    /// Goes on draining, if the sender drains. True when nothing is left.
    pub fn drain(&self) -> Result<bool> {
        self.leave(0)
    }

    /// Shuts the connection for writing: what was sent is delivered, then the end of the stream, in this order, over the
    /// anchor. True when the kernel has the FIN; false if more must be drained first (call again when the anchor is
    /// writable).
    pub fn shut(&self) -> Result<bool> {
        self.record.set_status(status::TX_SHUT, status::TX_SHUT);
        if !self.leave_because(u32::MAX, true)? {
            return Ok(false);
        }
        rustix::net::shutdown(self.anchor, rustix::net::Shutdown::Write)?;
        Ok(true)
    }
}

fn slices_len(bufs: &[IoSlice<'_>]) -> usize {
    bufs.iter().map(|b| b.len()).sum()
}

fn send_anchor(anchor: BorrowedFd<'_>, bufs: &[IoSlice<'_>], flags: SendFlags) -> Result<usize> {
    let flags = flags | SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match bufs {
        [one] => rustix::net::send(anchor, one, flags),
        many => {
            let mut control = rustix::net::SendAncillaryBuffer::default();
            rustix::net::sendmsg(anchor, many, &mut control, flags)
        }
    }
}
