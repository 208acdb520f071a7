//! Back to the anchor, whole: a program that knows of no lane is to find the rest of the stream there.
//!
//! What an application has not taken of a ring cannot be put into its kernel socket by anybody but the far end, which still has
//! it in the memory of its own ring. So the far end seals its stay where the application stands ([`TxState::seal_untaken`]),
//! and this end gives up what it has, once the anchor says that it comes again.

use super::{Endpoint, recv_anchor};
use crate::kernel;
use crate::lane::rx::{RxState, Verdict};
use crate::lane::tx::TxState;
use crate::memory::Bound;
use crate::record::{Guard, status};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::sync::atomic::Ordering;
use vsocket_channel::lane::{REWIND_LEN, Rewind};
use vsocket_channel::message::Lane;

/// Raw bytes before a stay that are looked through for its end.
const BEFORE_MOST: u64 = 16 << 20;
/// So many bytes any kernel socket takes in without a reader.
const COMES_AT_ONCE: u64 = 32 << 10;

/// What bringing a direction back has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Return {
    /// The anchor's next byte is the application's.
    Done,
    /// The far end has not left yet.
    Wait,
    /// The application has bytes before it that only a ring has.
    Stuck,
}

impl Endpoint<'_> {
    /// Where a stay that is about to be sealed is to go on, if that is where the far application stands. `None`: where the
    /// far end says, because nobody asks for more, or the memory of the ring has it no longer.
    pub(super) fn untaken(&self, tx: &TxState, bound: &Bound) -> Option<u64> {
        if self.record.untaken.load(Ordering::Acquire) < tx.generation {
            return None;
        }
        let ring = bound.tx();
        let taken = match bound.lane {
            Lane::Fabric => &ring.indices.reader.taken,
            _ => &ring.indices.tail.tail,
        };
        let taken = taken.load(Ordering::Acquire);
        let there = (tx.start..=tx.off).contains(&taken) && tx.off - taken <= ring.bytes.len() as u64;
        there.then_some(taken)
    }

    /// Goes on with bringing what this end receives back to the anchor. The far end must have been asked to leave.
    pub fn take_back(&self) -> Return {
        let Ok(mut rx) = self.lock_rx() else { return Return::Stuck };
        let come = loop {
            if self.record.is(status::RX_EOF | status::BROKEN) {
                break Return::Done;
            }
            if let Some(come) = self.step_back(&mut rx) {
                break come;
            }
        };
        self.settle_rx(&rx);
        come
    }

    /// Whether what was given up of a ring has come over the anchor, as far as any kernel socket has room for it.
    pub fn has_come_back(&self) -> bool {
        let Some(bound) = self.bound else { return true };
        let direction = bound.rx().indices;
        if direction.stay.generation.load(Ordering::Acquire) != bound.generation {
            return true;
        }
        let head = direction.head.head.load(Ordering::Acquire);
        let due = head.saturating_sub(self.record.rx_off.load(Ordering::Acquire)).min(COMES_AT_ONCE);
        kernel::unread(self.anchor).is_ok_and(|there| there >= due)
    }

    /// One step; `None` if there is another.
    fn step_back(&self, rx: &mut Guard<'_, RxState>) -> Option<Return> {
        if rx.off < rx.kept {
            return if rx.give_up_residue() { None } else { Some(Return::Stuck) };
        }
        if rx.generation == 0 {
            return self.drop_known(rx);
        }
        self.learn(rx);
        if rx.generation != 0 && rx.knows_stay() {
            return self.find_end(rx);
        }
        if let Some(bound) = self.bound_for(rx.generation) {
            if !bound.rx().indices.close_unopened(rx.generation) {
                return None;
            }
        }
        if rx.generation != 0 {
            rx.close();
        }
        None
    }

    /// Off the ring: takes away what the anchor has once more.
    fn drop_known(&self, rx: &mut Guard<'_, RxState>) -> Option<Return> {
        let known = rx.kept.saturating_sub(rx.raw);
        if known == 0 {
            return Some(Return::Done);
        }
        let mut scratch = [0; 4096];
        let most = known.min(scratch.len() as u64) as usize;
        match recv_anchor(self.anchor, &mut scratch[..most], RecvFlags::empty()) {
            Ok(n @ 1..) => {
                rx.took_raw(n as u64);
                None
            }
            Err(Errno::AGAIN) => Some(Return::Wait),
            Ok(0) | Err(_) => Some(Return::Done),
        }
    }

    /// In a stay: looks on the anchor for its end, which stands at S, perhaps behind raw bytes that nobody has taken.
    fn find_end(&self, rx: &mut Guard<'_, RxState>) -> Option<Return> {
        let before = rx.start.saturating_sub(rx.raw);
        match kernel::unread(self.anchor) {
            Ok(queued) if queued <= before => return Some(Return::Wait),
            Err(_) => return Some(Return::Done),
            Ok(_) if before > BEFORE_MOST => return Some(Return::Stuck),
            Ok(_) => {}
        }
        let mut bytes = vec![0; before as usize + REWIND_LEN];
        let Ok(n) = recv_anchor(self.anchor, &mut bytes, RecvFlags::PEEK) else { return Some(Return::Wait) };
        let end = bytes.get(before as usize..n).unwrap_or_default();
        let Some(first) = end.first() else { return Some(Return::Wait) };
        if before > 0 {
            if rx.is_escape(*first) {
                return Some(Return::Stuck);
            }
            // Cancelled before anything of it was taken.
            rx.close();
        } else {
            let Some(whole) = end.first_chunk::<REWIND_LEN>().filter(|_| rx.is_escape(*first)) else {
                if rx.is_escape(*first) {
                    return Some(Return::Wait);
                }
                return self.ended(rx, end);
            };
            if Rewind::decode(whole, *first).is_none_or(|rewind| rewind.resume > rx.off) {
                return Some(Return::Stuck);
            }
            return self.ended(rx, end);
        }
        self.seal_reader(rx.min_generation - 1);
        None
    }

    /// The end of the stay is there. Everything that the application has not taken comes behind it.
    fn ended(&self, rx: &mut Guard<'_, RxState>, end: &[u8]) -> Option<Return> {
        let (generation, taken) = (rx.generation, rx.off);
        match rx.judge(end, taken) {
            Ok(Verdict::Rewound { .. }) => {
                // The verdict is stored, then the frame is taken.
                rx.commit();
                let _ = recv_anchor(self.anchor, &mut [0; REWIND_LEN], RecvFlags::empty());
            }
            Ok(Verdict::Cancelled) => {}
            Ok(Verdict::Wait) => return Some(Return::Wait),
            Err(_) => return Some(Return::Stuck),
        }
        self.seal_reader(generation);
        None
    }

    fn seal_reader(&self, generation: u32) {
        if let Some(bound) = self.bound_for(generation) {
            bound.rx().indices.reader.sealed.store(1, Ordering::Release);
        }
    }
}
