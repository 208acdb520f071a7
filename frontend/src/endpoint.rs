//! One end of a connection in action: the lane state machines joined to the anchor, the rings and the doorbells.
//!
//! Both the program's library and the agent act through this, on the same record, each under the direction's lock. No
//! call waits: what cannot be done now is `AGAIN`, and the caller waits outside the lock.

use crate::kernel;
use crate::lane::Violation;
use crate::lane::rx::{RxState, Source};
use crate::lane::tx::{Phase, TxState};
use crate::memory::Bound;
use crate::record::{Guard, LockError, Record, RecordsHeader, status};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vsocket_channel::lane::REWIND_LEN;
use vsocket_channel::message::Lane;
use vsocket_channel::reason::Reason;

mod receiving;
mod returning;
mod sending;

pub use returning::Return;

/// Why nobody reads a ring, as its `closed` says: the kernel socket is shut both ways; the program has gone.
const DEAF: u32 = 1;
const GONE: u32 = 2;

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

    #[inline]
    fn recover_tx(&self, tx: &mut Guard<'_, TxState>) {
        if tx.recovered {
            self.recover_dead_tx(tx);
        }
    }

    #[cold]
    fn recover_dead_tx(&self, tx: &mut Guard<'_, TxState>) {
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
        if let Err(why) = done {
            self.violated(why);
        }
    }

    fn lock_rx(&self) -> Result<Guard<'_, RxState>> {
        let mut rx = self.record.rx.lock().map_err(lock_errno)?;
        self.recover_rx(&mut rx);
        Ok(rx)
    }

    #[inline]
    fn recover_rx(&self, rx: &mut Guard<'_, RxState>) {
        if rx.recovered {
            self.recover_dead_rx(rx);
        }
    }

    #[cold]
    fn recover_dead_rx(&self, rx: &mut Guard<'_, RxState>) {
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
            Err(why) => {
                self.violated(why);
            }
        }
        self.settle_rx(rx);
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
            Source::Raw { guarded, drop, .. } => {
                (if guarded { status::RX_OPEN } else { 0 }) | if drop > 0 { status::RX_KNOWN } else { 0 }
            }
        };
        self.record.rx_off.store(rx.off, Ordering::Release);
        self.record.set_status(status::RX_STATE | status::RX_KNOWN, bits);
        if self.defers_shutdown() && !self.awaits(rx) {
            self.record.set_status(status::RX_DEFERRED, 0);
            let _ = rustix::net::shutdown(self.anchor, rustix::net::Shutdown::Read);
        }
    }

    /// Whether something of a stay is still to come over the anchor: the frame of its end, or bytes that are known.
    fn awaits(&self, rx: &RxState) -> bool {
        let again = rx.kept.saturating_sub(rx.raw);
        rx.generation != 0 || again > 0 && kernel::unread(self.anchor).is_ok_and(|there| there < again)
    }

    /// Whether the application has shut it for reading, and the kernel socket is still to be. Who has shut both directions
    /// answers what then comes with a reset, and so the frame by which a stay ends, if it is on its way: on a fabric lane the
    /// far end hears too late of the one to leave out the other.
    pub fn defers_shutdown(&self) -> bool {
        self.record.is(status::RX_DEFERRED)
    }

    /// Shuts the connection for reading.
    ///
    /// # Errors
    ///
    /// As `shutdown(2)`.
    pub fn shut_reading(&self) -> Result<()> {
        let was = self.record.status.load(Ordering::Acquire) & status::RX_SHUT;
        // First: who waits finds the anchor at its end, and is to know why.
        self.record.set_status(status::RX_SHUT, status::RX_SHUT);
        if self.bound.is_some_and(|b| b.lane == Lane::Fabric) && was == 0 && !kernel::has_closed(self.anchor)
        {
            self.record.set_status(status::RX_DEFERRED, status::RX_DEFERRED);
            self.attend();
            return Ok(());
        }
        if self.defers_shutdown() {
            return Ok(());
        }
        let shut = rustix::net::shutdown(self.anchor, rustix::net::Shutdown::Read);
        shut.inspect_err(|_| self.record.set_status(status::RX_SHUT, was))
    }

    /// Ends the connection for both sides: something cannot be, and going on could lose or double bytes.
    pub fn break_off(&self) {
        let before = self.record.status.load(Ordering::Acquire);
        let behind_end = kernel::peer_has_shut_alone(self.anchor);
        self.broken(if behind_end { Errno::PIPE } else { Errno::CONNRESET });
        // What a reset has left to be read would be lost with another.
        if !kernel::has_closed(self.anchor) {
            kernel::abort(self.anchor);
            // That leaves an error which nobody is to be told.
            let _ = self.kernel_error();
        }
        // A segment that was left may be another connection's by now.
        let Some(bound) = self.bound.filter(|_| before & (status::TX_STATE | status::RX_OPEN) != 0) else {
            return;
        };
        if before & status::TX_STATE != 0 {
            bound.tx().indices.stay.aborted.store(1, Ordering::Relaxed);
        }
        if before & status::RX_OPEN != 0 {
            bound.rx().indices.reader.closed.store(DEAF, Ordering::Release);
        }
        bound.ring_far();
    }

    /// No bytes move any more, and the application does not know it yet. If the kernel has an error to tell, it is that one:
    /// it is told in the kernel's stead. Else it is this one.
    pub fn broken(&self, error: Errno) {
        if !self.record.is(status::BROKEN) {
            self.break_untold(self.kernel_error().unwrap_or(error));
        }
    }

    /// The anchor was found at its end. One that was reset and has no error to tell has told it: nobody is told twice.
    pub fn found_over(&self) {
        if self.record.is(status::BROKEN) {
            return;
        }
        match self.kernel_error() {
            None if !self.record.is(status::TX_SHUT) && kernel::has_closed(self.anchor) => {
                self.record.set_status(status::BROKEN, status::BROKEN);
            }
            error => self.break_untold(error.unwrap_or(Errno::CONNRESET)),
        }
    }

    /// A reset that nobody has told yet is told before all else, also to who has shut the connection itself.
    fn hear_reset(&self) {
        if !self.record.is(status::BROKEN)
            && let Some(error) = self.kernel_error()
        {
            self.break_untold(error);
        }
    }

    fn kernel_error(&self) -> Option<Errno> {
        rustix::net::sockopt::socket_error(self.anchor).ok()?.err()
    }

    fn break_untold(&self, error: Errno) {
        self.record.error.store(error.raw_os_error() as u32, Ordering::Relaxed);
        let bits = status::BROKEN | status::UNTOLD;
        self.record.set_status(bits, bits);
    }

    /// The error of a connection that is broken: `EPIPE` if the peer's FIN had come before the reset, and ours had not gone.
    pub fn reset_errno(&self) -> Errno {
        match self.record.error.load(Ordering::Relaxed) as i32 {
            libc::EPIPE => Errno::PIPE,
            libc::ETIMEDOUT => Errno::TIMEDOUT,
            _ => Errno::CONNRESET,
        }
    }

    /// A call failed after it had moved bytes, which is what it reports: the next one reports the reset.
    pub fn tell_later(&self) {
        if self.record.is(status::BROKEN) {
            self.record.set_status(status::UNTOLD, status::UNTOLD);
        }
    }

    /// Nobody reads any more, and the kernel socket answers what still comes with a reset: the application has shut both
    /// directions, or nobody has it any more.
    pub fn tell_deaf(&self) {
        self.tell_sender(|closed| closed.store(DEAF, Ordering::Release));
    }

    /// The application has shut both directions.
    pub fn deafen(&self) {
        self.tell_deaf();
        if let Some(bound) = self.bound.filter(|_| self.defers_shutdown() && !self.record.is(status::RX_RING))
        {
            // Nothing has come by the ring, and nothing need be waited for.
            self.close_unopened(bound.generation);
        }
    }

    /// The application has gone; the agent reads what still comes, unless the kernel socket is shut both ways.
    pub fn tell_gone(&self) {
        if self.record.take(status::RX_DEFERRED) {
            self.record.set_status(status::RX_SHUT, 0);
        }
        let bits = self.record.status.load(Ordering::Acquire);
        let both = status::RX_SHUT | status::TX_SHUT;
        let how = if bits & both == both { DEAF } else { GONE };
        // Who is deaf stays so.
        self.tell_sender(|closed| {
            let _ = closed.compare_exchange(0, how, Ordering::Release, Ordering::Relaxed);
        });
    }

    /// Tells the sender across, if it is on a ring or may come onto one.
    fn tell_sender(&self, word: impl Fn(&AtomicU32)) {
        let Ok(rx) = self.lock_rx() else { return };
        if let Some(bound) = self.bound_for(rx.generation) {
            // Under the lock: while the generation is open here, its segment is ours.
            word(&bound.rx().indices.reader.closed);
            bound.ring_far();
        }
    }

    fn violated(&self, why: Violation) -> Errno {
        self.record.violation.store(why.code(), Ordering::Relaxed);
        self.break_off();
        Errno::CONNRESET
    }

    /// Whether the ring side of the receiver has something to deliver, without a lock. `None`: the anchor decides.
    pub fn readable(&self) -> Option<bool> {
        let bits = self.record.status.load(Ordering::Acquire);
        if bits & (status::RX_EOF | status::RX_SHUT | status::RX_RESIDUE | status::BROKEN) != 0 {
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
                // The raw bytes before the ring's are still to be read; the kernel has told of them, and does not again.
                let there = kernel::unread(self.anchor).is_ok_and(|n| n > 0);
                return there.then_some(true);
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

    /// Prepares for a generation whose segment `self.bound` is: from now on a stay may be announced.
    ///
    /// # Errors
    ///
    /// Why not, by name.
    pub fn prepare(&self, generation: u32) -> std::result::Result<(), Reason> {
        if self.record.is(status::BROKEN | status::RX_EOF | status::RX_SHUT | status::TX_SHUT) {
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
        self.record.unknown.store(0, Ordering::Relaxed);
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

    /// Whether neither direction of this end uses its generation any more, or may yet come to.
    pub fn has_left(&self) -> bool {
        !self.record.is(status::TX_STATE | status::RX_STATE) && !self.may_switch()
    }

    /// The last generation that either direction has used. `None`: its locks cannot be had.
    pub fn last_generation(&self) -> Option<u32> {
        let tx = self.lock_tx().ok()?.generation;
        let rx = self.lock_rx().ok()?;
        Some(tx.max(rx.generation).max(rx.min_generation.saturating_sub(1)))
    }

    /// Whether the connection is the kernel's alone, with nothing left that only we know.
    pub fn is_plain(&self) -> bool {
        let plain =
            |rx: Guard<'_, RxState>| matches!(rx.source(), Source::Raw { drop: 0, guarded: false, .. });
        self.has_left() && self.lock_rx().is_ok_and(plain)
    }

    /// Whether the sender may still switch to the generation: the peer has shut its own direction before we sent anything.
    fn may_switch(&self) -> bool {
        let ready = self.record.ready.load(Ordering::Acquire);
        self.bound.is_some_and(|b| b.generation == ready)
            && self.record.leave.load(Ordering::Acquire) < ready
            && !self.record.is(status::TX_SHUT | status::BROKEN)
    }
}

fn lock_errno(error: LockError) -> Errno {
    match error {
        // A signal handler inside our own call on the same socket: it must not wait for the code it interrupted.
        LockError::Reentered | LockError::Busy => Errno::AGAIN,
        LockError::Garbled => Errno::CONNRESET,
    }
}

fn recv_anchor(anchor: BorrowedFd<'_>, buf: &mut [u8], flags: RecvFlags) -> Result<usize> {
    rustix::net::recv(anchor, buf, flags | RecvFlags::DONTWAIT).map(|(n, _)| n)
}
