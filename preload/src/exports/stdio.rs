//! Streams of stdio over a connection. libc reads and writes them by symbols of its own that nobody can hook, so a
//! connection that has its object already gets a stream of hooks; another stays on TCP.

use super::{lifetime, transfer};
use crate::hook::ours;
use libc::{FILE, c_char, c_int, c_void, off64_t, size_t, ssize_t};
use vsocket_frontend::program::socket;

/// glibc's `cookie_io_functions_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Functions {
    read: unsafe extern "C-unwind" fn(*mut c_void, *mut c_char, size_t) -> ssize_t,
    write: unsafe extern "C-unwind" fn(*mut c_void, *const c_char, size_t) -> ssize_t,
    seek: Option<unsafe extern "C-unwind" fn(*mut c_void, *mut off64_t, c_int) -> c_int>,
    close: unsafe extern "C-unwind" fn(*mut c_void) -> c_int,
}

unsafe extern "C" {
    fn fopencookie(cookie: *mut c_void, mode: *const c_char, functions: Functions) -> *mut FILE;
}

/// Where glibc keeps a stream's descriptor, for `fileno`: behind flags, eleven pointers, a chain and its own lock's
/// neighbours, since 2.0.
const FILENO: usize = 112;

fn fd_of(cookie: *mut c_void) -> c_int {
    cookie.addr() as c_int
}

unsafe extern "C-unwind" fn read(cookie: *mut c_void, buf: *mut c_char, n: size_t) -> ssize_t {
    // SAFETY: libc's buffer of `n` bytes.
    unsafe { transfer::vs_read(fd_of(cookie), buf.cast(), n) }
}

unsafe extern "C-unwind" fn write(cookie: *mut c_void, buf: *const c_char, n: size_t) -> ssize_t {
    let mut done = 0;
    while done < n {
        // SAFETY: libc's buffer of `n` bytes.
        let sent = unsafe { transfer::vs_write(fd_of(cookie), buf.add(done).cast(), n - done) };
        if sent < 0 {
            break;
        }
        done += sent as usize;
    }
    // Of a cookie's write, less than all is an error, and 0 is how it says that nothing was written.
    done as ssize_t
}

unsafe extern "C-unwind" fn close(cookie: *mut c_void) -> c_int {
    // SAFETY: the stream's own descriptor.
    unsafe { lifetime::vs_close(fd_of(cookie)) }
}

hook! { unsafe fn fdopen(fd: c_int, mode: *const c_char) -> *mut FILE => vs_fdopen {
    if !ours(|| socket::held(fd).is_some() || { socket::leave_alone(fd); false }).unwrap_or(false) {
        // SAFETY: the application's arguments, handed on.
        return unsafe { real!(fdopen)(fd, mode) };
    }
    let functions = Functions { read, write, seek: None, close };
    // SAFETY: the mode is the application's, and the functions are of this library, which is never unloaded.
    unsafe {
        let stream = fopencookie(std::ptr::without_provenance_mut(fd as usize), mode, functions);
        if !stream.is_null() {
            stream.cast::<u8>().add(FILENO).cast::<c_int>().write(fd);
        }
        stream
    }
} }
