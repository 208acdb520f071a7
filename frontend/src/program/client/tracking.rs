//! A connection that has proved worth it is tracked with the agent, and gets a record.
//!
//! What is counted must be what the kernel has counted. Of a connection that was found, or that a fork has copied, another process
//! may have moved some: then the kernel's counters are taken, and the agent looks whether that process holds it still.

use super::{Client, resuming};
use crate::kernel;
use crate::program::conn::Conn;
use crate::program::table::{self, Slot};
use crate::program::{epoll, kin};
use crate::record::Past;
use rustix::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use vsocket_channel::message::Message;
use vsocket_channel::reason::Reason;

/// The slot of a descriptor that waits for an answer, if it is the same still.
pub(super) fn opening(fd: i32, epoch: u32) -> Option<&'static Slot> {
    table::slot(fd).filter(|slot| {
        slot.epoch.load(Ordering::Relaxed) == epoch && slot.phase.load(Ordering::Relaxed) == table::OPENING
    })
}

/// What the kernel has counted, if whatever another process has done is not to be seen otherwise.
fn counted(anchor: BorrowedFd<'_>, slot: &Slot) -> Option<(u64, u64)> {
    slot.forget_mode();
    let counters = kernel::counters(anchor, slot.connector()).ok().flatten()?;
    kernel::is_as_new(anchor).then_some((counters.tx, counters.rx))
}

/// Counts what the kernel has counted; false: not now.
fn recount(anchor: BorrowedFd<'_>, slot: &Slot) -> bool {
    match slot.adopt(|| counted(anchor, slot).map(|moved| slot.recount(moved))) {
        Some(Some(())) => true,
        Some(None) => {
            slot.refused();
            false
        }
        // A call is inside the kernel: at the next.
        None => false,
    }
}

impl Client {
    pub(super) fn track(&mut self, fd: i32, slot: &'static Slot) {
        // SAFETY: the application's descriptor, in a call on it.
        let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
        if kernel::tuple(anchor).is_err() {
            slot.leave_alone();
            return;
        }
        if (slot.is_found() || slot.is_copied()) && !recount(anchor, slot) {
            return;
        }
        let (connector, found) = (slot.connector(), slot.is_found());
        let handle = self.next_handle;
        let (tx, rx) = slot.moved();
        let message = Message::Track { handle, tx, rx, connector, found };
        if self.tell_now(&message, &[anchor]) {
            self.next_handle += 1;
            self.opening.insert(handle, (fd, slot.epoch.load(Ordering::Relaxed)));
            slot.phase.store(table::OPENING, Ordering::Release);
            epoll::watch_control(fd);
        }
    }

    pub(super) fn tracked(&mut self, handle: u64, record: u32, past: Option<Past>) {
        let Some((fd, epoch)) = self.opening.remove(&handle) else { return };
        let (Some(slot), Some(shared)) = (opening(fd, epoch), self.shared.clone()) else {
            self.tell(Message::Closed { record });
            return;
        };
        if !kin::is_alone(fd, slot) {
            // Forked while it was asked for.
            self.tell(Message::Closed { record });
            return slot.again();
        }
        // SAFETY: the descriptor of a slot that waits for the answer; another in its place is not what was counted.
        let anchor = unsafe { BorrowedFd::borrow_raw(fd) };
        let made = slot.adopt(|| {
            if slot.is_found() && counted(anchor, slot) != Some(slot.moved()) {
                // Whoever had it has used it until the agent looked.
                return None;
            }
            let conn = Conn::make(fd, record, &shared)?;
            let (tx, rx) = slot.moved();
            if slot.is_found() {
                conn.record().init_after(past, (tx, rx), slot.connector());
            } else {
                conn.record().init(tx, rx, slot.connector());
            }
            conn.attended.store(self.attachment, Ordering::Release);
            slot.hold(conn.clone());
            Some(conn)
        });
        match made {
            Some(Some(conn)) => {
                epoll::hold(fd, &conn);
                self.conns.insert(record, conn);
            }
            Some(None) => {
                self.tell(Message::Closed { record });
                slot.again();
            }
            None => {
                // Another thread's call is inside the kernel, and does not wait there: in a moment.
                self.opening.insert(handle, (fd, epoch));
                self.granted.push((handle, record, past));
                resuming::due_in(resuming::LATER);
            }
        }
    }

    pub(super) fn declined(&mut self, handle: u64, reason: Reason) {
        let Some((fd, epoch)) = self.opening.remove(&handle) else { return };
        let Some(slot) = opening(fd, epoch) else { return };
        // Whoever had it closes it in a moment, or goes on with it.
        if slot.is_found() && reason == Reason::HeldByOthers {
            slot.refused();
        } else if slot.is_found() && matches!(reason, Reason::Busy | Reason::TupleTaken) {
            slot.again();
        } else if reason == Reason::Busy {
            slot.phase.store(table::WANTED, Ordering::Release);
        } else {
            slot.leave_alone();
        }
    }
}
