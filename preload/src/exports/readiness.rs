//! Waiting for descriptors.

use crate::args;
use crate::hook::{ours, point};
use libc::{c_int, epoll_event, fd_set, nfds_t, pollfd, sigset_t, size_t, timespec, timeval};
use rustix::event::Timespec;
use rustix::io::Errno;
use std::time::Duration;
use vsocket_frontend::program::{Outcome, cancel, epoll, poll as polling, socket};

// SAFETY, for every hook of this file: the arguments are the application's own, valid as the C function's contract says;
// they are only handed on, or made into slices that end with the call.

/// The real `ppoll` on a list.
unsafe fn real_ppoll(
    list: &mut [pollfd],
    left: Option<Timespec>,
    mask: *const sigset_t,
) -> Result<usize, Errno> {
    let left = left.map(|t| timespec { tv_sec: t.tv_sec, tv_nsec: t.tv_nsec });
    let limit = left.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: a valid list and time-out of our own; the mask is the application's or null.
    args::result(unsafe { real!(ppoll)(list.as_mut_ptr(), list.len() as nfds_t, limit, mask) })
}

/// Serves a wait, and once more if it ended for a cancellation that did not come; `None` if it is the kernel's.
fn again(mut served: impl FnMut() -> Option<Outcome<usize>>) -> Option<c_int> {
    loop {
        point();
        match served() {
            Some(Outcome::Done(Err(cancel::CANCELLED))) => {}
            Some(Outcome::Done(result)) => return Some(args::answer(result) as c_int),
            _ => return None,
        }
    }
}

/// Serves a poll; `None` if it is the kernel's.
unsafe fn serve_poll(
    fds: *mut pollfd,
    n: nfds_t,
    timeout: Option<Duration>,
    mask: *const sigset_t,
) -> Option<c_int> {
    if fds.is_null() || n == 0 || n > 1 << 20 {
        return None;
    }
    // SAFETY: the application promises `n` entries.
    let list = unsafe { std::slice::from_raw_parts_mut(fds, n as usize) };
    // SAFETY: the mask is the application's.
    let real = |l: &mut [pollfd], left| unsafe { real_ppoll(l, left, mask) };
    if !polling::concerns(list) {
        return None;
    }
    again(|| ours(|| polling::poll(list, timeout, real)))
}

hook! { unsafe fn poll(fds: *mut pollfd, n: nfds_t, timeout: c_int) -> c_int => vs_poll {
    // SAFETY: see above.
    unsafe {
        let served = serve_poll(fds, n, args::milliseconds(timeout), std::ptr::null());
        served.unwrap_or_else(|| real!(poll)(fds, n, timeout))
    }
} }

hook! { unsafe fn __poll_chk(fds: *mut pollfd, n: nfds_t, timeout: c_int, room: size_t) -> c_int => vs_poll_chk {
    // SAFETY: see above; a list that is longer than its room is the real function's to end.
    unsafe {
        if room / size_of::<pollfd>() < n as usize {
            return real!(__poll_chk)(fds, n, timeout, room);
        }
        vs_poll(fds, n, timeout)
    }
} }

hook! { unsafe fn ppoll(fds: *mut pollfd, n: nfds_t, limit: *const timespec, mask: *const sigset_t) -> c_int => vs_ppoll {
    // SAFETY: see above.
    unsafe {
        let timeout = args::timespec(limit);
        let served = timeout.ok().and_then(|t| serve_poll(fds, n, t, mask));
        served.unwrap_or_else(|| real!(ppoll)(fds, n, limit, mask))
    }
} }

hook! { unsafe fn __ppoll_chk(fds: *mut pollfd, n: nfds_t, limit: *const timespec, mask: *const sigset_t, room: size_t) -> c_int => vs_ppoll_chk {
    // SAFETY: see above; a list that is longer than its room is the real function's to end.
    unsafe {
        if room / size_of::<pollfd>() < n as usize {
            return real!(__ppoll_chk)(fds, n, limit, mask, room);
        }
        vs_ppoll(fds, n, limit, mask)
    }
} }

hook! { unsafe fn select(n: c_int, r: *mut fd_set, w: *mut fd_set, e: *mut fd_set, limit: *mut timeval) -> c_int => vs_select {
    // SAFETY: see above.
    unsafe {
        if n < 0 || limit.as_ref().is_some_and(|t| t.tv_sec < 0 || t.tv_usec < 0) {
            return real!(select)(n, r, w, e, limit);
        }
        let micros = |t: &timeval| (t.tv_sec as u64).saturating_mul(1_000_000).saturating_add(t.tv_usec as u64);
        let timeout = limit.as_ref().map(|t| Duration::from_micros(micros(t)));
        if !polling::concerns_sets(n, [r, w, e]) {
            return real!(select)(n, r, w, e, limit);
        }
        let deadline = polling::deadline(timeout);
        let real = |l: &mut [pollfd], left| real_ppoll(l, left, std::ptr::null());
        match again(|| ours(|| polling::select(n, [r, w, e], timeout, real))) {
            None => real!(select)(n, r, w, e, limit),
            Some(answer) => {
                if let (Some(limit), Some(deadline)) = (limit.as_mut(), deadline) {
                    // As Linux does: the time that was left.
                    let left = deadline.saturating_duration_since(std::time::Instant::now());
                    limit.tv_sec = left.as_secs() as i64;
                    limit.tv_usec = i64::from(left.subsec_micros());
                }
                answer
            }
        }
    }
} }

hook! { unsafe fn pselect(n: c_int, r: *mut fd_set, w: *mut fd_set, e: *mut fd_set, limit: *const timespec, mask: *const sigset_t) -> c_int => vs_pselect {
    // SAFETY: see above.
    unsafe {
        let timeout = args::timespec(limit);
        let Some(timeout) = timeout.ok().filter(|_| polling::concerns_sets(n, [r, w, e])) else {
            return real!(pselect)(n, r, w, e, limit, mask);
        };
        let real = |l: &mut [pollfd], left| real_ppoll(l, left, mask);
        let served = again(|| ours(|| polling::select(n, [r, w, e], timeout, real)));
        served.unwrap_or_else(|| real!(pselect)(n, r, w, e, limit, mask))
    }
} }

hook! { unsafe fn epoll_ctl(set: c_int, op: c_int, fd: c_int, event: *mut epoll_event) -> c_int => vs_epoll_ctl {
    // SAFETY: see above.
    unsafe {
        if !socket::is_followed(fd) && !epoll::is_set(fd) {
            return real!(epoll_ctl)(set, op, fd, event);
        }
        let asked = event.as_ref().map(|e| (e.events, e.u64));
        match ours(|| epoll::ctl(set, op, fd, asked)) {
            Some(Outcome::Done(result)) => args::answer(result.map(|n| n as usize)) as c_int,
            _ => {
                let got = real!(epoll_ctl)(set, op, fd, event);
                if got == 0 {
                    ours(|| epoll::ctl_done(set, op, fd, asked));
                }
                got
            }
        }
    }
} }

/// The real `epoll_pwait` on a set; a part of a millisecond is rounded up, so that nobody spins on it.
unsafe fn real_epoll(
    set: c_int,
    out: &mut [epoll_event],
    left: Option<Timespec>,
    mask: *const sigset_t,
) -> Result<usize, Errno> {
    let millis = left.map_or(-1, |t| {
        (t.tv_sec * 1000 + (t.tv_nsec + 999_999) / 1_000_000).min(i64::from(c_int::MAX)) as c_int
    });
    // SAFETY: a valid list of our own; the mask is the application's or null.
    args::result(unsafe { real!(epoll_pwait)(set, out.as_mut_ptr(), out.len() as c_int, millis, mask) })
}

/// Serves a wait; `None` if it is the kernel's.
unsafe fn serve_wait(
    set: c_int,
    out: *mut epoll_event,
    n: c_int,
    timeout: Option<Duration>,
    mask: *const sigset_t,
) -> Option<c_int> {
    if out.is_null() || n <= 0 || !epoll::concerns(set) {
        return None;
    }
    // SAFETY: the application promises room for `n` events.
    let list = unsafe { std::slice::from_raw_parts_mut(out, n as usize) };
    // SAFETY: the mask is the application's.
    let real = |l: &mut [epoll_event], left| unsafe { real_epoll(set, l, left, mask) };
    again(|| ours(|| epoll::wait(set, list, timeout, real)))
}

hook! { unsafe fn epoll_wait(set: c_int, out: *mut epoll_event, n: c_int, timeout: c_int) -> c_int => vs_epoll_wait {
    // SAFETY: see above.
    unsafe {
        let served = serve_wait(set, out, n, args::milliseconds(timeout), std::ptr::null());
        served.unwrap_or_else(|| real!(epoll_wait)(set, out, n, timeout))
    }
} }

hook! { unsafe fn epoll_pwait(set: c_int, out: *mut epoll_event, n: c_int, timeout: c_int, mask: *const sigset_t) -> c_int => vs_epoll_pwait {
    // SAFETY: see above.
    unsafe {
        let served = serve_wait(set, out, n, args::milliseconds(timeout), mask);
        served.unwrap_or_else(|| real!(epoll_pwait)(set, out, n, timeout, mask))
    }
} }

hook! { unsafe fn epoll_pwait2(set: c_int, out: *mut epoll_event, n: c_int, limit: *const timespec, mask: *const sigset_t) -> c_int => vs_epoll_pwait2 {
    // SAFETY: see above.
    unsafe {
        let served = args::timespec(limit).ok().and_then(|t| serve_wait(set, out, n, t, mask));
        served.unwrap_or_else(|| real!(epoll_pwait2)(set, out, n, limit, mask))
    }
} }
