//! Names of large files, threads that nobody knows of, the end behind what is unread, protocols above TCP.

use super::Group;
use crate::pair::Pair;
use crate::sys::{self, ret};
use libc::{c_int, c_void};

unsafe extern "C" {
    fn fcntl64(fd: c_int, command: c_int, ...) -> c_int;
    fn sendfile64(to: c_int, from: c_int, at: *mut libc::off64_t, n: usize) -> isize;
}

/// By the names that programs with large files use.
fn large_files(p: &mut Pair) {
    let fd = p.near;
    // SAFETY, for all: numbers, and an offset that outlives the call.
    let mode = |value: c_int| ret(unsafe { fcntl64(fd, libc::F_SETFL, value) });
    p.call("F_SETFL", mode(libc::O_RDWR | libc::O_NONBLOCK));
    p.recv(10, 0);
    p.call("F_SETFL", mode(libc::O_RDWR));
    let twin = ret(unsafe { fcntl64(fd, libc::F_DUPFD_CLOEXEC, 500) });
    p.note(twin.0 >= 500);
    let data = p.next(3000);
    let (file, mut at) = (sys::file(&data), 0);
    let got = ret(unsafe { sendfile64(twin.0 as c_int, file, &raw mut at, data.len()) });
    p.taken(got);
    p.note(format_args!("{got} {at}"));
    p.receives(3000);
    sys::close(file);
    sys::close(twin.0 as c_int);
}

/// What such a thread is told, and what it says.
struct Told {
    fd: c_int,
    data: [u8; 100],
    sent: isize,
    lives: c_int,
}

extern "C" fn obey(told: *mut c_void) -> c_int {
    // SAFETY: who made the thread waits for its end. `_exit` of a thread is the system call.
    unsafe {
        let told = &mut *told.cast::<Told>();
        told.sent = libc::send(told.fd, told.data.as_ptr().cast(), 100, libc::MSG_NOSIGNAL);
        libc::syscall(libc::SYS_exit, 0);
    }
    0
}

/// A thread that was made by `clone(2)`: it has no thread-local memory of its own.
fn raw_thread(p: &mut Pair) {
    let data: [u8; 100] = p.next(100).try_into().expect("a hundred");
    let mut told = Told { fd: p.near, data, sent: -2, lives: 1 };
    let mut stack = vec![0u8; 1 << 20];
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_CHILD_CLEARTID;
    // SAFETY: the stack and what it is told outlive the thread, which is waited for by the word that the kernel clears
    // at its end. Until then this thread does nothing but that, as both have the same thread-local memory.
    unsafe {
        let top = stack.as_mut_ptr().add(stack.len() & !15);
        let (argument, lives) = ((&raw mut told).cast::<c_void>(), &raw mut told.lives);
        let none = std::ptr::null_mut::<c_void>();
        if libc::clone(obey, top.cast(), flags, argument, none, none, lives) > 0 {
            while lives.read_volatile() != 0 {
                libc::syscall(libc::SYS_sched_yield);
            }
        }
    }
    let got = sys::Ret(told.sent, 0);
    p.taken(got);
    p.note(format_args!("{}", told.sent));
    p.receives(100);
}

/// The kernel has the end of the stream before all of it is read: nobody is told so too early.
fn end_behind(p: &mut Pair) {
    const ALL: i16 = libc::POLLIN | libc::POLLRDHUP | libc::POLLOUT;
    p.far_says("send", &[100, 0]);
    p.far_says("shutdown", &[libc::SHUT_WR.into()]);
    p.until(libc::POLLRDHUP);
    for n in [60, 39, 1, 1] {
        p.polled(ALL);
        let there = sys::unread(p.near);
        p.note(there);
        p.recv(n, 0);
    }
    p.polled(ALL);
    p.send(10, 0);
    p.receives(10);
}

pub fn group() -> Group {
    let mut group = Group::new("rest");
    group.case("7.3", "fcntl64, sendfile64/mode, duplicate, file", large_files);
    group.case("7.15", "clone/a thread without pthreads sends", raw_thread);
    group.case("7.25", "end of stream/behind unread bytes", end_behind);
    group.case("7.38", "TCP_ULP/one that is not there", |p| {
        let got = sys::set_option_bytes(p.near, libc::IPPROTO_TCP, libc::TCP_ULP, b"none-such\0");
        p.call("TCP_ULP", got);
        p.send(100, 0);
        p.receives(100);
    });
    group
}
