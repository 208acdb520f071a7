//! When to ring a doorbell: the announcement and the check that make a lost wake-up impossible.
//!
//! A waiter **announces** its sleep, then looks once more at everything it waits for, and only then blocks in the
//! kernel. A publisher publishes, then asks **should I ring**. Both put a sequentially consistent fence between their
//! store and their load, so at least one sees the other (Dekker): either the waiter finds the bytes, or the publisher
//! finds the announcement. Of several publishers one takes the announcement and rings.

use crate::layout::Bell;
use crate::sync::{Ordering, fence};

impl Bell {
    /// Announces that a waiter of this bell is about to sleep. What it waits for must be checked after this.
    pub fn announce(&self) {
        self.sleeping.store(1, Ordering::Relaxed);
        // Orders the announcement before the caller's last look at the rings. Pairs with the fence in `publish_fence`;
        // without it the look could be satisfied before the store is visible, and the wake-up be lost.
        fence(Ordering::SeqCst);
    }

    /// The waiter is awake again without having been rung. Only a waiter that is alone on its bell may take the
    /// announcement back; where others share it, taking it back could silence one that still sleeps, so it is left
    /// standing and costs at most one needless ring.
    pub fn awake(&self, alone: bool) {
        if alone {
            self.sleeping.store(0, Ordering::Relaxed);
        }
    }

    /// Takes the announcement, if there is one: the caller must then write the eventfd. To be called after
    /// [`publish_fence`].
    pub fn take(&self) -> bool {
        self.sleeping.load(Ordering::Relaxed) != 0 && self.sleeping.swap(0, Ordering::AcqRel) != 0
    }
}

/// Orders what was published before the look at the bells. Pairs with the fence in [`Bell::announce`].
#[inline]
pub fn publish_fence() {
    #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
    // SAFETY: reads and writes a word of this function's own stack as it is. A locked instruction is as full a barrier as the
    // `mfence` that the fence would be, at a quarter of its time, which was a fifth of a short send; and the compiler moves no
    // access to memory across it, as it is not said to be `nomem`.
    unsafe {
        core::arch::asm!("lock or dword ptr [{0}], 0", in(reg) &mut 0u32, options(nostack));
    };
    #[cfg(not(all(target_arch = "x86_64", not(any(loom, miri)))))]
    fence(Ordering::SeqCst);
}
