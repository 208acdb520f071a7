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
