//! The variadic functions, which `hook!` cannot express: stable Rust cannot define them, but on x86-64 and AArch64 Linux
//! a variadic call passes its first arguments as a plain one does, so a plain definition with the widest argument serves.

use crate::hook::{Next, ours};
use libc::{c_int, c_ulong, c_void, socklen_t};
use vsocket_frontend::program::{client, socket};

static FCNTL: Next = Next::new(c"fcntl");
static FCNTL64: Next = Next::new(c"fcntl64");
static SETSOCKOPT: Next = Next::new(c"setsockopt");
static GETSOCKOPT: Next = Next::new(c"getsockopt");
static IOCTL: Next = Next::new(c"ioctl");
static PRCTL: Next = Next::new(c"prctl");

type Fcntl = unsafe extern "C-unwind" fn(c_int, c_int, ...) -> c_int;
type Ioctl = unsafe extern "C" fn(c_int, c_ulong, ...) -> c_int;

unsafe fn control(next: &Next, fd: c_int, command: c_int, argument: usize) -> c_int {
    // SAFETY: the symbol is fcntl or fcntl64, of this type.
    let real: Fcntl = unsafe { std::mem::transmute(next.get()) };
    // SAFETY: the application's arguments, handed on.
    let got = unsafe { real(fd, command, argument) };
    if got >= 0 && socket::is_followed(fd) {
        ours(|| match command {
            libc::F_SETFL => socket::set_nonblocking(fd, argument as c_int & libc::O_NONBLOCK != 0),
            libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => socket::duplicated(fd, got),
            _ => {}
        });
    }
    got
}

/// `fcntl(2)`: O_NONBLOCK and duplicates.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn fcntl(fd: c_int, command: c_int, argument: usize) -> c_int {
    // SAFETY: handed on.
    unsafe { control(&FCNTL, fd, command, argument) }
}

/// `fcntl64`: the name that glibc since 2.28 gives `fcntl` in programs with large files.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn fcntl64(fd: c_int, command: c_int, argument: usize) -> c_int {
    // SAFETY: handed on.
    unsafe { control(&FCNTL64, fd, command, argument) }
}

/// `ioctl(2)`: FIONBIO, and what FIONREAD says of a ring.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    let unread = if request == libc::FIONREAD as c_ulong { socket::unread(fd) } else { None };
    if let (Some(n), true) = (unread, argument != 0) {
        // SAFETY: FIONREAD's argument is the application's valid pointer to an int.
        unsafe { *(argument as *mut c_int) = n.min(c_int::MAX as usize) as c_int };
        return 0;
    }
    // SAFETY: the symbol is ioctl, of this type.
    let real: Ioctl = unsafe { std::mem::transmute(IOCTL.get()) };
    // SAFETY: the application's arguments, handed on.
    let got = unsafe { real(fd, request, argument) };
    if got >= 0 && request == libc::FIONBIO as c_ulong && argument != 0 {
        // SAFETY: FIONBIO's argument is the application's valid pointer to an int.
        socket::set_nonblocking(fd, unsafe { *(argument as *const c_int) } != 0);
    }
    got
}

type Prctl = unsafe extern "C" fn(c_int, ...) -> c_int;

/// `prctl(2)`: a sandbox of system calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prctl(option: c_int, b: c_ulong, c: c_ulong, d: c_ulong, e: c_ulong) -> c_int {
    if option == libc::PR_SET_SECCOMP {
        client::confine();
    }
    // SAFETY: the symbol is prctl, of this type; the application's arguments, handed on.
    unsafe {
        let real: Prctl = std::mem::transmute(PRCTL.get());
        real(option, b, c, d, e)
    }
}

type Setsockopt = unsafe extern "C" fn(c_int, c_int, c_int, *const c_void, socklen_t) -> c_int;

/// `setsockopt(2)`: SO_RCVLOWAT, which rings are to keep to as well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: socklen_t,
) -> c_int {
    // SAFETY: the symbol is setsockopt, of this type; the application's arguments, handed on.
    let got = unsafe {
        let real: Setsockopt = std::mem::transmute(SETSOCKOPT.get());
        real(fd, level, name, value, len)
    };
    if got == 0 && (level, name) == (libc::SOL_SOCKET, libc::SO_RCVLOWAT) {
        // SAFETY: the kernel has just read an int there.
        socket::receive_least(fd, unsafe { value.cast::<c_int>().read_unaligned() });
    }
    got
}

type Getsockopt = unsafe extern "C" fn(c_int, c_int, c_int, *mut c_void, *mut socklen_t) -> c_int;

/// `getsockopt(2)`: SO_ERROR of a connection that was reset on its lane.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    len: *mut socklen_t,
) -> c_int {
    // SAFETY: the symbol is getsockopt, of this type; the application's arguments, handed on.
    let got = unsafe {
        let real: Getsockopt = std::mem::transmute(GETSOCKOPT.get());
        real(fd, level, name, value, len)
    };
    let asked = got == 0 && (level, name) == (libc::SOL_SOCKET, libc::SO_ERROR);
    if let Some(error) = if asked { socket::error_told(fd) } else { None } {
        // SAFETY: the kernel has just stored an int there.
        unsafe {
            let place = value.cast::<c_int>();
            if *len as usize == size_of::<c_int>() {
                place.write_unaligned(error.raw_os_error());
            }
        }
    }
    got
}
