//! Signals: what interrupts, what is restarted, handlers that do socket I/O themselves, and the signal of a broken pipe.

use super::Group;
use super::transfer::{RECEIVE, Receive};
use crate::pair::Pair;
use crate::sys::{self, Ret, ret};
use libc::c_int;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

static BROKEN: AtomicU32 = AtomicU32::new(0);
static RUNG: AtomicU32 = AtomicU32::new(0);
/// A descriptor to which the alarm's handler writes.
static WRITES: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_pipe(_: c_int) {
    BROKEN.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn on_alarm(_: c_int) {
    RUNG.fetch_add(1, Ordering::Relaxed);
    let fd = WRITES.swap(-1, Ordering::Relaxed);
    if fd >= 0 {
        sys::send(fd, b"!", libc::MSG_DONTWAIT);
    }
}

fn handle(signal: c_int, handler: extern "C" fn(c_int), flags: c_int) {
    // SAFETY: zero is valid; the handler makes only calls that a handler may make.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = flags;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut());
    }
}

/// Counts broken pipes from now on.
pub fn catch() {
    BROKEN.store(0, Ordering::Relaxed);
    handle(libc::SIGPIPE, on_pipe, libc::SA_RESTART);
}

/// Writes down how many there were since the last time.
pub fn caught(p: &mut Pair) {
    p.note(format_args!("SIGPIPE {}", BROKEN.swap(0, Ordering::Relaxed)));
}

/// Rings every 15 ms while it lives.
struct Alarm;

impl Alarm {
    fn start(flags: c_int) -> Self {
        RUNG.store(0, Ordering::Relaxed);
        handle(libc::SIGALRM, on_alarm, flags);
        Self::every(15_000);
        Self
    }

    fn every(micros: i64) {
        let time = libc::timeval { tv_sec: 0, tv_usec: micros };
        let timer = libc::itimerval { it_interval: time, it_value: time };
        // SAFETY: a valid timer.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        Self::every(0);
    }
}

fn interrupted(p: &mut Pair, name: &str, call: Receive) {
    let mut room = [0; 16];
    let alarm = Alarm::start(0);
    let got = call(p.near, &mut room);
    drop(alarm);
    p.got(name, got, &room);
}

fn restarted(p: &mut Pair, name: &str, call: Receive) {
    let mut room = [0; 16];
    let alarm = Alarm::start(libc::SA_RESTART);
    p.far("later send", &[9, 0]);
    let got = call(p.near, &mut room);
    drop(alarm);
    p.got(name, got, &room);
}

/// Waits of one descriptor for input: events, or what went wrong.
const WAITS: [(&str, fn(c_int) -> Ret); 6] = [
    ("poll", |fd| sys::poll(fd, libc::POLLIN, 4000).0),
    ("select", |fd| {
        // SAFETY: a set of our own.
        unsafe {
            let mut set: libc::fd_set = std::mem::zeroed();
            libc::FD_SET(fd, &raw mut set);
            let none = std::ptr::null_mut();
            ret(libc::select(fd + 1, &raw mut set, none, none, none.cast()))
        }
    }),
    ("pselect", |fd| {
        // SAFETY: a set of our own.
        unsafe {
            let mut set: libc::fd_set = std::mem::zeroed();
            libc::FD_SET(fd, &raw mut set);
            let none = std::ptr::null_mut();
            ret(libc::pselect(fd + 1, &raw mut set, none, none, std::ptr::null(), std::ptr::null()))
        }
    }),
    ("ppoll", |fd| {
        let mut one = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: a list of our own.
        ret(unsafe { libc::ppoll(&raw mut one, 1, std::ptr::null(), std::ptr::null()) })
    }),
    ("epoll_wait", |fd| super::epoll::once(fd, libc::EPOLLIN as u32, 4000)),
    ("epoll_pwait", |fd| {
        let set = super::epoll::Set::of(fd, libc::EPOLLIN as u32);
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: a list of our own.
        ret(unsafe { libc::epoll_pwait(set.0, &raw mut event, 1, 4000, std::ptr::null()) })
    }),
];

pub fn group() -> Group {
    let mut group = Group::new("signals");
    let ones = ["read", "recv", "recvmsg", "recvmmsg", "syscall-read"];
    for (_, name, call) in RECEIVE.into_iter().filter(|(_, name, _)| ones.contains(name)) {
        group.case("7.39", &format!("{name}/interrupted"), move |p| interrupted(p, name, call));
        group.case("7.39", &format!("{name}/restarted"), move |p| restarted(p, name, call));
    }
    for (name, wait) in WAITS {
        for (how, flags) in [("interrupted", 0), ("not restarted", libc::SA_RESTART)] {
            group.case("7.39", &format!("{name}/{how}"), move |p| {
                let alarm = Alarm::start(flags);
                let got = wait(p.near);
                drop(alarm);
                p.call(name, got);
                p.receives(3);
                let got = wait(p.near);
                p.call(name, got);
            });
        }
    }
    group.case("7.39", "send/interrupted", |p| {
        p.fill();
        let alarm = Alarm::start(0);
        let answers = (0..10_000).map(|_| sys::send(p.near, &[1; 100], 0));
        let got = answers.into_iter().find(|got| got.0 < 0).unwrap_or(Ret(100, 0));
        drop(alarm);
        p.call("send", got);
    });
    group.case("7.39", "send/interrupted after a part", |p| {
        let alarm = Alarm::start(0);
        let data = vec![1; 64 << 20];
        let Ret(n, errno) = sys::send(p.near, &data, 0);
        drop(alarm);
        p.note(format_args!("{} {errno}", n > 0 && n < data.len() as isize));
    });
    group.case("7.39", "recv/interrupted with a time-out", |p| {
        sys::set_timeout(p.near, libc::SO_RCVTIMEO, 3000);
        let alarm = Alarm::start(libc::SA_RESTART);
        let got = sys::recv(p.near, &mut [0; 10], 0);
        drop(alarm);
        p.call("recv", got);
    });
    group.case("7.39", "recv/WAITALL interrupted after a part", |p| {
        p.receives(4);
        let mut room = [0; 16];
        let alarm = Alarm::start(0);
        let got = sys::recv(p.near, &mut room, libc::MSG_WAITALL);
        drop(alarm);
        p.got("recv", got, &room);
    });
    group.case("7.39", "handler/sends on the socket that is received from", |p| {
        WRITES.store(p.near, Ordering::Relaxed);
        let alarm = Alarm::start(libc::SA_RESTART);
        p.far("later send", &[6, 0]);
        let mut room = [0; 6];
        let got = sys::recv(p.near, &mut room, 0);
        drop(alarm);
        p.got("recv", got, &room);
        p.far_says("take", &[1]);
    });
    group.case("7.39", "ppoll/mask keeps the signal out", |p| {
        let alarm = Alarm::start(0);
        let mut one = libc::pollfd { fd: p.near, events: libc::POLLIN, revents: 0 };
        let limit = libc::timespec { tv_sec: 0, tv_nsec: 60_000_000 };
        // SAFETY: all of it outlives the call.
        let got = unsafe {
            let mut mask: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut mask, libc::SIGALRM);
            ret(libc::ppoll(&raw mut one, 1, &raw const limit, &raw const mask))
        };
        drop(alarm);
        p.call("ppoll", got);
    });
    group
}
