//! What every hook is made of: the symbol, the next function of its name, and the part between them that is ours.
//!
//! The real call is made in frames that hold nothing: a thread that is cancelled in it unwinds through them as through C's, and
//! neither a guard nor a lock is left behind. What is ours is done before and after, in [`ours`] or [`moving`].

use crate::args;
use libc::c_void;
use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicPtr, Ordering};
use vsocket_frontend::program::cancel::{self, Held};

/// The next function of a name, found once.
pub struct Next(AtomicPtr<c_void>, &'static CStr);

impl Next {
    /// The function of this name.
    pub const fn new(name: &'static CStr) -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()), name)
    }

    /// Where it is.
    #[inline]
    pub fn get(&self) -> *mut c_void {
        let known = self.0.load(Ordering::Relaxed);
        if known.is_null() { self.find() } else { known }
    }

    #[cold]
    fn find(&self) -> *mut c_void {
        // SAFETY: a look-up by a valid name; the result is a function of libc, which is never unloaded.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.1.as_ptr()) };
        self.0.store(found, Ordering::Relaxed);
        found
    }
}

unsafe extern "C-unwind" {
    fn pthread_testcancel();
}

/// A cancellation point, of a call that is served: a thread that is to end ends here. The caller's frames hold nothing.
#[inline]
pub fn point() {
    if cancel::any() {
        end_if_cancelled();
    }
}

#[cold]
fn end_if_cancelled() {
    if Held::now().is_first() {
        cancel::unmark(cancel::this_thread());
        // SAFETY: unwinds, if at all, through frames that hold nothing; functions of this ABI lead to the application's.
        unsafe { pthread_testcancel() };
    }
}

/// Whether a served call has ended because its thread is to end: then it is made again, and its [`point`] comes first.
pub fn is_cancelled(failed: bool) -> bool {
    failed && cancel::any() && args::errno() == libc::ECANCELED
}

/// Runs a part of a hook that is ours. No cancellation unwinds through it. `None` if it panicked: then the call is the kernel's.
pub fn ours<T>(f: impl FnOnce() -> T) -> Option<T> {
    let held = Held::now();
    let before = cancel::within(if held.is_first() { cancel::this_thread() } else { 0 });
    let done = catch_unwind(AssertUnwindSafe(f)).ok();
    cancel::within(before);
    done
}

/// As [`ours`], for a part that moves bytes: to keep off a cancellation each time takes as long as all of a short send. It keeps
/// it off itself where it waits ([`cancel::Within`]); before, it calls no function of libc in which a thread ends: locks and
/// memory are none, and rustix makes system calls itself.
#[inline]
pub fn moving<T>(f: impl FnOnce() -> T) -> Option<T> {
    if cancel::comes_anywhere() { ours(f) } else { catch_unwind(AssertUnwindSafe(f)).ok() }
}

/// Defines a hook: the symbol, a function of this library's that is called for it, and `real!` for the next of its name.
macro_rules! hook {
    (unsafe fn $name:ident ( $($v:ident : $t:ty),* ) -> $r:ty => $hook:ident $body:block) => {
        // One that is served as another of the same meaning has no real function.
        #[allow(dead_code, unused_imports)]
        mod $name {
            use super::*;
            static NEXT: $crate::hook::Next =
                match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => $crate::hook::Next::new(name),
                    Err(_) => unreachable!(),
                };

            #[inline]
            pub fn real() -> unsafe extern "C-unwind" fn($($t),*) -> $r {
                // SAFETY: the symbol is a function of this type.
                unsafe { std::mem::transmute(NEXT.get()) }
            }

            #[unsafe(no_mangle)]
            pub unsafe extern "C-unwind" fn $name($($v: $t),*) -> $r {
                // SAFETY: the application's arguments, handed on.
                unsafe { super::$hook($($v),*) }
            }
        }

        #[inline]
        pub unsafe fn $hook($($v: $t),*) -> $r $body
    };
}

/// The function that a hook stands before.
macro_rules! real {
    ($name:ident) => {
        $name::real()
    };
}
