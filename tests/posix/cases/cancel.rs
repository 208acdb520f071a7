//! Threads that are cancelled in a call. They are C's threads: their frames hold nothing, and a cancellation unwinds through them.

use crate::pair::Pair;
use crate::sys;
use libc::{c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// What a thread does with a descriptor.
pub type Waits = extern "C-unwind" fn(*mut c_void) -> *mut c_void;

unsafe extern "C-unwind" {
    fn recv(fd: c_int, buf: *mut u8, n: usize, flags: c_int) -> isize;
    fn read(fd: c_int, buf: *mut u8, n: usize) -> isize;
    fn send(fd: c_int, buf: *const u8, n: usize, flags: c_int) -> isize;
    fn poll(list: *mut libc::pollfd, n: libc::nfds_t, timeout: c_int) -> c_int;
    fn epoll_wait(set: c_int, events: *mut libc::epoll_event, n: c_int, timeout: c_int) -> c_int;
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
    fn pthread_setcanceltype(kind: c_int, before: *mut c_int) -> c_int;
    fn pthread_cancel(thread: libc::pthread_t) -> c_int;
    fn _pthread_cleanup_push(
        place: *mut [usize; 4],
        routine: extern "C" fn(*mut c_void),
        argument: *mut c_void,
    );
    fn _pthread_cleanup_pop(place: *mut [usize; 4], execute: c_int);
}

/// How often a cleanup handler ran.
static CLEANED: AtomicU32 = AtomicU32::new(0);

extern "C" fn clean(_: *mut c_void) {
    CLEANED.fetch_add(1, Ordering::SeqCst);
}

// SAFETY, for every thread: buffers outlive the calls, and the frame holds nothing that is lost with it.

pub extern "C-unwind" fn receives(fd: *mut c_void) -> *mut c_void {
    // SAFETY: see above.
    unsafe {
        let mut cleanup = [0; 4];
        _pthread_cleanup_push(&raw mut cleanup, clean, fd);
        recv(fd as usize as c_int, [0u8; 8].as_mut_ptr(), 8, 0);
        // Nobody receives from a pipe.
        read(fd as usize as c_int, [0u8; 8].as_mut_ptr(), 8);
        _pthread_cleanup_pop(&raw mut cleanup, 0);
    }
    std::ptr::null_mut()
}

pub extern "C-unwind" fn reads(fd: *mut c_void) -> *mut c_void {
    // SAFETY: see above.
    unsafe { read(fd as usize as c_int, [0u8; 8].as_mut_ptr(), 8) };
    std::ptr::null_mut()
}

pub extern "C-unwind" fn sends(fd: *mut c_void) -> *mut c_void {
    // SAFETY: see above.
    unsafe { send(fd as usize as c_int, [0u8; 8].as_ptr(), 8, libc::MSG_NOSIGNAL) };
    std::ptr::null_mut()
}

extern "C-unwind" fn polls(fd: *mut c_void) -> *mut c_void {
    let mut one = libc::pollfd { fd: fd as usize as c_int, events: libc::POLLIN, revents: 0 };
    // SAFETY: see above.
    unsafe { poll(&raw mut one, 1, -1) };
    std::ptr::null_mut()
}

extern "C-unwind" fn sets(fd: *mut c_void) -> *mut c_void {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
    // SAFETY: see above; the set is left to the process.
    unsafe {
        let set = libc::epoll_create1(0);
        libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, fd as usize as c_int, &raw mut event);
        epoll_wait(set, &raw mut event, 1, -1);
    }
    std::ptr::null_mut()
}

/// Is cancelled before it calls.
pub extern "C-unwind" fn late(fd: *mut c_void) -> *mut c_void {
    // SAFETY: see above.
    unsafe {
        let mut before = 0;
        pthread_setcancelstate(1, &raw mut before);
        std::thread::sleep(Duration::from_millis(25));
        pthread_setcancelstate(before, std::ptr::null_mut());
    }
    receives(fd)
}

/// Receives while it cannot be cancelled, and ends as it would.
pub extern "C-unwind" fn disabled(fd: *mut c_void) -> *mut c_void {
    // SAFETY: see above.
    unsafe {
        pthread_setcancelstate(1, std::ptr::null_mut());
        recv(fd as usize as c_int, [0u8; 8].as_mut_ptr(), 8, 0) as usize as *mut c_void
    }
}

/// Receives while a cancellation may come at any moment.
pub extern "C-unwind" fn anywhere(fd: *mut c_void) -> *mut c_void {
    // SAFETY: see above.
    unsafe {
        pthread_setcanceltype(1, std::ptr::null_mut());
        recv(fd as usize as c_int, [0u8; 8].as_mut_ptr(), 8, 0) as usize as *mut c_void
    }
}

/// The calls that wait for data.
pub const WAYS: [(&str, Waits); 3] = [("recv", receives), ("poll", polls), ("epoll_wait", sets)];

/// Cancels a thread after a while: whether it came to that, and how it ended.
pub fn ended(waits: Waits, fd: c_int, after: Duration) -> String {
    type Begins = extern "C" fn(*mut c_void) -> *mut c_void;
    let cleaned = CLEANED.load(Ordering::SeqCst);
    // SAFETY: the function is one of this file's.
    unsafe {
        let mut thread: libc::pthread_t = std::mem::zeroed();
        let begins = std::mem::transmute::<*const (), Begins>(waits as *const ());
        let made =
            libc::pthread_create(&raw mut thread, std::ptr::null(), begins, fd as usize as *mut c_void);
        std::thread::sleep(after);
        let cancelled = pthread_cancel(thread);
        let mut limit = std::mem::zeroed::<libc::timespec>();
        libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut limit);
        limit.tv_sec += 4;
        let mut value = std::ptr::null_mut();
        let joined = libc::pthread_timedjoin_np(thread, &raw mut value, &raw const limit);
        let cleaned = CLEANED.load(Ordering::SeqCst) - cleaned;
        format!("{made} {cancelled} {joined} {} {cleaned}", value as isize)
    }
}

/// A thread is cancelled while it waits; the connection goes on, and nothing is lost.
pub fn waiting(p: &mut Pair, waits: Waits) {
    let fd = p.near;
    p.note(ended(waits, fd, Duration::from_millis(25)));
    p.receives(5);
    p.recv(8, 0);
    p.send(5, 0);
    p.far_says("take", &[5]);
    // And another waits as before.
    p.far("later send", &[7, 0]);
    let again = std::thread::spawn(move || sys::recv(fd, &mut [0; 9], 0));
    p.note(again.join().map_or(-1, |got| got.0));
}
