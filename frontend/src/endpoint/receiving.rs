//! Receiving: raw, guarded, from the ring, and what it left behind.

use super::{Endpoint, Result, lock_errno, recv_anchor};
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
use vsocket_channel::message::Lane;

/// More is not peeked at only to see what comes behind it.
const PEEKED_MOST: u64 = 16 << 20;

/// What the anchor has behind a stay.
#[derive(Clone, Copy)]
struct Behind {
    /// So many bytes of the anchor come before it.
    at: u64,
    /// Its first byte's stream offset.
    resume: u64,
    /// How much it is.
    n: u64,
}

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
        let nothing = bufs.iter().all(|b| b.is_empty());
        let got = {
            let mut rx = self.record.rx.take().map_err(lock_errno)?.open();
            self.recover_rx(&mut rx);
            let got = if peek {
                self.peek_on(&mut rx, bufs, look || shut, &mut ended)
            } else {
                self.recv_on(&mut rx, bufs, look || shut, &mut ended)
            };
            self.settle_rx(&rx);
            match got {
                // A socket that was aborted here is not connected any more; the application knows only of the reset, and
                // hears of it once, as from the kernel.
                Err(Errno::NOTCONN | Errno::CONNRESET | Errno::PIPE) if self.record.is(status::BROKEN) => {
                    self.reset_read()
                }
                Err(Errno::AGAIN) if shut => Ok(0),
                // Who asks for nothing has it, before what is there.
                Ok(0) if nothing && self.unread_on(&mut rx).is_some_and(|n| n > 0) => Ok(0),
                // Behind the end of the stream nobody is told of a reset.
                Ok(0) if self.record.is(status::BROKEN) && !self.record.is(status::RX_EOF) => {
                    self.reset_read()
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

    /// What a reader hears of a reset. If the peer's FIN had come before it, the kernel lets him read that, and keeps the
    /// error for who sends.
    fn reset_read(&self) -> Result<usize> {
        let error = self.reset_errno();
        if error != Errno::PIPE && self.record.take(status::UNTOLD) { Err(error) } else { Ok(0) }
    }

    /// Receives from one carrier after the other, while each goes on where the one before has ended: for the application it
    /// is one queue.
    fn recv_on(
        &self,
        rx: &mut Guard<'_, RxState>,
        bufs: &mut [IoSliceMut<'_>],
        look: bool,
        ended: &mut u32,
    ) -> Result<usize> {
        let room: usize = bufs.iter().map(|b| b.len()).sum();
        let mut was = rx.source();
        let mut done = self.recv_locked(rx, bufs, false, look, ended)?;
        while done > 0 && done < room && self.goes_on(rx, was, look) {
            was = rx.source();
            match self.recv_locked(rx, &mut after(bufs, done), false, true, ended) {
                Ok(n @ 1..) => done += n,
                Err(error) if error != Errno::AGAIN => {
                    // The kernel has told it, and will not again.
                    self.broken(error);
                    break;
                }
                _ => break,
            }
        }
        Ok(done)
    }

    /// Whether more is there behind what was just taken from `was`.
    fn goes_on(&self, rx: &RxState, was: Source, look: bool) -> bool {
        let changed = std::mem::discriminant(&rx.source()) != std::mem::discriminant(&was);
        match (rx.source(), self.bound) {
            (Source::Residue { .. }, _) => true,
            (Source::Raw { .. }, _) => changed && self.queued() > 0,
            (Source::Ring { .. }, Some(bound)) => {
                let empty = bound.rx().available(rx.off) == Ok(0);
                if empty { self.may_be_over(bound, look) && self.queued() > 0 } else { changed }
            }
            _ => false,
        }
    }

    /// Whether a look at the anchor is worth a system call while the ring is read: something says that the stay has ended.
    /// On a fabric lane the sender's own word does not come across, but an edge of the anchor may be one.
    fn may_be_over(&self, bound: &Bound, look: bool) -> bool {
        bound.rx().indices.stay.sealed.load(Ordering::Acquire) != 0
            || self.record.leave.load(Ordering::Acquire) >= bound.generation
            || (look || self.record.is(status::BROKEN)) && bound.lane == Lane::Fabric
    }

    fn queued(&self) -> u64 {
        kernel::unread(self.anchor).unwrap_or(0)
    }

    /// Peeks at all that is there, whichever carriers have it.
    fn peek_on(
        &self,
        rx: &mut Guard<'_, RxState>,
        bufs: &mut [IoSliceMut<'_>],
        look: bool,
        ended: &mut u32,
    ) -> Result<usize> {
        self.learn(rx);
        if let (Source::Ring { generation }, Some(bound)) = (rx.source(), self.bound) {
            if bound.generation == generation && self.queued() > 0 {
                // Its end is here already. What the ring still has is read as its residue.
                *ended = self.judge(rx, bound).ok().flatten().unwrap_or(0);
            }
        }
        let done = self.recv_locked(rx, bufs, true, look, ended)?;
        Ok(done + self.peek_beyond(rx, bufs, done))
    }

    /// So much was peeked of the first carrier, perhaps all that it has: then goes on with those behind it.
    fn peek_beyond(&self, rx: &RxState, bufs: &mut [IoSliceMut<'_>], done: usize) -> usize {
        let at = rx.off + done as u64;
        let more = match rx.source() {
            Source::Raw { guarded: true, .. } if done > 0 && rx.knows_stay() && at == rx.start => {
                self.stay_and_beyond(rx)
            }
            Source::Residue { to } if at == to => self.raw_from(rx.kept - rx.raw),
            _ => None,
        };
        let more = more.unwrap_or_default();
        let mut copied = 0;
        for mut buf in after(bufs, done) {
            let n = buf.len().min(more.len() - copied);
            buf[..n].copy_from_slice(&more[copied..copied + n]);
            copied += n;
        }
        copied
    }

    /// All raw bytes before the ring's were peeked: a copy of those, and of what comes behind them.
    fn stay_and_beyond(&self, rx: &RxState) -> Option<Vec<u8>> {
        let bound = self.bound_for(rx.generation)?;
        let behind = self.behind(rx);
        let mut bytes = vec![0; bound.rx().available(rx.start).ok()?];
        bound.rx().bytes.get(rx.start, &mut bytes);
        let head = rx.start + bytes.len() as u64;
        if let Some(Behind { at, resume, .. }) = behind {
            bytes.extend(self.raw_from(at + head.checked_sub(resume)?).unwrap_or_default());
        }
        Some(bytes)
    }

    /// A copy of the anchor's bytes behind the first so many.
    fn raw_from(&self, skip: u64) -> Option<Vec<u8>> {
        let queued = kernel::unread(self.anchor).ok().filter(|queued| *queued <= PEEKED_MOST)?;
        let mut bytes = vec![0; queued as usize];
        let n = recv_anchor(self.anchor, &mut bytes, RecvFlags::PEEK).ok()?;
        bytes.truncate(n);
        (skip <= n as u64).then(|| bytes.split_off(skip as usize))
    }

    /// What the anchor has behind the open generation's stay, if that has ended: nothing of it is taken.
    fn behind(&self, rx: &RxState) -> Option<Behind> {
        let before = rx.start.saturating_sub(rx.raw);
        let queued = kernel::unread(self.anchor).ok()?;
        if queued <= before || before > PEEKED_MOST {
            return None;
        }
        let mut bytes = vec![0; before as usize + REWIND_LEN];
        let n = recv_anchor(self.anchor, &mut bytes, RecvFlags::PEEK).ok()?;
        let (resume, frame) = rx.resumes(bytes.get(before as usize..n)?)?;
        let at = before + frame;
        Some(Behind { at, resume, n: queued - at })
    }

    /// How many bytes could be received now, on whichever carrier. `None` if that cannot be told.
    pub fn unread(&self) -> Option<usize> {
        let mut rx = self.lock_rx().ok()?;
        let there = self.unread_on(&mut rx);
        self.settle_rx(&rx);
        there
    }

    fn unread_on(&self, rx: &mut RxState) -> Option<usize> {
        self.learn(rx);
        let raw = || kernel::unread(self.anchor).ok();
        if rx.knows_stay() && rx.off >= rx.kept {
            let before = rx.start.saturating_sub(rx.raw);
            let queued = raw()?;
            if queued < before {
                return Some((rx.raw + queued).saturating_sub(rx.off) as usize);
            }
            let behind = if queued > before { self.behind(rx) } else { None };
            // The ring may have been filled before the anchor was written: its index is read after it.
            let from = rx.off.max(rx.start);
            let head = from + self.bound_for(rx.generation)?.rx().available(from).ok()? as u64;
            let end = behind.map_or(head, |behind| head.max(behind.resume + behind.n));
            return Some((end - rx.off) as usize);
        }
        match rx.source() {
            Source::Residue { to } => {
                let beyond = raw()?.saturating_sub(rx.kept.saturating_sub(rx.raw));
                Some((to - rx.off + beyond) as usize)
            }
            Source::Raw { drop, .. } => Some(raw()?.saturating_sub(drop) as usize),
            Source::Ring { .. } => None,
        }
    }

    /// The anchor has something to say: looks whether the stay has ended.
    pub fn attend(&self) {
        let mut ended = 0;
        if let Ok(mut rx) = self.lock_rx() {
            self.learn(&mut rx);
            if let (Source::Ring { generation }, Some(bound)) = (rx.source(), self.bound) {
                // What the ring still has is read as its residue.
                let ready = self.defers_shutdown() || bound.rx().available(rx.off) == Ok(0);
                if bound.generation == generation && ready {
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
                    let broken = self.record.is(status::BROKEN);
                    if broken && self.queued() == 0 {
                        return Err(Errno::CONNRESET);
                    }
                    if !look && !broken && bound.rx().indices.stay.sealed.load(Ordering::Acquire) == 0 {
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
                self.found_over();
                return Err(Errno::CONNRESET);
            }
            Err(error) if error != Errno::AGAIN => {
                // The kernel has told it, and will not again; what the ring has is read before.
                self.broken(error);
                return if ready > 0 { Ok(None) } else { Err(error) };
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
            Verdict::Wait if kernel::has_ended(self.anchor) && self.queued() <= n as u64 => {
                // Nothing comes behind this part of a frame.
                self.found_over();
                return Err(Errno::CONNRESET);
            }
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
