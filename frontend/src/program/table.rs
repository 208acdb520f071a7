//! The descriptor table: what is known of each descriptor number.

use super::conn::{Conn, ConnRef};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Descriptors from here on are not followed.
pub const MAX_FDS: usize = 65536;

/// Not followed: every call is the kernel's.
pub const NONE: u8 = 0;
/// Counted.
pub const COUNTED: u8 = 1;
/// Worth opening; blocking calls already wait outside the kernel's recv and send, so that it can be.
pub const WANTED: u8 = 2;
/// Opened with the agent; the answer is outstanding.
pub const OPENING: u8 = 3;
/// Has a connection object.
pub const HELD: u8 = 4;

/// What a connection is to prove is doubled no more often.
const MOST_REFUSED: u8 = 10;

/// What is known of one descriptor number.
#[repr(align(64))]
pub struct Slot {
    /// `NONE` … `HELD`.
    pub phase: AtomicU8,
    /// This end did the connect.
    connector: AtomicU8,
    /// 1: it came from another process, see [`super::found`]; 2: a fork has copied it, see [`super::kin`].
    strange: AtomicU8,
    /// 1: O_NONBLOCK is set, 2: it is not, 0: unknown.
    nonblock: AtomicU8,
    /// The last direction of travel: 1 sent, 2 received.
    last: AtomicU8,
    /// Calls inside the kernel on this descriptor.
    inside: AtomicU32,
    /// 1 while a thread turns the slot into a held one: nobody may enter the kernel meanwhile.
    gate: AtomicU32,
    /// Times the direction of travel turned.
    turns: AtomicU32,
    /// Distinguishes one use of the number from the next.
    pub epoch: AtomicU32,
    /// Bytes sent and received.
    tx: AtomicU64,
    rx: AtomicU64,
    /// What had moved when it was last found not to be ours alone.
    since: AtomicU64,
    /// How often the agent has refused it for now.
    refused: AtomicU8,
    /// Who else may hold it: see [`super::kin`].
    pub kin: AtomicU32,
    conn: AtomicPtr<Conn>,
    /// The epoll set of this number, if it is one.
    pub epoll: AtomicPtr<super::epoll::EpollSet>,
}

static SLOTS: [Slot; MAX_FDS] = [const { Slot::new() }; MAX_FDS];

/// Some descriptor has been followed.
static FOLLOWED: AtomicBool = AtomicBool::new(false);

/// Whether any descriptor has ever been followed.
pub fn has_followed() -> bool {
    FOLLOWED.load(Ordering::Relaxed)
}

/// The slot of a descriptor number, if it is in the table's range.
#[inline]
pub fn slot(fd: i32) -> Option<&'static Slot> {
    SLOTS.get(usize::try_from(fd).ok()?)
}

/// The slot of a descriptor that is followed.
#[inline]
pub fn followed(fd: i32) -> Option<&'static Slot> {
    slot(fd).filter(|s| s.phase.load(Ordering::Relaxed) != NONE)
}

/// Above this number no slot has been in use so far: looks over all of them, as before each fork, end there.
static IN_USE: AtomicU32 = AtomicU32::new(0);

/// Numbers that may be followed or be a set that we are to be asked about, a byte each: most descriptors in a list are others',
/// and are told so by one load, without a branch.
static MAYBE: [AtomicU8; MAX_FDS] = [const { AtomicU8::new(0) }; MAX_FDS];
/// The same, a bit each.
static MAYBE_OF: [AtomicU64; MAX_FDS / 64] = [const { AtomicU64::new(0) }; MAX_FDS / 64];

/// A number beyond the table looks like one within it, and is found out at the slot.
#[inline]
fn maybe(fd: i32) -> u8 {
    const { assert!(MAX_FDS == 1 << 16) };
    MAYBE[usize::from(fd as u16)].load(Ordering::Relaxed)
}

/// Whether a descriptor may be followed; its slot knows.
#[inline]
pub fn may_follow(fd: i32) -> bool {
    maybe(fd) != 0
}

/// Whether one of these may be, or be a set that we are to be asked about.
#[inline]
pub fn may_follow_any(fds: &[libc::pollfd]) -> bool {
    let (fours, rest) = fds.as_chunks::<4>();
    let four = |of: &[libc::pollfd; 4]| maybe(of[0].fd) | maybe(of[1].fd) | maybe(of[2].fd) | maybe(of[3].fd);
    let any = fours.iter().fold(0, |any, of| any | four(of));
    rest.iter().fold(any, |any, one| any | maybe(one.fd)) != 0
}

/// Of 64 numbers from `64 * n` on, those that may be.
#[inline]
pub fn may_follow_of(n: usize) -> u64 {
    MAYBE_OF.get(n).map_or(0, |word| word.load(Ordering::Relaxed))
}

/// All slots in use, with their numbers.
pub fn all() -> impl Iterator<Item = (i32, &'static Slot)> {
    let used = IN_USE.load(Ordering::Relaxed) as usize;
    (0i32..).zip(&SLOTS[..used.min(MAX_FDS)]).filter(|(_, s)| s.phase.load(Ordering::Relaxed) != NONE)
}

impl Slot {
    const fn new() -> Self {
        Self {
            phase: AtomicU8::new(NONE),
            connector: AtomicU8::new(0),
            strange: AtomicU8::new(0),
            nonblock: AtomicU8::new(0),
            last: AtomicU8::new(0),
            inside: AtomicU32::new(0),
            gate: AtomicU32::new(0),
            turns: AtomicU32::new(0),
            epoch: AtomicU32::new(0),
            tx: AtomicU64::new(0),
            rx: AtomicU64::new(0),
            since: AtomicU64::new(0),
            refused: AtomicU8::new(0),
            kin: AtomicU32::new(0),
            conn: AtomicPtr::new(std::ptr::null_mut()),
            epoll: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Begins to follow a fresh connection.
    pub fn follow(&self, connector: bool) {
        self.follow_as(connector, false);
    }

    /// Begins to follow a connection that another process has had. What that one has moved is not counted so far.
    pub fn follow_found(&self, connector: bool) {
        self.follow_as(connector, true);
    }

    fn follow_as(&self, connector: bool, found: bool) {
        self.forget_mode();
        self.refused.store(0, Ordering::Relaxed);
        self.strange.store(u8::from(found), Ordering::Relaxed);
        for word in [&self.tx, &self.rx, &self.since] {
            word.store(0, Ordering::Relaxed);
        }
        self.kin.store(super::kin::NOBODY, Ordering::Relaxed);
        self.turns.store(0, Ordering::Relaxed);
        self.last.store(0, Ordering::Relaxed);
        self.connector.store(u8::from(connector), Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::Relaxed);
        FOLLOWED.store(true, Ordering::Relaxed);
        self.phase.store(COUNTED, Ordering::SeqCst);
        self.seen();
    }

    fn number(&self) -> usize {
        (std::ptr::from_ref(self).addr() - SLOTS.as_ptr().addr()) / size_of::<Self>()
    }

    /// Its number is not another's from now on.
    pub fn seen(&self) {
        let number = self.number();
        IN_USE.fetch_max(number as u32 + 1, Ordering::Relaxed);
        MAYBE_OF[number / 64].fetch_or(1 << (number % 64), Ordering::SeqCst);
        MAYBE[number].store(1, Ordering::SeqCst);
    }

    /// Its number is as another's from now on, unless that `matters` which has come of it meanwhile.
    pub fn unseen(&self, matters: impl FnOnce() -> bool) {
        let number = self.number();
        MAYBE[number].store(0, Ordering::SeqCst);
        MAYBE_OF[number / 64].fetch_and(!(1 << (number % 64)), Ordering::SeqCst);
        if self.phase.load(Ordering::SeqCst) != NONE || matters() {
            // And what it is seen by may be what was taken away.
            self.seen();
        }
    }

    /// Every call is the kernel's from now on.
    pub fn leave_alone(&self) {
        self.phase.store(NONE, Ordering::SeqCst);
        self.unseen(|| !self.epoll.load(Ordering::SeqCst).is_null());
    }

    /// It has proved worth opening; false if another thread has gone on with it, which must not be undone.
    pub fn want(&self) -> bool {
        let was = self.phase.compare_exchange(COUNTED, WANTED, Ordering::AcqRel, Ordering::Acquire);
        matches!(was, Ok(_) | Err(WANTED))
    }

    /// It was worth opening and cannot be now: it is to prove it once more.
    pub fn again(&self) {
        let (tx, rx) = self.moved();
        self.since.store(tx + rx, Ordering::Relaxed);
        self.turns.store(0, Ordering::Relaxed);
        self.phase.store(COUNTED, Ordering::Release);
    }

    /// As [`again`](Self::again), and it is to prove it by twice as much as the time before.
    pub fn refused(&self) {
        let times = self.refused.load(Ordering::Relaxed);
        self.refused.store((times + 1).min(MOST_REFUSED), Ordering::Relaxed);
        self.again();
    }

    /// Bytes that count towards its being worth it.
    pub fn shown(&self) -> u64 {
        let (tx, rx) = self.moved();
        (tx + rx - self.since.load(Ordering::Relaxed).min(tx + rx)) >> self.refused.load(Ordering::Relaxed)
    }

    /// Stops following; the connection object, if there was one.
    pub fn forget(&self) -> Option<ConnRef> {
        self.leave_alone();
        self.nonblock.store(0, Ordering::Relaxed);
        ConnRef::take(&self.conn)
    }

    /// This end did the connect.
    pub fn connector(&self) -> bool {
        self.connector.load(Ordering::Relaxed) != 0
    }

    /// Whether it came from another process.
    pub fn is_found(&self) -> bool {
        self.strange.load(Ordering::Relaxed) == 1
    }

    /// Whether a fork has copied it: another process may have moved what is not counted here.
    pub fn is_copied(&self) -> bool {
        self.strange.load(Ordering::Relaxed) == 2
    }

    /// Another process has it from now on, whose calls are not counted here. One that is not opened so far is as one that was found.
    pub fn give_away(&self) {
        self.strange.store(1, Ordering::Relaxed);
        if matches!(self.phase.load(Ordering::Relaxed), WANTED | OPENING) {
            self.again();
        }
    }

    /// A fork copies it.
    pub fn copied(&self) {
        let _ = self.strange.compare_exchange(0, 2, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The kernel has counted all that was moved, by whomever: from here on it is counted on, while no call is inside the kernel.
    /// Where another process has moved something, it is as one that was found.
    pub fn recount(&self, moved: (u64, u64)) {
        if self.moved() == moved {
            return;
        }
        self.strange.store(1, Ordering::Relaxed);
        self.tx.store(moved.0, Ordering::Relaxed);
        self.rx.store(moved.1, Ordering::Relaxed);
    }

    /// Bytes sent and received while the descriptor was counted.
    pub fn moved(&self) -> (u64, u64) {
        (self.tx.load(Ordering::Relaxed), self.rx.load(Ordering::Relaxed))
    }

    /// Times the direction of travel turned.
    pub fn turns(&self) -> u32 {
        self.turns.load(Ordering::Relaxed) >> self.refused.load(Ordering::Relaxed)
    }

    /// Calls inside the kernel.
    pub fn inside(&self) -> u32 {
        self.inside.load(Ordering::SeqCst)
    }

    /// The connection object.
    pub fn conn(&self) -> Option<ConnRef> {
        if self.phase.load(Ordering::Acquire) != HELD {
            return None;
        }
        ConnRef::acquire(&self.conn)
    }

    /// The connection object, while the caller knows that the slot keeps it.
    pub fn conn_ptr(&self) -> *mut Conn {
        self.conn.load(Ordering::Acquire)
    }

    /// The fewest bytes that a receiving call waits for (`SO_RCVLOWAT`).
    pub fn least(&self) -> usize {
        // SAFETY: connection objects are never freed; one that the slot has just lost tells another connection's number, as a
        // call that came later would have.
        unsafe { self.conn_ptr().as_ref() }.map_or(1, |conn| conn.least.load(Ordering::Relaxed) as usize)
    }

    /// Puts a connection object into the slot, which takes over the reference.
    pub fn hold(&self, conn: ConnRef) {
        conn.put(&self.conn);
        self.phase.store(HELD, Ordering::SeqCst);
        self.seen();
    }

    /// Enters the kernel with a call on this descriptor; false if the slot is being turned into a held one: look again.
    pub fn enter(&self) -> bool {
        // Dekker with `adopt`: our count is visible before we look at the gate, the gate before the count is looked at.
        self.inside.fetch_add(1, Ordering::SeqCst);
        if self.gate.load(Ordering::SeqCst) == 0 && self.phase.load(Ordering::Acquire) != HELD {
            return true;
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
        std::thread::yield_now();
        false
    }

    /// Leaves the kernel.
    pub fn leave(&self) {
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    /// Runs `f` while no call is inside the kernel; `None` if one is.
    pub fn adopt<T>(&self, f: impl FnOnce() -> T) -> Option<T> {
        if self.gate.swap(1, Ordering::SeqCst) != 0 {
            return None;
        }
        let result = (self.inside.load(Ordering::SeqCst) == 0).then(f);
        self.gate.store(0, Ordering::SeqCst);
        result
    }

    /// Counts bytes of a call: sent (`direction` 1) or received (2); what was only looked at (0) is still to come.
    pub fn count(&self, direction: u8, n: u64) {
        if n == 0 || direction == 0 {
            return;
        }
        let counter = if direction == 1 { &self.tx } else { &self.rx };
        counter.fetch_add(n, Ordering::Relaxed);
        if self.last.swap(direction, Ordering::Relaxed) != direction {
            self.turns.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether the descriptor is in non-blocking mode.
    pub fn nonblocking(&self, fd: i32) -> bool {
        // Another process may change the mode of what it shares.
        let held = self.phase.load(Ordering::Relaxed) == HELD;
        let alone = !super::wait::is_shared() && (held || self.strange.load(Ordering::Relaxed) == 0);
        match self.nonblock.load(Ordering::Relaxed) {
            1 if alone => true,
            2 if alone => false,
            _ => {
                // SAFETY: the application's own descriptor, in a call on it.
                let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
                let set = rustix::fs::fcntl_getfl(fd).is_ok_and(|f| f.contains(rustix::fs::OFlags::NONBLOCK));
                self.set_nonblocking(set);
                set
            }
        }
    }

    /// The application has changed the mode.
    pub fn set_nonblocking(&self, set: bool) {
        self.nonblock.store(if set { 1 } else { 2 }, Ordering::Relaxed);
    }

    /// The mode may have changed.
    pub fn forget_mode(&self) {
        self.nonblock.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_late_does_not_undo_what_has_come_of_a_slot() {
        let slot = slot(MAX_FDS as i32 - 1).unwrap();
        assert!(!slot.want(), "not followed");
        slot.follow(true);
        assert!(slot.want() && slot.want(), "counted, and wanted already");
        for phase in [OPENING, HELD] {
            slot.phase.store(phase, Ordering::Relaxed);
            assert!(!slot.want());
            assert_eq!(slot.phase.load(Ordering::Relaxed), phase);
        }
        slot.forget();
        assert!(!slot.want() && !may_follow(MAX_FDS as i32 - 1));
    }
}
