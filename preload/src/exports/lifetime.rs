//! Where descriptors come from and go to.

use libc::{c_int, c_uint, sockaddr, socklen_t};
use vsocket_frontend::program::{Outcome, epoll, fork, found, socket};

use crate::args;
use crate::hook::ours;

// SAFETY, for every hook of this file: the arguments are the application's own and are only handed on.

/// The loader runs this before the program has a second thread.
// SAFETY: the section is an array of pointers to such functions, and this one needs nothing that is not there yet: some
// system calls and `pthread_atfork`, of libraries that the loader has initialised before.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = at_load;

extern "C" fn at_load() {
    fork::at_load();
    found::at_load();
}

fn is_inet(family: c_int) -> bool {
    family == libc::AF_INET || family == libc::AF_INET6
}

hook! { unsafe fn connect(fd: c_int, to: *const sockaddr, len: socklen_t) -> c_int => vs_connect {
    // SAFETY: see above; a valid address begins with its family.
    unsafe {
        let got = real!(connect)(fd, to, len);
        let begun = got == 0 || *libc::__errno_location() == libc::EINPROGRESS;
        if begun && !to.is_null() && is_inet(c_int::from((*to).sa_family)) {
            let errno = *libc::__errno_location();
            ours(|| socket::appeared(fd, true));
            args::set_errno(errno);
        }
        got
    }
} }

/// A connection was accepted, from this address. Where the application has no room for it, the kernel says what it is.
unsafe fn accepted(new: c_int, from: *const sockaddr, room: socklen_t) {
    let told = room as usize >= size_of::<libc::sa_family_t>();
    // SAFETY: the kernel has just stored at least as much of an address.
    let family = told.then(|| unsafe { (*from).sa_family });
    if family.is_none_or(|family| is_inet(c_int::from(family))) {
        ours(|| socket::appeared(new, false));
    }
}

hook! { unsafe fn accept(fd: c_int, from: *mut sockaddr, len: *mut socklen_t) -> c_int => vs_accept {
    // SAFETY: see above.
    unsafe { vs_accept4(fd, from, len, 0) }
} }

hook! { unsafe fn accept4(fd: c_int, from: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int => vs_accept4 {
    // SAFETY: see above; where the application does not ask who it is, it is asked here, which costs no further call.
    unsafe {
        if !from.is_null() && len.is_null() {
            return real!(accept4)(fd, from, len, flags);
        }
        let mut place = std::mem::MaybeUninit::<sockaddr>::uninit();
        let mut room = size_of::<sockaddr>() as socklen_t;
        let (from, len) = if from.is_null() { (place.as_mut_ptr(), &raw mut room) } else { (from, len) };
        let before = *len;
        let new = real!(accept4)(fd, from, len, flags);
        if new >= 0 {
            accepted(new, from, before.min(*len));
        }
        new
    }
} }

hook! { unsafe fn close(fd: c_int) -> c_int => vs_close {
    if socket::concerns_close(fd) {
        ours(|| socket::before_close(fd));
    }
    // SAFETY: see above.
    unsafe { real!(close)(fd) }
} }

hook! { unsafe fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int => vs_close_range {
    if flags as c_uint & libc::CLOSE_RANGE_CLOEXEC == 0 {
        ours(|| socket::before_close_range(first, last));
    }
    // SAFETY: see above.
    unsafe { real!(close_range)(first, last, flags) }
} }

hook! { unsafe fn closefrom(first: c_int) -> () => vs_closefrom {
    ours(|| socket::before_close_range(first.max(0) as c_uint, c_uint::MAX));
    // SAFETY: see above.
    unsafe { real!(closefrom)(first) }
} }

hook! { unsafe fn dup(fd: c_int) -> c_int => vs_dup {
    // SAFETY: see above.
    let new = unsafe { real!(dup)(fd) };
    if new >= 0 && socket::is_followed(fd) {
        ours(|| socket::duplicated(fd, new));
    }
    new
} }

hook! { unsafe fn dup2(fd: c_int, to: c_int) -> c_int => vs_dup2 {
    if socket::concerns_close(to) {
        ours(|| socket::before_dup(fd, to));
    }
    // SAFETY: see above.
    let new = unsafe { real!(dup2)(fd, to) };
    if new >= 0 && fd != to && socket::is_followed(fd) {
        ours(|| socket::duplicated(fd, new));
    }
    new
} }

hook! { unsafe fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int => vs_dup3 {
    if socket::concerns_close(to) {
        ours(|| socket::before_dup(fd, to));
    }
    // SAFETY: see above.
    let new = unsafe { real!(dup3)(fd, to, flags) };
    if new >= 0 && socket::is_followed(fd) {
        ours(|| socket::duplicated(fd, new));
    }
    new
} }

hook! { unsafe fn shutdown(fd: c_int, how: c_int) -> c_int => vs_shutdown {
    if !socket::is_followed(fd) || !(libc::SHUT_RD..=libc::SHUT_RDWR).contains(&how) {
        // SAFETY: see above.
        return unsafe { real!(shutdown)(fd, how) };
    }
    let (read, write) = (how != libc::SHUT_WR, how != libc::SHUT_RD);
    match ours(|| socket::shutdown(fd, read, write)) {
        Some(Outcome::Done(result)) => args::answer(result.map(|n| n as usize)) as c_int,
        // SAFETY: see above.
        _ => unsafe { real!(shutdown)(fd, how) },
    }
} }

hook! { unsafe fn epoll_create(size: c_int) -> c_int => vs_epoll_create {
    // SAFETY: see above.
    let fd = unsafe { real!(epoll_create)(size) };
    if fd >= 0 {
        ours(|| epoll::created(fd));
    }
    fd
} }

hook! { unsafe fn epoll_create1(flags: c_int) -> c_int => vs_epoll_create1 {
    // SAFETY: see above.
    let fd = unsafe { real!(epoll_create1)(flags) };
    if fd >= 0 {
        ours(|| epoll::created(fd));
    }
    fd
} }
