//! Connection records: the shared state of one endpoint, in memory that the agent creates and maps, and that each
//! process of the program maps too. Whoever holds a direction's lock owns its lane state; a lock whose owner died is
//! taken over.

use crate::lane::rx::RxState;
use crate::lane::tx::TxState;
use std::cell::{Cell, UnsafeCell};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Records in one program's memory; a program with more connections on lanes keeps the rest on TCP.
pub const RECORDS: u32 = 16384;

/// What is visible without a lock about an endpoint's directions, as bits of [`Record::status`].
pub mod status {
    /// The receiver stands at S: readable means ring bytes.
    pub const RX_RING: u32 = 1;
    /// A generation is open at the receiver: a stay may be announced.
    pub const RX_OPEN: u32 = 2;
    /// What an ended stay left in the ring is still to be read.
    pub const RX_RESIDUE: u32 = 4;
    /// The sender is on the ring.
    pub const TX_RING: u32 = 8;
    /// The sender is draining.
    pub const TX_DRAINING: u32 = 16;
    /// The receiver has seen the end of the stream.
    pub const RX_EOF: u32 = 32;
    /// The connection was aborted: errors from now on.
    pub const BROKEN: u32 = 64;
    /// The sender was shut for writing.
    pub const TX_SHUT: u32 = 128;
    /// The abort was not reported to the application yet: the next call that fails says `ECONNRESET`, and later ones what
    /// they would after `SO_ERROR` was read.
    pub const UNTOLD: u32 = 256;
    /// The application has shut it for reading: what is there, and what still comes, is read as before, and then, instead
    /// of a wait, the end of the stream.
    pub const RX_SHUT: u32 = 512;
    /// Raw bytes come next that the receiver has by a ring: they are no readiness.
    pub const RX_KNOWN: u32 = 1024;
    /// It has shut it for reading, and the kernel socket is to be when nothing of a stay is still to come over it.
    pub const RX_DEFERRED: u32 = 2048;
    /// All bits that belong to the receiver's state.
    pub const RX_STATE: u32 = RX_RING | RX_OPEN | RX_RESIDUE;
    /// All bits that belong to the sender's state.
    pub const TX_STATE: u32 = TX_RING | TX_DRAINING;

    /// The names of the bits that are set, for people.
    pub fn names(bits: u32) -> String {
        let all = [
            (RX_RING, "rx-ring"),
            (RX_OPEN, "rx-open"),
            (RX_RESIDUE, "rx-residue"),
            (TX_RING, "tx-ring"),
            (TX_DRAINING, "tx-draining"),
            (RX_EOF, "rx-eof"),
            (BROKEN, "broken"),
            (TX_SHUT, "tx-shut"),
            (UNTOLD, "untold"),
            (RX_SHUT, "rx-shut"),
            (RX_KNOWN, "rx-known"),
            (RX_DEFERRED, "rx-deferred"),
        ];
        let set: Vec<_> = all.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
        set.join(" ")
    }
}

/// A robust lock around one direction's state. The state is stored as a whole: its owner works on a copy, writes it to
/// the slot that is not current, and then makes that one current, so that whoever takes over from a dead owner finds
/// the state before or after a step, never a mixture.
#[repr(C, align(64))]
pub struct Locked<T> {
    mutex: UnsafeCell<MaybeUninit<libc::pthread_mutex_t>>,
    current: AtomicU32,
    slots: [UnsafeCell<T>; 2],
}

// SAFETY: the state is reached only through a guard, which holds the process-shared mutex.
unsafe impl<T: Send> Sync for Locked<T> {}

/// The lock could not be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockError {
    /// This thread holds it already: a signal handler came in between.
    Reentered,
    /// The record is garbled.
    Garbled,
    /// Its owner kept it for longer than the caller would wait.
    Busy,
}

/// A direction's lock, taken, and its state not read yet: small, so that it can be handed on. The state is not to be copied more
/// often than it must: on the way of a short message each copy is felt.
#[must_use = "what the owner before left undone is to be done"]
pub struct Taken<'a, T: Copy> {
    lock: &'a Locked<T>,
    /// As in [`Guard`].
    recovered: bool,
}

/// Access to a direction's state.
pub struct Guard<'a, T: Copy> {
    lock: &'a Locked<T>,
    state: T,
    /// It may have changed since it was stored.
    changed: Cell<bool>,
    /// The owner before died with the lock held: the state may be behind the kernel.
    pub recovered: bool,
}

impl<T: Copy> Locked<T> {
    /// Makes the lock and its state anew. The record must not be in use.
    pub fn init(&self, state: T) {
        // SAFETY: nobody else uses the record while the agent hands it out; the memory is valid for the mutex and the
        // attributes are initialised before they are used.
        unsafe {
            let mut attr = MaybeUninit::<libc::pthread_mutexattr_t>::zeroed();
            libc::pthread_mutexattr_init(attr.as_mut_ptr());
            libc::pthread_mutexattr_setpshared(attr.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED);
            libc::pthread_mutexattr_setrobust(attr.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
            libc::pthread_mutexattr_settype(attr.as_mut_ptr(), libc::PTHREAD_MUTEX_ERRORCHECK);
            *self.mutex.get() = MaybeUninit::zeroed();
            libc::pthread_mutex_init(self.mutex.get().cast(), attr.as_ptr());
            *self.slots[0].get() = state;
        }
        self.current.store(0, Ordering::Release);
    }

    /// Takes the lock, and reads the state.
    pub fn lock(&self) -> Result<Guard<'_, T>, LockError> {
        self.take().map(Taken::open)
    }

    /// Takes the lock. It is never held across a wait in the kernel, so this is short.
    pub fn take(&self) -> Result<Taken<'_, T>, LockError> {
        // SAFETY: the mutex was initialised by `init` before the record was handed out, and lives in mapped memory.
        self.taken(unsafe { libc::pthread_mutex_lock(self.mutex.get().cast()) })
    }

    /// Takes the lock as [`Locked::lock`] does, but waits no longer than this: its owner may be stopped.
    pub fn lock_within(&self, most: Duration) -> Result<Guard<'_, T>, LockError> {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let nanos = now.tv_nsec + i64::from(most.subsec_nanos());
        let until = libc::timespec {
            tv_sec: now.tv_sec + most.as_secs() as i64 + nanos / 1_000_000_000,
            tv_nsec: nanos % 1_000_000_000,
        };
        // SAFETY: as in `take`; the deadline outlives the call.
        let got = unsafe { libc::pthread_mutex_timedlock(self.mutex.get().cast(), &raw const until) };
        self.taken(got).map(Taken::open)
    }

    #[inline]
    fn taken(&self, got: libc::c_int) -> Result<Taken<'_, T>, LockError> {
        match got {
            0 => Ok(Taken { lock: self, recovered: false }),
            libc::EOWNERDEAD => {
                // SAFETY: we hold the mutex, in the state that EOWNERDEAD leaves it.
                unsafe { libc::pthread_mutex_consistent(self.mutex.get().cast()) };
                Ok(Taken { lock: self, recovered: true })
            }
            libc::EDEADLK => Err(LockError::Reentered),
            libc::ETIMEDOUT => Err(LockError::Busy),
            _ => Err(LockError::Garbled),
        }
    }
}

impl<'a, T: Copy> Taken<'a, T> {
    /// Reads the state, to where the guard will stay.
    #[inline(always)]
    pub fn open(self) -> Guard<'a, T> {
        let Self { lock, recovered } = *std::mem::ManuallyDrop::new(self);
        let current = lock.current.load(Ordering::Acquire) as usize & 1;
        // SAFETY: the mutex is taken, so nobody writes the slot.
        let state = unsafe { *lock.slots[current].get() };
        Guard { lock, state, changed: Cell::new(false), recovered }
    }
}

impl<T: Copy> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this thread holds the mutex, and has not made a guard of it.
        unsafe { libc::pthread_mutex_unlock(self.lock.mutex.get().cast()) };
    }
}

impl<T: Copy> std::ops::Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.state
    }
}

impl<T: Copy> std::ops::DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.changed.set(true);
        &mut self.state
    }
}

impl<T: Copy> Guard<'_, T> {
    /// Stores the state: to be called before what it says is shown to anybody else. Dropping the guard stores it too.
    pub fn commit(&self) {
        if !self.changed.replace(false) {
            return;
        }
        let next = self.lock.current.load(Ordering::Relaxed) & 1 ^ 1;
        // SAFETY: the guard holds the mutex, and the slot that is not current belongs to its holder.
        unsafe { store(&self.state, self.lock.slots[next as usize].get()) };
        // Release: the slot is whole before it is current, also for who takes over when this thread dies in between.
        self.lock.current.store(next, Ordering::Release);
    }
}

impl<T: Copy> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.commit();
        // SAFETY: this thread holds the mutex.
        unsafe { libc::pthread_mutex_unlock(self.lock.mutex.get().cast()) };
    }
}

/// Stores word by word: a state has just been changed so, and a longer piece of what the processor has not written back yet it
/// would have to wait for.
///
/// # Safety
///
/// As for a write through `to`.
#[inline(always)]
unsafe fn store<T: Copy>(from: &T, to: *mut T) {
    const { assert!(align_of::<T>() == 8 && size_of::<T>().is_multiple_of(8)) };
    let (from, to) = (std::ptr::from_ref(from).cast::<MaybeUninit<u64>>(), to.cast::<MaybeUninit<u64>>());
    for n in 0..size_of::<T>() / 8 {
        // SAFETY: word `n` of both, which are aligned to words.
        unsafe { to.add(n).write_volatile(from.add(n).read()) };
    }
}

/// One endpoint of one connection.
#[repr(C, align(64))]
pub struct Record {
    /// [`status`] bits.
    pub status: AtomicU32,
    /// Generation that the agent committed: the sender may switch to it.
    pub ready: AtomicU32,
    /// Generations up to this one must be left.
    pub leave: AtomicU32,
    /// Generations up to this one are left so that what the far application has not taken comes over the anchor.
    pub untaken: AtomicU32,
    /// The lane of the open generation, as `Lane::code`.
    pub lane: AtomicU32,
    /// `RxState::off`, for a look without the lock.
    pub rx_off: AtomicU64,
    /// `TxState::off`, for a look without the lock.
    pub tx_off: AtomicU64,
    /// Bytes sent and received over direct lanes.
    pub direct: [AtomicU64; 2],
    /// Bytes sent and received over fabric lanes.
    pub fabric: [AtomicU64; 2],
    /// Bytes that others had sent and received before.
    pub others: [AtomicU64; 2],
    /// 1: nobody knows whether it has been on a lane before, as its first generation will show.
    pub unknown: AtomicU32,
    /// This end did the connect.
    pub connector: AtomicU32,
    /// `Violation::code` of what ended the connection, or 0.
    pub violation: AtomicU32,
    /// The errno of a connection that is broken; see `Endpoint::broken`.
    pub error: AtomicU32,
    /// 1: the program has a connection here. Said when its records go from an agent to the next.
    pub kept: AtomicU32,
    /// The sender's half.
    pub tx: Locked<TxState>,
    /// The receiver's half.
    pub rx: Locked<RxState>,
}

/// The start of a program's record memory.
#[repr(C, align(64))]
pub struct RecordsHeader {
    /// [`RECORDS_LAYOUT`] of who made it.
    pub layout: AtomicU32,
    /// Counts the messages that the agent has put into the program's control socket.
    pub mail: AtomicU32,
    /// 1 while the agent's watchdog sleeps: who publishes on a fabric lane takes it and rings.
    pub watchdog: AtomicU32,
    /// Records from here on are not in use. Said when they go from an agent to the next.
    pub kept: AtomicU32,
    /// 1: a process has something to say that the agent's socket does not take. The agent takes it when it has read what is there, and
    /// says that it has.
    pub behind: AtomicU32,
}

/// Version of what stands in the memory of records, which an agent may be given that did not make it.
pub const RECORDS_LAYOUT: u32 = 2;

/// Bytes of the header before the first record.
pub const RECORDS_HEADER_LEN: usize = 4096;

/// What a connection's stays on lanes have left behind, now that it is the kernel's alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Past {
    /// How far what was sent is ahead of what the kernel has counted, modulo 2⁶⁴: bytes that went by rings, less those of frames.
    pub ahead_tx: u64,
    /// The same of what was received.
    pub ahead_rx: u64,
    /// The last generation that was used.
    pub generation: u32,
}

impl Record {
    /// Makes a record anew for a connection that has moved `tx` and `rx` bytes.
    pub fn init(&self, tx: u64, rx: u64, connector: bool) {
        self.init_after(Some(Past::default()), (tx, rx), connector);
        self.others.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Makes a record anew for a connection of which others have moved what the kernel has counted (sent, received), and more
    /// before that, if its past is known.
    pub fn init_after(&self, past: Option<Past>, wire: (u64, u64), connector: bool) {
        self.unknown.store(u32::from(past.is_none()), Ordering::Relaxed);
        let past = past.unwrap_or_default();
        let state = TxState::after(wire.0, past.ahead_tx, past.generation);
        let (tx, rx) = (state.off, wire.1.wrapping_add(past.ahead_rx));
        self.tx.init(state);
        self.rx.init(RxState::after(wire.1, past.ahead_rx, past.generation));
        self.others[0].store(tx, Ordering::Relaxed);
        self.others[1].store(rx, Ordering::Relaxed);
        let words =
            [&self.status, &self.ready, &self.leave, &self.untaken, &self.lane, &self.violation, &self.error];
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        for word in self.direct.iter().chain(&self.fabric) {
            word.store(0, Ordering::Relaxed);
        }
        self.connector.store(u32::from(connector), Ordering::Relaxed);
        self.rx_off.store(rx, Ordering::Relaxed);
        self.tx_off.store(tx, Ordering::Release);
    }

    /// What its stays have left behind. `None` if that is not known, while something is left of one, and if its locks cannot be had
    /// within this time.
    pub fn past(&self, most: Duration) -> Option<Past> {
        if self.unknown.load(Ordering::Relaxed) != 0 {
            return None;
        }
        let (tx, rx) = (self.tx.lock_within(most).ok()?, self.rx.lock_within(most).ok()?);
        let generation = tx.generation.max(rx.min_generation.saturating_sub(1));
        Some(Past { ahead_tx: tx.ahead()?, ahead_rx: rx.ahead()?, generation })
    }

    /// Whether any of these [`status`] bits is set.
    pub fn is(&self, bits: u32) -> bool {
        self.status.load(Ordering::Acquire) & bits != 0
    }

    /// Replaces the bits under `mask`.
    pub fn set_status(&self, mask: u32, bits: u32) {
        if self.status.load(Ordering::Relaxed) & mask != bits {
            // Each half's bits are changed only under that half's lock, so two updates do not undo each other.
            let _ = self.status.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |s| Some(s & !mask | bits));
        }
    }

    /// Takes some bits away; whether any of them was set.
    pub fn take(&self, bits: u32) -> bool {
        self.is(bits) && self.status.fetch_and(!bits, Ordering::AcqRel) & bits != 0
    }

    /// Bytes of a program's record memory.
    pub const fn memory_len() -> usize {
        RECORDS_HEADER_LEN + RECORDS as usize * size_of::<Self>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vsocket_channel::reason::Reason;

    #[test]
    fn a_dead_owners_lock_is_taken_over() {
        // SAFETY: zeroed atomics and mutexes are valid until `init`.
        let record: Box<Record> = unsafe { Box::new(MaybeUninit::zeroed().assume_init()) };
        record.init(5, 6, true);
        std::thread::scope(|s| {
            s.spawn(|| std::mem::forget(record.tx.lock()));
        });
        let guard = record.tx.lock().unwrap();
        assert!(guard.recovered);
        assert_eq!(guard.off, 5);
        assert_eq!(record.tx.lock().err(), Some(LockError::Reentered));
        drop(guard);
        assert!(!record.tx.lock().unwrap().recovered);
    }

    #[test]
    fn a_stopped_owner_is_not_waited_for() {
        // SAFETY: zeroed atomics and mutexes are valid until `init`.
        let record: Box<Record> = unsafe { Box::new(MaybeUninit::zeroed().assume_init()) };
        record.init(0, 0, false);
        let held = record.rx.lock().unwrap();
        std::thread::scope(|s| {
            let other = || record.rx.lock_within(Duration::from_millis(20)).err();
            assert_eq!(s.spawn(other).join().unwrap(), Some(LockError::Busy));
        });
        drop(held);
        assert!(record.rx.lock_within(Duration::ZERO).is_ok());
    }

    #[test]
    fn a_connection_goes_on_after_its_past() {
        // SAFETY: zeroed atomics and mutexes are valid until `init`.
        let new = || unsafe { Box::new(MaybeUninit::<Record>::zeroed().assume_init()) };
        let (before, after) = (new(), new());
        before.init(1000, 300, true);
        assert_eq!(before.past(Duration::ZERO), Some(Past::default()));
        let mut tx = before.tx.lock().unwrap();
        tx.switch(3, 7);
        tx.sent_ring(500);
        drop(tx);
        assert_eq!(before.past(Duration::ZERO), None, "on a lane");
        // As after a stay, with a frame of 16 bytes.
        before.tx.init(TxState::after(1016, 484, 3));
        before.rx.init(RxState::after(316, 24, 3));
        let past = before.past(Duration::ZERO).unwrap();
        assert_eq!(past, Past { ahead_tx: 484, ahead_rx: 24, generation: 3 });
        after.init_after(Some(past), (2016, 320), true);
        assert_eq!(after.past(Duration::ZERO), Some(past));
        let tx = after.tx.lock().unwrap();
        assert_eq!((tx.off, tx.raw, tx.wire), (2500, 2500, 2016));
        let mut rx = after.rx.lock().unwrap();
        assert_eq!((rx.off, rx.raw, rx.wire), (344, 344, 320));
        assert_eq!((rx.prepare(3), rx.prepare(4)), (Err(Reason::Superseded), Ok(())));
        // More frames than bytes by rings.
        drop((tx, rx));
        after.init_after(Some(Past { ahead_tx: 6u64.wrapping_neg(), ..past }), (2016, 320), true);
        assert_eq!(after.tx.lock().unwrap().off, 2010);
        after.init_after(None, (2016, 320), true);
        assert_eq!(after.past(Duration::ZERO), None, "not known");
    }
}
