//! Receiving: raw, guarded, from the ring, and what it left behind.

use super::{Endpoint, Result, recv_anchor};
use crate::kernel;
use crate::lane::Violation;
use crate::lane::rx::{RxState, Source, Verdict};
use crate::memory::Bound;
use crate::record::{Guard, status};
use rustix::fd::BorrowedFd;
use rustix::io::{Errno, IoSliceMut};
use rustix::net::RecvFlags;
use std::sync::atomic::Ordering;
use vsocket_channel::lane::REWIND_LEN;

impl Endpoint<'_> {
    /// Receives what is there now; 0 is the end of the stream. `look` says that the anchor may have something to say:
    /// then it is peeked when the ring is empty.
    ///
    /// # Errors
    ///
    /// `AGAIN` if nothing is there, else what `recv(2)` would say.
    pub fn recv(&self, bufs: &mut [IoSliceMut<'_>], peek: bool, look: bool) -> Result<usize> {
        let mut ended = 0;
        let shut = self.record.is(status::RX_SHUT);
        let got = {
            let mut rx = self.lock_rx()?;
            let (source, before) = (rx.source(), std::mem::discriminant(&rx.source()));
            let mut got = self.recv_locked(&mut rx, bufs, peek, look || shut, &mut ended);
            if let (Ok(n @ 1..), false) = (got, peek || std::mem::discriminant(&rx.source()) == before) {
                got = Ok(n + self.recv_beyond(&mut rx, bufs, n));
            }
            if let (Ok(n @ 1..), true, Source::Raw { .. }) = (got, peek, source) {
                got = Ok(n + self.peek_beyond(&rx, bufs, n));
            }
            self.settle_rx(&rx);
            match got {
                // A socket that was aborted here is not connected any more; the application knows only of the reset, and
                // hears of it once, as from the kernel.
                Err(Errno::NOTCONN | Errno::CONNRESET) if self.record.is(status::BROKEN) => {
                    if self.record.take(status::UNTOLD) { Err(Errno::CONNRESET) } else { Ok(0) }
                }
                Err(Errno::AGAIN) if shut => Ok(0),
                // Behind the end of the stream nobody is told of a reset.
                Ok(0) if self.record.is(status::BROKEN) && !self.record.is(status::RX_EOF) => {
                    if self.record.take(status::UNTOLD) { Err(Errno::CONNRESET) } else { Ok(0) }
                }
                other => other,
            }
        };
        if ended != 0 {
            // The sender across has left: so do we, so that both can come back together.
            let _ = self.leave(ended);
        }
        got
    }

    /// Bytes have come from one carrier up to where the other goes on: what that has is received by the same call.
    fn recv_beyond(&self, rx: &mut Guard<'_, RxState>, bufs: &mut [IoSliceMut<'_>], done: usize) -> usize {
        let there = match rx.source() {
            Source::Ring { .. } => self.bound_for(rx.generation).and_then(|b| b.rx().available(rx.off).ok()),
            Source::Raw { .. } => kernel::unread(self.anchor).ok().map(|n| n as usize),
            Source::Residue { .. } => None,
        };
        if there.unwrap_or(0) == 0 {
            return 0;
        }
        let mut rest = after(bufs, done);
        if rest.iter().all(|buf| buf.is_empty()) {
            return 0;
        }
        self.recv_locked(rx, &mut rest, false, false, &mut 0).unwrap_or(0)
    }

    /// All raw bytes before the ring's were peeked: so are those.
    fn peek_beyond(&self, rx: &RxState, bufs: &mut [IoSliceMut<'_>], done: usize) -> usize {
        let Source::Raw { drop: 0, limit, guarded: true } = rx.source() else { return 0 };
        let Some(bound) = self.bound_for(rx.generation).filter(|_| rx.knows_stay() && limit == done as u64)
        else {
            return 0;
        };
        let ready = bound.rx().available(rx.start).unwrap_or(0);
        let mut copied = 0;
        for buf in after(bufs, done) {
            let n = buf.len().min(ready - copied);
            bound.rx().bytes.get(rx.start.wrapping_add(copied as u64), &mut { buf }[..n]);
            copied += n;
        }
        copied
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
                    if ready > 0 {
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

    /// At S with the ring drained: what does the anchor say? The generation that has ended, if one has and our own direction
    /// is to leave it too.
    fn judge(&self, rx: &mut Guard<'_, RxState>, bound: &Bound) -> Result<Option<u32>> {
        let mut frame = [0; REWIND_LEN];
        let peeked = recv_anchor(self.anchor, &mut frame, RecvFlags::PEEK);
        // The ring may have been filled before the anchor was written: its index counts only if read after the peek.
        let ready = bound.rx().available(rx.off).map_err(|_| self.violated(Violation::Index))?;
        let n = match peeked {
            // The application itself may have shut it for reading.
            Ok(0) if ready == 0 && !self.record.is(status::RX_EOF | status::RX_SHUT) => {
                // The kernel's FIN without a REWIND: the whole guest, or its agent and program, died.
                self.broken();
                return Err(Errno::CONNRESET);
            }
            Err(error) if error != Errno::AGAIN && ready == 0 => {
                self.broken();
                return Err(error);
            }
            Ok(0) | Err(_) if ready > 0 => return Ok(None),
            Ok(0) | Err(_) => return Err(Errno::AGAIN),
            Ok(n) => n,
        };
        let generation = rx.generation;
        let head = rx.off.wrapping_add(ready as u64);
        let mut shut = false;
        match rx.judge(&frame[..n], head).map_err(|v| self.violated(v))? {
            Verdict::Wait if ready > 0 => return Ok(None),
            Verdict::Wait => return Err(Errno::AGAIN),
            Verdict::Cancelled => {}
            Verdict::Rewound { last } => {
                // The verdict is stored, then the frame is taken.
                rx.commit();
                let _ = recv_anchor(self.anchor, &mut frame, RecvFlags::empty());
                shut = last;
            }
        }
        bound.rx().indices.reader.sealed.store(1, Ordering::Release);
        Ok((!shut).then_some(generation))
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
                self.saw_end();
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
                    if self.record.is(status::RX_SHUT) {
                        return Err(Errno::AGAIN);
                    }
                    if self.record.is(status::BROKEN) {
                        return Ok(Some(0));
                    }
                    if matches!(rx.source(), Source::Raw { .. }) {
                        self.saw_end();
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
                self.saw_end();
                return match (self.record.is(status::RX_SHUT), self.record.is(status::BROKEN)) {
                    (true, _) => Err(Errno::AGAIN),
                    (_, true) => Ok(Some(0)),
                    _ => Ok(None),
                };
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

    /// The anchor has nothing more. That is the end of the stream, unless the application itself has shut it for reading:
    /// then more may still come. A reset is told otherwise.
    fn saw_end(&self) {
        if !self.record.is(status::RX_SHUT | status::BROKEN) {
            self.record.set_status(status::RX_EOF, status::RX_EOF);
        }
    }

    pub(super) fn learn(&self, rx: &mut RxState) {
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
}

/// What is left of the buffers behind so many bytes.
fn after<'a>(bufs: &'a mut [IoSliceMut<'_>], mut skip: usize) -> Vec<IoSliceMut<'a>> {
    let mut rest = Vec::with_capacity(bufs.len());
    for buf in bufs {
        let from = skip.min(buf.len());
        skip -= from;
        rest.push(IoSliceMut::new(&mut buf[from..]));
    }
    rest
}

/// Receives at most `limit` bytes into the buffers.
fn recv_clipped<'a>(
    anchor: BorrowedFd<'_>,
    bufs: &'a mut [IoSliceMut<'_>],
    limit: u64,
    flags: RecvFlags,
) -> Result<usize> {
    let total: u64 = bufs.iter().map(|b| b.len() as u64).sum();
    if total > limit && bufs.len() > 1 {
        let mut left = limit;
        let clip = |buf: &'a mut IoSliceMut<'_>| {
            let n = left.min(buf.len() as u64);
            left -= n;
            IoSliceMut::new(&mut buf[..n as usize])
        };
        let mut clipped: Vec<IoSliceMut<'_>> = bufs.iter_mut().map(clip).collect();
        let mut control = rustix::net::RecvAncillaryBuffer::default();
        let flags = flags | RecvFlags::DONTWAIT;
        return rustix::net::recvmsg(anchor, &mut clipped, &mut control, flags).map(|m| m.bytes);
    }
    if bufs.len() <= 1 {
        let first = bufs.iter_mut().find(|b| !b.is_empty());
        // Also without room the kernel says whether anything is there.
        let Some(first) = first else { return recv_anchor(anchor, &mut [], flags) };
        let most = (first.len() as u64).min(limit) as usize;
        return recv_anchor(anchor, &mut first[..most], flags);
    }
    let mut control = rustix::net::RecvAncillaryBuffer::default();
    rustix::net::recvmsg(anchor, bufs, &mut control, flags | RecvFlags::DONTWAIT).map(|m| m.bytes)
}
