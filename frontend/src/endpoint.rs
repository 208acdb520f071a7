//! One end of a connection in action: the lane state machines joined to the anchor, the rings and the doorbells.
//!
//! Both the program's library and the agent act through this, on the same record, each under the direction's lock. No
//! call waits: what cannot be done now is `AGAIN`, and the caller waits outside the lock.

use crate::kernel;
use crate::lane::Violation;
use crate::lane::rx::{RxState, Source, Verdict};
use crate::lane::tx::{Due, Phase, TxState};
use crate::memory::Bound;
use crate::record::{Guard, LockError, Record, RecordsHeader, status};
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{RecvFlags, SendFlags};
use std::sync::atomic::Ordering;
use std::time::Duration;
use vsocket_channel::lane::REWIND_LEN;
use vsocket_channel::message::Lane;
use vsocket_channel::reason::Reason;

/// Result of a call on an endpoint.
pub type Result<T> = std::result::Result<T, Errno>;

/// One end of a connection.
#[derive(Clone, Copy)]
pub struct Endpoint<'a> {
    /// Its shared state.
    pub record: &'a Record,
    /// The kernel socket, or a duplicate.
    pub anchor: BorrowedFd<'a>,
    /// The segment of the last generation that was prepared here.
    pub bound: Option<&'a Bound>,
    /// The program's record memory, and the eventfd that wakes the agent's watchdog.
    pub watchdog: Option<(&'a RecordsHeader, BorrowedFd<'a>)>,
}

fn slices_len(bufs: &[IoSlice<'_>]) -> usize {
    bufs.iter().map(|b| b.len()).sum()
}

impl Endpoint<'_> {
    /// Whether both locks can be had within `most` each: their owner may be stopped, and who serves others must not wait
    /// for it.
    pub fn responds_within(&self, most: Duration) -> bool {
        let tx = self.record.tx.lock_within(most).map(|mut tx| self.recover_tx(&mut tx));
        let rx = self.record.rx.lock_within(most).map(|mut rx| self.recover_rx(&mut rx));
        !matches!(tx, Err(LockError::Busy)) && !matches!(rx, Err(LockError::Busy))
    }

    fn lock_tx(&self) -> Result<Guard<'_, TxState>> {
        let mut tx = self.record.tx.lock().map_err(lock_errno)?;
        self.recover_tx(&mut tx);
        Ok(tx)
    }

    fn recover_tx(&self, tx: &mut Guard<'_, TxState>) {
        if tx.recovered {
            let connector = self.record.connector.load(Ordering::Relaxed) != 0;
            let known = kernel::counters(self.anchor, connector).ok().flatten();
            let done = known.ok_or(Violation::Counters).and_then(|c| tx.recover(c.tx));
            if let (Ok(Phase::Ring), Some(bound)) = (tx.phase(), self.bound_for(tx.generation)) {
                // What was accepted is in the ring's memory; the owner may have died before it said so, or before it
                // announced the stay: so the stay ends.
                bound.tx().publish(tx.off);
                self.record.leave.fetch_max(tx.generation, Ordering::AcqRel);
                bound.ring_far();
            }
            self.settle_tx(tx);
            if done.is_err() {
                self.break_off();
            }
        }
    }

    fn lock_rx(&self) -> Result<Guard<'_, RxState>> {
        let mut rx = self.record.rx.lock().map_err(lock_errno)?;
        self.recover_rx(&mut rx);
        Ok(rx)
    }

    fn recover_rx(&self, rx: &mut Guard<'_, RxState>) {
        if rx.recovered {
            let connector = self.record.connector.load(Ordering::Relaxed) != 0;
            let known = kernel::counters(self.anchor, connector).ok().flatten();
            match known.ok_or(Violation::Counters).and_then(|c| rx.recover(c.rx)) {
                Ok(untaken) => {
                    // It recorded a frame and died before it took it.
                    let mut frame = [0; REWIND_LEN];
                    let _ = recv_anchor(self.anchor, &mut frame[..untaken as usize], RecvFlags::empty());
                    if let (Source::Ring { generation }, Some(bound)) = (rx.source(), self.bound) {
                        if bound.generation == generation {
                            bound.rx().release(rx.off);
                        }
                    }
                }
                Err(_) => self.break_off(),
            }
            self.settle_rx(rx);
        }
    }

    fn bound_for(&self, generation: u32) -> Option<&Bound> {
        self.bound.filter(|b| b.generation == generation)
    }

    fn settle_tx(&self, tx: &TxState) {
        let bits = match tx.phase() {
            Ok(Phase::Ring) => status::TX_RING,
            Ok(Phase::Draining) => status::TX_DRAINING,
            _ => 0,
        };
        self.record.tx_off.store(tx.off, Ordering::Relaxed);
        self.record.set_status(status::TX_STATE, bits);
    }

    fn settle_rx(&self, rx: &RxState) {
        let bits = match rx.source() {
            Source::Ring { .. } => status::RX_RING | status::RX_OPEN,
            Source::Residue { .. } => status::RX_RESIDUE,
            Source::Raw { guarded: true, .. } => status::RX_OPEN,
            Source::Raw { .. } => 0,
        };
        self.record.rx_off.store(rx.off, Ordering::Release);
        self.record.set_status(status::RX_STATE, bits);
    }

    /// Ends the connection for both sides: something cannot be, and going on could lose or double bytes.
    pub fn break_off(&self) {
        self.record.set_status(status::BROKEN, status::BROKEN);
        kernel::abort(self.anchor);
        if let Some(bound) = self.bound {
            bound.tx().indices.stay.aborted.store(1, Ordering::Relaxed);
            bound.rx().indices.reader.closed.store(1, Ordering::Release);
            bound.ring_far();
        }
    }

    fn violated(&self, _why: Violation) -> Errno {
        self.break_off();
        Errno::CONNRESET
    }

    // ---- sending ---------------------------------------------------------------------------------------------------

    /// Sends what can be sent now.
    ///
    /// # Errors
    ///
    /// `AGAIN` if nothing can, else what `send(2)` would say.
    pub fn send(&self, bufs: &[IoSlice<'_>], flags: SendFlags) -> Result<usize> {
        let len = slices_len(bufs);
        let mut tx = self.lock_tx()?;
        loop {
            if self.record.is(status::BROKEN | status::TX_SHUT) {
                return Err(Errno::PIPE);
            }
            match tx.phase().map_err(|v| self.violated(v))? {
                Phase::Anchor => {
                    if let Some(n) = if len > 0 { self.try_switch(&mut tx, bufs)? } else { None } {
                        return Ok(n);
                    }
                    let n = send_anchor(self.anchor, bufs, flags)?;
                    tx.sent_raw(n as u64);
                    self.record.tx_off.store(tx.off, Ordering::Relaxed);
                    return Ok(n);
                }
                Phase::Ring => {
                    if self.record.leave.load(Ordering::Acquire) >= tx.generation {
                        self.seal(&mut tx)?;
                        continue;
                    }
                    return self.send_ring(&mut tx, bufs, len);
                }
                Phase::Draining => {
                    if !self.pump(&mut tx)? {
                        return Err(Errno::AGAIN);
                    }
                }
            }
        }
    }

    fn send_ring(&self, tx: &mut Guard<'_, TxState>, bufs: &[IoSlice<'_>], len: usize) -> Result<usize> {
        let Some(bound) = self.bound_for(tx.generation) else { return Err(self.violated(Violation::Phase)) };
        let ring = bound.tx();
        if ring.indices.reader.closed.load(Ordering::Relaxed) != 0 {
            self.break_off();
            return Err(Errno::CONNRESET);
        }
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

    fn count(&self, direction: usize, lane: Lane, n: usize) {
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
        let connector = self.record.connector.load(Ordering::Relaxed) != 0;
        match kernel::counters(self.anchor, connector) {
            Ok(Some(c)) if c.established && c.tx == tx.wire => {}
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
    fn seal(&self, tx: &mut Guard<'_, TxState>) -> Result<()> {
        let Some(bound) = self.bound_for(tx.generation) else { return Err(self.violated(Violation::Phase)) };
        let direction = bound.tx().indices;
        let (confirmed, acknowledged) = match bound.lane {
            Lane::Fabric => (
                direction.reader.confirmed.load(Ordering::Acquire) == tx.generation,
                direction.tail.tail.load(Ordering::Acquire),
            ),
            _ => (false, tx.off),
        };
        tx.seal(confirmed, acknowledged).map_err(|v| self.violated(v))?;
        tx.commit();
        direction.stay.sealed.store(1, Ordering::Release);
        bound.ring_far();
        self.settle_tx(tx);
        Ok(())
    }

    /// Writes what is due to the anchor. True when nothing is due any more.
    fn pump(&self, tx: &mut TxState) -> Result<bool> {
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
                    self.record.set_status(status::BROKEN, status::BROKEN);
                    return Err(other);
                }
            }
        }
    }

    /// Leaves generations up to this one: seals the sender's stay, if it is in one, and writes what can be written now.
    /// True when nothing is left to drain.
    pub fn leave(&self, generation: u32) -> Result<bool> {
        self.record.leave.fetch_max(generation, Ordering::AcqRel);
        let mut tx = self.lock_tx()?;
        if tx.phase() == Ok(Phase::Ring) && tx.generation <= generation {
            self.seal(&mut tx)?;
        }
        match tx.phase().map_err(|v| self.violated(v))? {
            Phase::Draining => self.pump(&mut tx),
            _ => Ok(true),
        }
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
        if !self.leave(u32::MAX)? {
            return Ok(false);
        }
        rustix::net::shutdown(self.anchor, rustix::net::Shutdown::Write)?;
        Ok(true)
    }

    // ---- receiving -------------------------------------------------------------------------------------------------

    /// Receives what is there now; 0 is the end of the stream. `look` says that the anchor may have something to say:
    /// then it is peeked when the ring is empty.
    ///
    /// # Errors
    ///
    /// `AGAIN` if nothing is there, else what `recv(2)` would say.
    pub fn recv(&self, bufs: &mut [IoSliceMut<'_>], peek: bool, look: bool) -> Result<usize> {
        let mut ended = 0;
        let got = {
            let mut rx = self.lock_rx()?;
            let got = self.recv_locked(&mut rx, bufs, peek, look, &mut ended);
            self.settle_rx(&rx);
            // A socket that was aborted here is not connected any more; the application knows only of the reset.
            got.map_err(|e| {
                if e == Errno::NOTCONN && self.record.is(status::BROKEN) { Errno::CONNRESET } else { e }
            })
        };
        if ended != 0 {
            // The sender across has left: so do we, so that both can come back together.
            let _ = self.leave(ended);
        }
        got
    }

    /// The anchor has something to say: looks whether the stay has ended.
    pub fn attend(&self) {
        let mut ended = 0;
        if let Ok(mut rx) = self.lock_rx() {
            self.learn(&mut rx);
            if let (Source::Ring { generation }, Some(bound)) = (rx.source(), self.bound) {
                if bound.generation == generation && bound.rx().available(rx.off) == Ok(0) {
                    ended = self.judge(&mut rx, bound).ok().flatten().unwrap_or(0);
                }
            }
            self.settle_rx(&rx);
        }
        if ended != 0 {
            let _ = self.leave(ended);
        }
    }

    fn recv_locked(
        &self,
        rx: &mut Guard<'_, RxState>,
        bufs: &mut [IoSliceMut<'_>],
        peek: bool,
        look: bool,
        ended: &mut u32,
    ) -> Result<usize> {
        let want: usize = bufs.iter().map(|b| b.len()).sum();
        loop {
            if self.record.is(status::RX_EOF) {
                return Ok(0);
            }
            match rx.source() {
                Source::Ring { generation } => {
                    let Some(bound) = self.bound_for(generation) else {
                        return Err(self.violated(Violation::Phase));
                    };
                    let ready = bound.rx().available(rx.off).map_err(|_| self.violated(Violation::Index))?;
                    if ready > 0 || want == 0 {
                        return Ok(self.take_ring(rx, bound, bufs, ready, peek));
                    }
                    if self.record.is(status::BROKEN) {
                        return Err(Errno::CONNRESET);
                    }
                    if !look && bound.rx().indices.stay.sealed.load(Ordering::Acquire) == 0 {
                        return Err(Errno::AGAIN);
                    }
                    if let Some(generation) = self.judge(rx, bound)? {
                        *ended = generation;
                    }
                }
                Source::Residue { to } => {
                    let Some(bound) = self.bound else { return Err(self.violated(Violation::Phase)) };
                    return Ok(self.take_ring(rx, bound, bufs, (to - rx.off) as usize, peek));
                }
                Source::Raw { guarded: false, drop: 0, .. } => {
                    return self.take_raw(rx, bufs, u64::MAX, peek);
                }
                Source::Raw { .. } => {
                    if let Some(n) = self.take_guarded(rx, bufs, peek)? {
                        return Ok(n);
                    }
                }
            }
        }
    }

    fn take_ring(
        &self,
        rx: &mut Guard<'_, RxState>,
        bound: &Bound,
        bufs: &mut [IoSliceMut<'_>],
        ready: usize,
        peek: bool,
    ) -> usize {
        let ring = bound.rx();
        let mut done = 0;
        for buf in bufs {
            let n = buf.len().min(ready - done);
            ring.bytes.get(rx.off.wrapping_add(done as u64), &mut buf[..n]);
            done += n;
            if done == ready {
                break;
            }
        }
        if peek {
            return done;
        }
        rx.took_ring(done as u64);
        rx.commit();
        self.count(1, bound.lane, done);
        if rx.generation == bound.generation {
            ring.release(rx.off);
            // The producer waits for a quarter, not for each byte.
            let stay = &ring.indices.stay;
            vsocket_channel::bell::publish_fence();
            if stay.want_space.load(Ordering::Relaxed) != 0 {
                let used = ring.available(rx.off).unwrap_or(0);
                if used <= ring.bytes.len() / 2 && stay.want_space.swap(0, Ordering::AcqRel) != 0 {
                    bound.ring_far();
                }
            }
        }
        done
    }

    /// At S with the ring drained: what does the anchor say? The generation that has ended, if one has.
    fn judge(&self, rx: &mut Guard<'_, RxState>, bound: &Bound) -> Result<Option<u32>> {
        let mut frame = [0; REWIND_LEN];
        let peeked = recv_anchor(self.anchor, &mut frame, RecvFlags::PEEK);
        // The ring may have been filled before the anchor was written: its index counts only if read after the peek.
        let ready = bound.rx().available(rx.off).map_err(|_| self.violated(Violation::Index))?;
        let n = match peeked {
            Ok(0) if ready == 0 => {
                // The kernel's FIN without a REWIND: the whole guest, or its agent and program, died.
                self.record.set_status(status::BROKEN, status::BROKEN);
                return Err(Errno::CONNRESET);
            }
            Err(error) if error != Errno::AGAIN && ready == 0 => {
                self.record.set_status(status::BROKEN, status::BROKEN);
                return Err(error);
            }
            Ok(0) | Err(_) if ready > 0 => return Ok(None),
            Ok(0) | Err(_) => return Err(Errno::AGAIN),
            Ok(n) => n,
        };
        let generation = rx.generation;
        let head = rx.off.wrapping_add(ready as u64);
        match rx.judge(&frame[..n], head).map_err(|v| self.violated(v))? {
            Verdict::Wait if ready > 0 => return Ok(None),
            Verdict::Wait => return Err(Errno::AGAIN),
            Verdict::Cancelled => {}
            Verdict::Rewound => {
                // The verdict is stored, then the frame is taken.
                rx.commit();
                let _ = recv_anchor(self.anchor, &mut frame, RecvFlags::empty());
            }
        }
        bound.rx().indices.reader.sealed.store(1, Ordering::Release);
        Ok(Some(generation))
    }

    fn take_raw(
        &self,
        rx: &mut Guard<'_, RxState>,
        bufs: &mut [IoSliceMut<'_>],
        limit: u64,
        peek: bool,
    ) -> Result<usize> {
        let flags = if peek { RecvFlags::PEEK } else { RecvFlags::empty() };
        let n = recv_clipped(self.anchor, bufs, limit, flags)?;
        if !peek {
            if n == 0 && bufs.iter().any(|b| !b.is_empty()) {
                self.record.set_status(status::RX_EOF, status::RX_EOF);
            }
            rx.took_raw(n as u64);
        }
        Ok(n)
    }

    /// Raw bytes while a stay may be announced, or while some of them must be dropped. `None`: look again.
    fn take_guarded(
        &self,
        rx: &mut Guard<'_, RxState>,
        bufs: &mut [IoSliceMut<'_>],
        peek: bool,
    ) -> Result<Option<usize>> {
        let queued = kernel::unread(self.anchor).map_err(|_| Errno::NOTCONN)?;
        self.learn(rx);
        let Source::Raw { drop, limit, guarded } = rx.source() else { return Ok(None) };
        if guarded && queued == 0 {
            // Nothing counted: a byte that is there now may be a frame, so only look whether the stream has ended.
            let mut one = [0];
            return match recv_anchor(self.anchor, &mut one, RecvFlags::PEEK) {
                Ok(0) => {
                    self.learn(rx);
                    if matches!(rx.source(), Source::Raw { .. }) {
                        self.record.set_status(status::RX_EOF, status::RX_EOF);
                    }
                    Ok(None)
                }
                Ok(_) => Ok(None),
                Err(error) => Err(error),
            };
        }
        let limit = if guarded { limit.min(queued) } else { limit };
        let n = if drop > 0 {
            let mut scratch = [0; 16384];
            let most = drop.min(limit).min(scratch.len() as u64) as usize;
            let n = recv_anchor(self.anchor, &mut scratch[..most], RecvFlags::empty())?;
            if n == 0 {
                self.record.set_status(status::RX_EOF, status::RX_EOF);
            }
            rx.took_raw(n as u64);
            None
        } else {
            Some(self.take_raw(rx, bufs, limit, peek)?)
        };
        // A stay that begins below what was just read was cancelled before we saw it.
        self.learn(rx);
        Ok(n)
    }

    fn learn(&self, rx: &mut RxState) {
        if rx.generation == 0 {
            return;
        }
        let stay = self.bound_for(rx.generation).and_then(|b| b.rx().indices.stay(rx.generation));
        if let Some(stay) = stay {
            rx.learn(stay);
        }
    }

    /// Looks for an announced stay, so that [`Endpoint::readable`] can say more.
    pub fn refresh(&self) {
        if let Ok(mut rx) = self.lock_rx() {
            self.learn(&mut rx);
            self.settle_rx(&rx);
        }
    }

    // ---- readiness -------------------------------------------------------------------------------------------------

    /// Whether the ring side of the receiver has something to deliver, without a lock. `None`: the anchor decides.
    pub fn readable(&self) -> Option<bool> {
        let bits = self.record.status.load(Ordering::Acquire);
        if bits & (status::RX_EOF | status::RX_RESIDUE | status::BROKEN) != 0 {
            return Some(true);
        }
        if bits & status::RX_OPEN == 0 {
            return None;
        }
        let bound = self.bound?;
        let direction = bound.rx().indices;
        if bits & status::RX_RING == 0 {
            if direction.stay.generation.load(Ordering::Acquire) != bound.generation {
                return None;
            }
            self.refresh();
            if !self.record.is(status::RX_RING) {
                return None;
            }
        }
        // That the sender has sealed is no readiness: the anchor will say how the stream goes on.
        Some(direction.head.head.load(Ordering::Acquire) != self.record.rx_off.load(Ordering::Relaxed))
    }

    /// Whether the ring has room (a quarter of it), without a lock. `None`: the anchor decides.
    pub fn writable(&self) -> Option<bool> {
        let bits = self.record.status.load(Ordering::Acquire);
        if bits & (status::BROKEN | status::TX_SHUT) != 0 {
            return Some(true);
        }
        if bits & status::TX_RING == 0 {
            return None;
        }
        let bound = self.bound?;
        let ring = bound.tx();
        let enough = |space: usize| space >= ring.bytes.len() / 4;
        let off = self.record.tx_off.load(Ordering::Relaxed);
        let closed = ring.indices.reader.closed.load(Ordering::Relaxed) != 0;
        if closed || ring.space(off).is_ok_and(enough) {
            return Some(true);
        }
        ring.indices.stay.want_space.store(1, Ordering::Relaxed);
        vsocket_channel::bell::publish_fence();
        Some(ring.space(off).is_ok_and(enough))
    }

    // ---- generations -----------------------------------------------------------------------------------------------

    /// Prepares for a generation whose segment `self.bound` is: from now on a stay may be announced.
    ///
    /// # Errors
    ///
    /// Why not, by name.
    pub fn prepare(&self, generation: u32) -> std::result::Result<(), Reason> {
        if self.record.is(status::BROKEN | status::RX_EOF | status::TX_SHUT) {
            return Err(Reason::Ending);
        }
        let tx = self.lock_tx().map_err(|_| Reason::Busy)?;
        let mut rx = self.lock_rx().map_err(|_| Reason::Busy)?;
        if tx.phase() != Ok(Phase::Anchor) || tx.generation >= generation {
            return Err(Reason::Busy);
        }
        let connector = self.record.connector.load(Ordering::Relaxed) != 0;
        let seen = kernel::counters(self.anchor, connector).map_err(|_| Reason::NotEstablished)?;
        let seen = seen.ok_or(Reason::Busy)?;
        if !seen.established {
            return Err(Reason::NotEstablished);
        }
        if (seen.tx, seen.rx) != (tx.wire, rx.wire) {
            return Err(Reason::Untrackable);
        }
        rx.prepare(generation)?;
        if let Some(bound) = self.bound {
            self.record.lane.store(u32::from(bound.lane.code()), Ordering::Relaxed);
        }
        self.settle_rx(&rx);
        Ok(())
    }

    /// Closes the open generation if no stay was announced in it: it will not be committed, or the host has withdrawn it.
    pub fn close_unopened(&self, generation: u32) {
        let Ok(mut rx) = self.lock_rx() else { return };
        if rx.generation == generation && !rx.knows_stay() {
            if let Some(bound) = self.bound_for(generation) {
                if bound.rx().indices.close_unopened(generation) {
                    rx.close();
                } else {
                    self.learn(&mut rx);
                }
            }
        }
        self.settle_rx(&rx);
    }

    /// Whether neither direction of this end uses its generation any more.
    pub fn has_left(&self) -> bool {
        !self.record.is(status::TX_STATE | status::RX_STATE)
    }
}

fn lock_errno(error: LockError) -> Errno {
    match error {
        // A signal handler inside our own call on the same socket: it must not wait for the code it interrupted.
        LockError::Reentered | LockError::Busy => Errno::AGAIN,
        LockError::Garbled => Errno::CONNRESET,
    }
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

fn recv_anchor(anchor: BorrowedFd<'_>, buf: &mut [u8], flags: RecvFlags) -> Result<usize> {
    rustix::net::recv(anchor, buf, flags | RecvFlags::DONTWAIT).map(|(n, _)| n)
}

/// Receives at most `limit` bytes into the buffers.
fn recv_clipped(
    anchor: BorrowedFd<'_>,
    bufs: &mut [IoSliceMut<'_>],
    limit: u64,
    flags: RecvFlags,
) -> Result<usize> {
    let total: u64 = bufs.iter().map(|b| b.len() as u64).sum();
    if total > limit || bufs.len() == 1 {
        // One buffer is enough for progress; the caller asks again for the rest.
        let first = bufs.iter_mut().find(|b| !b.is_empty());
        let Some(first) = first else { return Ok(0) };
        let most = (first.len() as u64).min(limit) as usize;
        return recv_anchor(anchor, &mut first[..most], flags);
    }
    let mut control = rustix::net::RecvAncillaryBuffer::default();
    rustix::net::recvmsg(anchor, bufs, &mut control, flags | RecvFlags::DONTWAIT).map(|m| m.bytes)
}
