//! Threads that are to end.

use libc::{c_int, pthread_t};
use vsocket_frontend::program::cancel;

use crate::hook::ours;

hook! { unsafe fn pthread_cancel(thread: pthread_t) -> c_int => vs_pthread_cancel {
    // SAFETY: the application's argument, handed on.
    let got = unsafe { real!(pthread_cancel)(thread) };
    if got == 0 {
        // First it is to end, then it is told to look.
        ours(|| cancel::mark(thread as usize));
    }
    got
} }

hook! { unsafe fn pthread_setcanceltype(kind: c_int, before: *mut c_int) -> c_int => vs_pthread_setcanceltype {
    if kind == ASYNCHRONOUS {
        cancel::may_come_anywhere();
    }
    // SAFETY: the application's arguments, handed on.
    unsafe { real!(pthread_setcanceltype)(kind, before) }
} }

/// `PTHREAD_CANCEL_ASYNCHRONOUS`.
const ASYNCHRONOUS: c_int = 1;
