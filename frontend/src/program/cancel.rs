//! Cancellation of a thread (`pthread_cancel`) that waits here. Nothing of ours is unwound: the wait ends with an error, each
//! frame puts back what it holds, and the hook's own frame, which holds nothing, is where the thread ends.
//!
//! libc tells nobody that a thread is to end, so the hook of `pthread_cancel` notes it here and wakes all who wait.

use super::wait;
use rustix::io::Errno;
use std::cell::Cell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What a wait ends with in a thread that is to end. No call on a socket fails so.
pub const CANCELLED: Errno = Errno::CANCELED;

/// Threads that were cancelled, and have not ended in a call of ours; some have ended elsewhere.
static MARKED: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];
/// Which of them is overwritten next.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// Some thread was ever cancelled.
static ANY: AtomicBool = AtomicBool::new(false);

/// Some thread was ever to be cancelled at any moment (`PTHREAD_CANCEL_ASYNCHRONOUS`).
static ANYWHERE: AtomicBool = AtomicBool::new(false);

unsafe extern "C-unwind" {
    // Where a cancellation may come anywhere, it comes here.
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// `PTHREAD_CANCEL_ENABLE`.
const ENABLE: c_int = 0;
/// `PTHREAD_CANCEL_DISABLE`.
const DISABLE: c_int = 1;

thread_local! {
    /// This thread, while it is in a part of ours and could be cancelled but for that; else 0.
    static CANCELLABLE: Cell<usize> = const { Cell::new(0) };
}

/// Whether any thread was ever cancelled.
#[inline]
pub fn any() -> bool {
    ANY.load(Ordering::Relaxed)
}

/// Whether a cancellation may come in the middle of anything, not only in a call of libc's.
#[inline]
pub fn comes_anywhere() -> bool {
    ANYWHERE.load(Ordering::Relaxed)
}

/// From now on it may.
pub fn may_come_anywhere() {
    ANYWHERE.store(true, Ordering::SeqCst);
}

/// This thread's name.
pub fn this_thread() -> usize {
    // SAFETY: only asks.
    unsafe { libc::pthread_self() as usize }
}

/// While it lives, this thread is not cancelled.
pub struct Held(c_int);

impl Held {
    /// From now on.
    pub fn now() -> Self {
        let mut before = 0;
        // SAFETY: a valid state, and a place of our own.
        unsafe { pthread_setcancelstate(DISABLE, &raw mut before) };
        Self(before)
    }

    /// Whether it could be cancelled but for this.
    pub fn is_first(&self) -> bool {
        self.0 == ENABLE
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the state that there was; the old one is not asked for.
        unsafe { pthread_setcancelstate(self.0, std::ptr::null_mut()) };
    }
}

/// While it lives, this thread is not cancelled, and is [`wanted`] if it is to be. Where a data call waits, or does more than
/// move bytes: there it comes to functions of libc that end a thread that is cancelled.
pub struct Within {
    outer: Option<usize>,
    _held: Held,
}

impl Within {
    /// From now on. What stands around it stays as it is.
    pub fn now() -> Self {
        let held = Held::now();
        Self { outer: held.is_first().then(|| within(this_thread())), _held: held }
    }
}

impl Drop for Within {
    fn drop(&mut self) {
        if let Some(outer) = self.outer {
            within(outer);
        }
    }
}

/// This thread comes into a part of ours, or leaves it with what was returned then.
pub fn within(thread: usize) -> usize {
    CANCELLABLE.try_with(|cell| cell.replace(thread)).unwrap_or(0)
}

/// A thread was cancelled: it is to look, if it waits here.
pub fn mark(thread: usize) {
    let free = MARKED
        .iter()
        .find(|one| matches!(one.load(Ordering::Relaxed), 0) || one.load(Ordering::Relaxed) == thread);
    let place = free.unwrap_or_else(|| &MARKED[NEXT.fetch_add(1, Ordering::Relaxed) % MARKED.len()]);
    place.store(thread, Ordering::SeqCst);
    ANY.store(true, Ordering::SeqCst);
    wait::kick();
}

/// A thread is about to end, or need not.
pub fn unmark(thread: usize) {
    for one in &MARKED {
        let _ = one.compare_exchange(thread, 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Whether this thread is to end instead of waiting. To be asked after anything that takes a kick's edge, before the sleep.
pub fn wanted() -> bool {
    if !ANY.load(Ordering::SeqCst) {
        return false;
    }
    let thread = CANCELLABLE.try_with(Cell::get).unwrap_or(0);
    thread != 0 && MARKED.iter().any(|one| one.load(Ordering::SeqCst) == thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_thread_that_is_within_is_wanted() {
        mark(7);
        assert!(any() && !wanted());
        assert_eq!(within(8), 0);
        assert!(!wanted(), "another");
        assert_eq!(within(7), 8);
        assert!(wanted());
        mark(7);
        unmark(7);
        assert!(!wanted());
        (100..100 + MARKED.len()).for_each(mark);
        mark(7);
        assert!(wanted(), "the latest are known");
        (100..100 + MARKED.len()).chain([7]).for_each(unmark);
        within(0);
    }
    #[test]
    fn a_wait_is_within_unless_what_stands_around_it_is_not_to_be_cancelled() {
        let now = || CANCELLABLE.with(Cell::get);
        {
            let _outer = Within::now();
            let _inner = Within::now();
            assert_eq!(now(), this_thread());
            drop(_inner);
            assert_eq!(now(), this_thread());
        }
        assert_eq!(now(), 0);
        let _held = Held::now();
        let _inner = Within::now();
        assert_eq!(now(), 0);
    }
}
