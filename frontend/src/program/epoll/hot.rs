//! A connection in a set: what the application asked for, and whether it is to be reported.

use super::super::conn::{Conn, ConnRef, Member};
use super::super::poll;
use super::NOWHERE;
use crate::kernel;
use crate::record::status;
use rustix::event::PollFlags;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What the application asked for.
#[derive(Clone, Copy)]
pub(super) struct Interest {
    pub events: u32,
    pub data: u64,
}

impl Interest {
    /// `EPOLLONESHOT`.
    pub fn is_for_once(self) -> bool {
        self.events as i32 & libc::EPOLLONESHOT != 0
    }

    /// Whether `epoll_ctl(2)` allows it: `EPOLLEXCLUSIVE` goes with few others, and is for good.
    pub fn is_allowed(self, op: i32) -> bool {
        const BESIDE: i32 = libc::EPOLLIN
            | libc::EPOLLOUT
            | libc::EPOLLERR
            | libc::EPOLLHUP
            | libc::EPOLLWAKEUP
            | libc::EPOLLET
            | libc::EPOLLEXCLUSIVE;
        let events = self.events as i32;
        match op {
            _ if events & libc::EPOLLEXCLUSIVE == 0 => true,
            libc::EPOLL_CTL_ADD => events & !BESIDE == 0,
            libc::EPOLL_CTL_MOD => false,
            _ => true,
        }
    }
}

/// A connection in a set.
pub(super) struct Hot {
    pub fd: i32,
    pub conn: ConnRef,
    /// `None` after the application took it out: the kernel's registration stays.
    interest: Option<Interest>,
    /// `EPOLLONESHOT` has fired.
    spent: bool,
    /// How far the stream had come when an edge-triggered watcher was told last; `None` before the first time.
    told: Option<u64>,
    /// How often a receiving call had found nothing then.
    told_empty: u32,
    /// How often a send had been refused when it was told of room last; `None` if it was not told.
    told_room: Option<u32>,
    /// It was told of the end of the stream.
    told_end: bool,
    /// How often the application had shut it when it was told of that last.
    told_shut: u32,
    /// The ends, of a direction or of all, that it was told of.
    ends: PollFlags,
    /// Tells two uses of a descriptor number apart.
    pub serial: u32,
    /// It is looked at.
    pub watched: bool,
    /// Its slab among those of the set.
    pub slab: u32,
    /// By which the connection's users say that it has changed.
    pub member: Arc<Member>,
    /// Its number is this one, of ours: the application has closed the one that it gave.
    twin: Option<OwnedFd>,
}

impl Hot {
    pub fn new(fd: i32, conn: &ConnRef, interest: Interest, serial: u32, member: Arc<Member>) -> Self {
        let slab = NOWHERE;
        let conn = conn.clone();
        let mut hot = Self {
            fd,
            conn,
            interest: None,
            spent: false,
            told: None,
            told_empty: 0,
            told_room: None,
            told_end: false,
            told_shut: 0,
            ends: PollFlags::empty(),
            serial,
            watched: false,
            slab,
            member,
            twin: None,
        };
        hot.member.settle(serial);
        hot.renew(interest);
        hot
    }

    /// Whether it has been reported that is to be once.
    pub fn settle(&mut self, spent: bool) {
        self.spent = spent;
    }

    /// It goes on under another number.
    pub fn rename(&mut self, twin: OwnedFd, member: Arc<Member>) {
        self.conn.part(&self.member);
        member.settle(self.serial);
        (self.fd, self.twin, self.member) = (twin.as_raw_fd(), Some(twin), member);
        // By the number before it is looked at no longer.
        self.watched = false;
    }

    /// The number of ours under which it goes on, if it does.
    pub fn twin(&self) -> Option<BorrowedFd<'_>> {
        self.twin.as_ref().map(AsFd::as_fd)
    }

    /// Whether the application has it in the set.
    pub fn is_wanted(&self) -> bool {
        self.interest.is_some()
    }

    /// Whether only the kernel can answer a question that is open: it is asked at its next turn.
    pub fn is_open(&self) -> bool {
        let Some(interest) = self.interest.filter(|_| !self.spent) else { return false };
        let wanted = PollFlags::from_bits_retain((interest.events & 0xffff) as u16);
        self.edges() & concerns(wanted) != 0 || self.conn.record().is(status::TX_DRAINING)
    }

    /// The edges of the anchor that were not answered.
    fn edges(&self) -> u32 {
        let conn = &self.conn;
        conn.kernel_in.load(Ordering::Acquire) | conn.kernel_out.load(Ordering::Acquire) << 1
    }

    pub fn renew(&mut self, interest: Interest) {
        self.interest = Some(interest);
        self.spent = false;
        self.told = None;
        self.told_room = None;
        self.told_end = false;
        self.told_shut = self.conn.shut_calls.load(Ordering::Relaxed);
        self.ends = PollFlags::empty();
        // As after a MOD in the kernel: what is ready now is a new edge.
        if !self.conn.record().is(status::RX_RING) {
            self.conn.kernel_in.store(1, Ordering::Release);
        }
        if !self.conn.record().is(status::TX_RING) {
            self.conn.kernel_out.store(1, Ordering::Release);
        }
    }

    pub fn names(&self, conn: *const Conn) -> bool {
        std::ptr::eq(&raw const *self.conn, conn)
    }

    /// `epoll_ctl` on a connection that the kernel's set holds.
    pub fn control(&mut self, op: i32, interest: Option<Interest>) -> Result<(), Errno> {
        let exclusive = self.interest.is_some_and(|i| i.events as i32 & libc::EPOLLEXCLUSIVE != 0);
        match (op, interest, self.interest.is_some()) {
            (libc::EPOLL_CTL_MOD, _, true) if exclusive => Err(Errno::INVAL),
            (libc::EPOLL_CTL_ADD, Some(_), true) => Err(Errno::EXIST),
            (libc::EPOLL_CTL_ADD, Some(interest), false) | (libc::EPOLL_CTL_MOD, Some(interest), true) => {
                self.renew(interest);
                Ok(())
            }
            (libc::EPOLL_CTL_DEL, _, true) => {
                self.interest = None;
                Ok(())
            }
            (libc::EPOLL_CTL_MOD | libc::EPOLL_CTL_DEL, _, false) => Err(Errno::NOENT),
            _ => Err(Errno::INVAL),
        }
    }

    /// Whether nothing can be ready, by one look at the shared words: the usual case of a descriptor on its lane.
    fn quiet(&self, events: u32) -> bool {
        let record = self.conn.record();
        let bits = record.status.load(Ordering::Acquire);
        let usual = status::RX_RING | status::RX_OPEN | status::TX_RING;
        let only_in = events as i32 & (libc::EPOLLIN | libc::EPOLLOUT) == libc::EPOLLIN;
        match self.conn.bound() {
            Some(bound) if only_in && bits == usual => {
                bound.rx().indices.head.head.load(Ordering::Acquire) == record.rx_off.load(Ordering::Relaxed)
            }
            _ => false,
        }
    }

    /// The event to report, if there is one. `asking`: the kernel may be asked about anchors that had an edge.
    pub fn event(&mut self, asking: bool) -> Option<libc::epoll_event> {
        let interest = self.interest.filter(|_| !self.spent)?;
        if !asking && self.quiet(interest.events) {
            return None;
        }
        let wanted = PollFlags::from_bits_retain((interest.events & 0xffff) as u16);
        let mut ready = poll::ring_events(&self.conn, wanted);
        let edged = self.conn.kernel_in.load(Ordering::Acquire) != 0;
        let draining = self.conn.record().is(status::TX_DRAINING);
        let mut pending = false;
        // A report that is made anyway is whole: with what only the kernel can say.
        let part = !ready.is_empty() && (edged || !poll::anchor_decides(&self.conn, wanted).is_empty());
        if part || asking && (self.edges() & concerns(wanted) != 0 || draining) {
            // Cleared first: an edge that comes while the kernel is asked stays.
            self.conn.kernel_in.store(0, Ordering::Release);
            self.conn.kernel_out.store(0, Ordering::Release);
            (ready, pending) = self.conn.stirring(|| poll::events_now(&self.conn, wanted));
            // What the anchor had, it may still have at the next look; what a ring has, the ring says.
            let record = self.conn.record();
            let broken = ready.intersects(PollFlags::HUP | PollFlags::ERR);
            if broken || pending || (ready.contains(PollFlags::IN) && !record.is(status::RX_RING)) {
                self.conn.kernel_in.store(1, Ordering::Release);
            }
            if ready.contains(PollFlags::OUT) && !record.is(status::TX_RING) {
                self.conn.kernel_out.store(1, Ordering::Release);
            }
        }
        if ready.is_empty() {
            return None;
        }
        let asks_for_input = wanted.intersects(PollFlags::IN | PollFlags::RDNORM);
        if interest.events as i32 & libc::EPOLLET != 0
            && !self.new_edge(ready, asks_for_input, pending, edged)
        {
            return None;
        }
        if interest.is_for_once() {
            self.spent = true;
        }
        Some(libc::epoll_event { events: u32::from(ready.bits()), u64: interest.data })
    }

    /// Whether there is an event to report, which there stays.
    pub fn peek(&mut self) -> bool {
        let kept = (
            self.spent,
            self.told,
            self.told_empty,
            self.told_room,
            self.told_end,
            self.told_shut,
            self.ends,
        );
        let is_ready = self.event(true).is_some();
        if is_ready {
            (
                self.spent,
                self.told,
                self.told_empty,
                self.told_room,
                self.told_end,
                self.told_shut,
                self.ends,
            ) = kept;
            self.conn.kernel_in.store(1, Ordering::Release);
            self.conn.kernel_out.store(1, Ordering::Release);
        }
        is_ready
    }

    /// Edge-triggered: whether something has arrived, or room has come, since the last report.
    fn new_edge(&mut self, ready: PollFlags, asks_for_input: bool, pending: bool, edged: bool) -> bool {
        // The kernel is asked again at its next edge; but other places in sets may not have asked at this one.
        let shared = u32::from(self.conn.is_member_twice());
        self.conn.kernel_in.store(shared | u32::from(pending), Ordering::Release);
        self.conn.kernel_out.store(shared, Ordering::Release);
        let arrived = self.arrived(edged);
        let taken = self.conn.record().rx_off.load(Ordering::Acquire);
        // What came after the look at `ready` is the next one's.
        let late = !ready.contains(PollFlags::IN) && arrived.is_some_and(|arrived| arrived > taken);
        // Who has found nothing knows of nothing beyond that, whatever it was told of: it may come again over the anchor.
        let empty = self.conn.empty.load(Ordering::Acquire);
        let told = if empty == self.told_empty { self.told } else { self.told.map(|told| told.min(taken)) };
        let blocked = self.conn.blocked.load(Ordering::Relaxed);
        let ends = ready & (PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR | PollFlags::PRI);
        // What is ready is told at an edge of what was asked for, also if that has been read meanwhile.
        let data =
            asks_for_input && !late && arrived.is_none_or(|arrived| told.is_none_or(|told| arrived > told));
        let room = ready.contains(PollFlags::OUT) && self.told_room != Some(blocked);
        // Also who asked for neither is told of the end of the stream, and that the application has shut it.
        let shut = self.conn.shut_calls.load(Ordering::Relaxed);
        let end = edged && !self.told_end && self.stream_has_ended();
        let new = data || room || end || shut != self.told_shut || !self.ends.contains(ends);
        if new {
            // Nobody can tell while the lane's lock is taken; then the next look is an edge too.
            (self.told, self.told_empty) = (if late { told } else { arrived }, empty);
            self.ends |= ends;
            self.told_end |= end;
            self.told_shut = shut;
            if ready.contains(PollFlags::OUT) {
                self.told_room = Some(blocked);
            }
        }
        new
    }

    fn stream_has_ended(&self) -> bool {
        self.conn.record().is(status::RX_EOF) || kernel::has_ended(self.conn.anchor())
    }

    /// How far the stream has come, whatever carries it; beyond the ring only if the anchor had an edge.
    fn arrived(&self, edged: bool) -> Option<u64> {
        let endpoint = self.conn.endpoint();
        if !edged && endpoint.record.is(status::RX_RING) {
            return endpoint.bound.map(|b| b.rx().indices.head.head.load(Ordering::Acquire));
        }
        let taken = endpoint.record.rx_off.load(Ordering::Acquire);
        endpoint.unread().map(|n| taken + n as u64)
    }
}

impl Drop for Hot {
    fn drop(&mut self) {
        self.conn.part(&self.member);
    }
}

/// The edges that matter to who wants this.
fn concerns(wanted: PollFlags) -> u32 {
    // Errors and hang-ups are reported to everybody, and come with this edge.
    1 | u32::from(wanted.contains(PollFlags::OUT)) << 1
}
