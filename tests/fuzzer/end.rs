//! What a side knows of the connection's state, and so of what a call may do. Shared with its children.

use crate::moving::RECEIVE;
use crate::plan::{ACTORS, NUMBERS, SLOTS, Wait};
use libc::c_int;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// A word that threads and children share; only one of them moves at a time.
#[derive(Default)]
pub struct Word(AtomicU64);

impl Word {
    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(SeqCst)
    }

    /// Whether it is not 0.
    pub fn is(&self) -> bool {
        self.get() != 0
    }

    /// Sets it.
    pub fn set(&self, value: impl Into<u64>) {
        self.0.store(value.into(), SeqCst);
    }

    /// Adds to it.
    pub fn add(&self, n: usize) {
        self.set(self.get() + n as u64);
    }
}

/// The connection, as this side knows it.
#[derive(Default)]
pub struct End {
    /// Bytes of the sequence that this side has sent, and taken.
    pub sent: Word,
    /// See `sent`.
    pub got: Word,
    /// What was sent when the turn began.
    pub sent_before: Word,
    /// The other side's.
    pub peer_sent: Word,
    /// See `peer_sent`.
    pub peer_got: Word,
    /// Shut for writing; for reading; closed by all; the connection was reset by that.
    pub shut: Word,
    /// See `shut`.
    pub deaf: Word,
    /// See `shut`.
    pub closed: Word,
    /// See `shut`.
    pub reset: Word,
    /// The other side's.
    pub peer_shut: Word,
    /// See `peer_shut`.
    pub peer_deaf: Word,
    /// See `peer_shut`.
    pub peer_closed: Word,
    /// A reset has come, or must come.
    pub broken: Word,
    /// The descriptor does not block.
    pub nonblocking: Word,
    /// Receiving has a time-out.
    pub timeout: Word,
    /// Bytes wait for more.
    pub corked: Word,
    /// SO_LINGER is 0.
    pub abortive: Word,
    /// It was in an epoll set.
    pub watched: Word,
    /// For what it is watched in the set of this number.
    pub interest: Word,
    /// Sets made so far.
    pub sets: Word,
    /// [`crate::plan::Plan::orphans`].
    pub orphans: Word,
    /// Descriptors of it in each process.
    pub held: [Word; ACTORS],
}

/// Most bytes under way, so that no send has to wait.
const MOST: u64 = 40_000;

impl End {
    /// In memory that children share.
    pub fn shared() -> &'static Self {
        // SAFETY: a fresh mapping; zero is a valid value of each word; it is never taken away.
        unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            let at = libc::mmap(
                std::ptr::null_mut(),
                size_of::<Self>(),
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED, "memory for a page");
            &*at.cast()
        }
    }

    /// For the next sequence.
    pub fn clear(&self) {
        let words: [&Word; 22] = [
            &self.sent,
            &self.got,
            &self.sent_before,
            &self.peer_sent,
            &self.peer_got,
            &self.shut,
            &self.deaf,
            &self.closed,
            &self.reset,
            &self.peer_shut,
            &self.peer_deaf,
            &self.peer_closed,
            &self.broken,
            &self.nonblocking,
            &self.timeout,
            &self.corked,
            &self.abortive,
            &self.watched,
            &self.interest,
            &self.sets,
            &self.orphans,
            &self.held[0],
        ];
        words.into_iter().chain(&self.held).for_each(|word| word.set(0u64));
    }

    /// Bytes that are there to be read.
    pub fn unread(&self) -> u64 {
        self.peer_sent.get().saturating_sub(self.got.get())
    }

    /// Whether a receiving call has an end of the stream, or of the connection, to tell.
    pub fn has_ended(&self) -> bool {
        self.peer_shut.is() || self.deaf.is() || self.broken.is()
    }

    /// Whether a call that waits so, in the main process with this set, waits for what comes next, and for nothing else.
    pub fn awaits(&self, wait: Wait, serial: u64) -> bool {
        let quiet = self.unread() == 0 && !self.has_ended() && !self.peer_closed.is() && !self.closed.is();
        let kind = match wait {
            Wait::Receive(how) => RECEIVE[how].0 != "splice" && !self.nonblocking.is() && !self.timeout.is(),
            Wait::Look(_) => true,
            Wait::Events => {
                let other = (libc::EPOLLOUT | libc::EPOLLONESHOT) as u64;
                let interest = self.interest.get();
                interest & libc::EPOLLIN as u64 != 0 && interest & other == 0 && serial == self.sets.get()
            }
        };
        quiet && kind
    }

    /// How much may be sent now.
    pub fn room(&self) -> usize {
        MOST.saturating_sub(self.sent.get().saturating_sub(self.peer_got.get())) as usize
    }

    /// Whether receiving so many bytes returns without anything coming. `all` is MSG_WAITALL.
    pub fn receives(&self, n: usize, all: bool) -> bool {
        let enough = if all { n.max(1) as u64 } else { 1 };
        self.has_ended() || self.nonblocking.is() || self.timeout.is() || self.unread() >= enough
    }

    /// Descriptors of it in all processes.
    pub fn holders(&self) -> u64 {
        self.held.iter().map(Word::get).sum()
    }

    /// Whether the last descriptors may go now: a reset must not overtake what was sent just before it.
    pub fn may_close(&self, going: u64, abortive: bool) -> bool {
        let resets = abortive || self.abortive.is() || self.unread() > 0;
        going < self.holders() || !resets || self.sent.get() == self.sent_before.get()
    }

    /// Descriptors of a process have gone.
    pub fn went(&self, actor: usize, n: u64) {
        self.held[actor].set(self.held[actor].get() - n);
        if self.holders() > 0 || self.closed.is() {
            return;
        }
        let both = self.shut.is() && self.peer_shut.is();
        let resets = (self.abortive.is() || self.unread() > 0) && !both && !self.broken.is();
        self.closed.set(1u64);
        self.shut.set(1u64);
        self.reset.set(u64::from(resets));
    }

    /// Whether what this side has just sent finds nobody.
    pub fn finds_nobody(&self) -> bool {
        !self.shut.is()
            && !self.broken.is()
            && (self.peer_closed.is() || self.peer_deaf.is() && self.peer_shut.is())
    }

    /// What the other side has to know.
    pub fn token(&self) -> [u64; 6] {
        [&self.sent, &self.got, &self.shut, &self.deaf, &self.closed, &self.reset].map(Word::get)
    }

    /// What the other side says.
    pub fn learn(&self, token: [u64; 6]) {
        let [sent, got, shut, deaf, closed, reset] = token;
        if self.deaf.is() && self.shut.is() && sent > self.peer_sent.get() {
            // Nobody here would read it: the kernel resets.
            self.broken.set(1u64);
        }
        if reset != 0 && !self.closed.is() {
            self.broken.set(1u64);
        }
        self.peer_sent.set(sent);
        self.peer_got.set(got);
        self.peer_shut.set(shut);
        self.peer_deaf.set(deaf);
        self.peer_closed.set(closed);
        self.sent_before.set(self.sent.get());
    }
}

/// The descriptors of a process: of the connection, and its epoll set.
pub struct Table {
    /// -1 is none.
    pub slots: [c_int; SLOTS],
    /// -1 is none.
    pub set: c_int,
    /// Which of the side's sets that is.
    pub serial: u64,
}

/// This process's.
pub static TABLE: Mutex<Table> = Mutex::new(Table { slots: [-1; SLOTS], set: -1, serial: 0 });

impl Table {
    /// Descriptors of the connection.
    pub fn held(&self) -> u64 {
        self.slots.iter().filter(|fd| **fd >= 0).count() as u64
    }

    /// One of them.
    pub fn any(&self) -> Option<c_int> {
        self.slots.iter().copied().find(|fd| *fd >= 0)
    }

    /// A free number for the next.
    pub fn number(slot: usize) -> c_int {
        NUMBERS + slot as c_int
    }
}
