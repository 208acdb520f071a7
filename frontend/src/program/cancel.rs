//! Cancellation of a thread (`pthread_cancel`) that waits here. Nothing of ours is unwound: the wait ends with an error, each
//! frame puts back what it holds, and the hook's own frame, which holds nothing, is where the thread ends.
//!
//! libc tells nobody that a thread is to end, so the hook of `pthread_cancel` notes it here and wakes all who wait.

use super::wait;
use rustix::io::Errno;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What a wait ends with in a thread that is to end. No call on a socket fails so.
pub const CANCELLED: Errno = Errno::CANCELED;

/// Threads that were cancelled, and have not ended in a call of ours; some have ended elsewhere.
static MARKED: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];
/// Which of them is overwritten next.
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// Some thread was ever cancelled.
static ANY: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// This thread, while it is in a part of ours and could be cancelled but for that; else 0.
    static CANCELLABLE: Cell<usize> = const { Cell::new(0) };
}

/// Whether any thread was ever cancelled.
#[inline]
pub fn any() -> bool {
    ANY.load(Ordering::Relaxed)
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
}
