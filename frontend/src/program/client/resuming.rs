//! When the agent dies: its connections go on without one, and are brought to the next.
//!
//! The records are in memory that this process maps as well, so nothing of a connection is lost with the agent, and nothing of it
//! changes. What is on a lane that needs the agent's backend goes back to the anchor at once, the rest when there is another
//! agent: that one has the segment of no lane. It is looked for by whoever makes a call, twice a second. It is given the records,
//! and told of each connection that is on the anchor both ways, which it opens with the backend as any.
//!
//! What several processes have is not brought to another agent: each of them would bring it. It goes on without one.

use super::{Client, DUE, MAIL, RETRY, is_confined, set_control};
use crate::carrier::Carrier;
use crate::program::conn::{Conn, Shared};
use crate::program::wait::clock;
use crate::program::{table, wait};
use crate::record::status;
use rustix::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vsocket_channel::message::{Lane, Message};

/// In place of an attachment: it is being closed.
pub(super) const NEVER: u32 = u32::MAX;
/// An agent that takes no messages is told after this.
pub(super) const LATER: Duration = Duration::from_millis(1);

/// Something is to be done after this time, if nothing is before.
pub(super) fn due_in(time: Duration) {
    due_at(clock() + time.as_nanos() as u64);
}

/// Something is to be done at the next call.
pub(super) fn due_now() {
    due_at(1);
}

fn due_at(at: u64) {
    let sooner = |due: u64| (due == 0 || due > at).then_some(at);
    let _ = DUE.fetch_update(Ordering::AcqRel, Ordering::Relaxed, sooner);
}

impl Client {
    /// Whether an agent has the connection.
    pub(super) fn attends(&self, conn: &Conn) -> bool {
        self.answered && self.carrier.is_some() && conn.attended.load(Ordering::Acquire) == self.attachment
    }

    /// Does what has become due; whether there is another control socket.
    pub(super) fn do_due(&mut self, due: u64) -> bool {
        if DUE.compare_exchange(due, 0, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return false;
        }
        if self.pid != std::process::id() {
            // A child that shares its parent's memory (`vfork`).
            due_in(RETRY);
            return false;
        }
        self.tell_untold();
        let had_none = self.carrier.is_none();
        if had_none && !self.conns.is_empty() {
            if is_confined() {
                self.forget_agent();
                return false;
            }
            self.attach();
        }
        if DUE.load(Ordering::Acquire) == 0 && self.is_unattended() {
            // Until all that can be brought has been, and the answer has been read.
            due_in(RETRY);
        }
        had_none && self.carrier.is_some()
    }

    /// Whether a connection is to be brought to an agent, or there is none that has answered.
    fn is_unattended(&self) -> bool {
        let unattended = |conn: &Conn| conn.attended.load(Ordering::Acquire) == 0;
        !self.conns.is_empty() && (!self.answered || self.conns.values().any(|conn| unattended(conn)))
    }

    /// Says to an agent who we are, with what an agent before has left.
    pub(super) fn present(&self, to: &Carrier) -> bool {
        let message = Message::Attach { pid: std::process::id(), inherit: 0 };
        let kept = self.keep();
        let fds: Vec<BorrowedFd<'_>> =
            kept.iter().flat_map(|shared| [shared.memory.as_fd(), shared.watchdog.as_fd()]).collect();
        // The program may have closed what is not its own.
        to.send(&message, &fds).is_ok() || !fds.is_empty() && to.send(&message, &[]).is_ok()
    }

    /// Notes which records are in use: nobody else will know.
    fn keep(&self) -> Option<&Arc<Shared>> {
        let shared = self.shared.as_ref()?;
        let end = self.conns.keys().max()? + 1;
        for n in 0..end {
            let used = u32::from(self.conns.contains_key(&n));
            shared.records.record(n)?.kept.store(used, Ordering::Relaxed);
        }
        shared.records.header().kept.store(end, Ordering::Release);
        Some(shared)
    }

    /// Another agent has taken the records over.
    pub(super) fn resume_all(&self) {
        for conn in self.conns.values() {
            if let Some(bound) = conn.bound() {
                // What is not written now, the sender's next call writes.
                let _ = conn.endpoint().leave(bound.generation);
                conn.left.store(0, Ordering::Release);
                conn.stir();
            }
            self.resume(conn);
        }
    }

    /// Brings a connection to the agent, if that one does not have it and it is on the anchor both ways. Half of one cannot be
    /// on a lane; and what others are to find in the kernel's socket stays there.
    pub(super) fn resume(&self, conn: &Conn) {
        let ours =
            self.shared.as_ref().is_some_and(|shared| std::ptr::eq(Arc::as_ptr(shared), conn.shared()));
        if !self.answered || !ours || wait::is_shared() || conn.attended.load(Ordering::Acquire) != 0 {
            return;
        }
        let (record, endpoint) = (conn.record(), conn.endpoint());
        let ends = status::BROKEN | status::RX_EOF | status::RX_SHUT | status::TX_SHUT;
        if record.is(ends) || record.leave.load(Ordering::Acquire) == u32::MAX || !endpoint.has_left() {
            return;
        }
        let index = conn.index.load(Ordering::Relaxed);
        let message =
            endpoint.last_generation().map(|generation| Message::Resume { record: index, generation });
        if message.is_none_or(|message| !self.tell_now(&message, &[conn.anchor()])) {
            return due_in(LATER);
        }
        conn.attended.store(self.attachment, Ordering::Release);
        conn.left.store(conn.bound().map_or(0, |bound| bound.generation), Ordering::Release);
    }

    /// Nothing is left of what was opened with an agent; whatever is still there goes on without one.
    pub(super) fn forget_agent(&mut self) {
        set_control(-1);
        self.carrier = None;
        self.answered = false;
        self.shared = None;
        self.conns.clear();
        self.opening.clear();
        self.outbox.get_mut().clear();
        self.granted.clear();
        MAIL.store(std::ptr::null_mut(), Ordering::Release);
    }

    /// The agent has gone: what is on a lane that needs it goes back to the anchor, the rest goes on as it is.
    pub(super) fn lost_agent(&mut self) {
        for conn in self.conns.values() {
            let endpoint = conn.endpoint();
            if let Some(bound) = endpoint.bound {
                endpoint.close_unopened(bound.generation);
                if bound.lane == Lane::Fabric {
                    let _ = endpoint.leave(bound.generation);
                }
            }
            conn.record().ready.store(0, Ordering::Release);
            if conn.attended.load(Ordering::Acquire) != NEVER {
                conn.attended.store(0, Ordering::Release);
            }
            conn.kernel_in.store(1, Ordering::Release);
            conn.stir();
        }
        for (fd, epoch) in self.opening.values() {
            if let Some(slot) = super::tracking::opening(*fd, *epoch) {
                slot.phase.store(table::WANTED, Ordering::Release);
            }
        }
        self.retry_at = Some(Instant::now() + RETRY);
        if self.conns.is_empty() || wait::is_shared() || is_confined() {
            return self.forget_agent();
        }
        set_control(-1);
        self.carrier = None;
        self.answered = false;
        self.opening.clear();
        self.outbox.get_mut().clear();
        self.granted.clear();
        due_in(RETRY);
    }
}
