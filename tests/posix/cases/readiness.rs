//! `poll`, `select` and their kin in every state of the connection.

use super::Group;
use crate::pair::Pair;
use crate::sys::{self, Ret, ret};
use libc::{c_int, fd_set, pollfd, timespec};

const EVERYTHING: i16 =
    libc::POLLIN | libc::POLLOUT | libc::POLLPRI | libc::POLLRDHUP | libc::POLLRDNORM | libc::POLLWRNORM;

fn list(fd: c_int, events: i16) -> [pollfd; 1] {
    [pollfd { fd, events, revents: 0 }]
}

fn sets(fd: c_int, call: impl Fn(*mut fd_set, *mut fd_set, *mut fd_set) -> c_int) -> String {
    // SAFETY: sets of our own.
    unsafe {
        let mut sets: [fd_set; 3] = std::mem::zeroed();
        sets.iter_mut().for_each(|set| libc::FD_SET(fd, set));
        let [r, w, e] = &mut sets;
        let got = ret(call(r, w, e));
        format!("{got} {:?}", sets.each_ref().map(|set| libc::FD_ISSET(fd, set)))
    }
}

/// Looks without waiting, at everything that can be asked for.
// SAFETY, for all: the arguments outlive the calls.
const LOOKS: [(&str, &str, fn(c_int) -> String); 9] = [
    ("7.24", "poll", |fd| {
        let (got, revents) = sys::poll(fd, EVERYTHING, 0);
        format!("{got} {revents:#x}")
    }),
    ("7.24", "poll nothing", |fd| {
        let (got, revents) = sys::poll(fd, 0, 0);
        format!("{got} {revents:#x}")
    }),
    ("7.24", "ppoll", |fd| {
        let mut one = list(fd, EVERYTHING);
        let zero = timespec { tv_sec: 0, tv_nsec: 0 };
        let got = ret(unsafe { libc::ppoll(one.as_mut_ptr(), 1, &raw const zero, std::ptr::null()) });
        format!("{got} {:#x}", one[0].revents)
    }),
    ("7.2", "__poll_chk", |fd| {
        let mut one = list(fd, EVERYTHING);
        let got = ret(unsafe { sys::__poll_chk(one.as_mut_ptr(), 1, 0, 8) });
        format!("{got} {:#x}", one[0].revents)
    }),
    ("7.24", "select", |fd| {
        sets(fd, |r, w, e| unsafe {
            let mut zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
            libc::select(fd + 1, r, w, e, &raw mut zero)
        })
    }),
    ("7.24", "pselect", |fd| {
        sets(fd, |r, w, e| unsafe {
            let zero = timespec { tv_sec: 0, tv_nsec: 0 };
            libc::pselect(fd + 1, r, w, e, &raw const zero, std::ptr::null())
        })
    }),
    ("7.4", "syscall-poll", |fd| {
        let mut one = list(fd, EVERYTHING);
        let got = ret(unsafe { libc::syscall(libc::SYS_poll, one.as_mut_ptr(), 1, 0) });
        format!("{got} {:#x}", one[0].revents)
    }),
    ("7.4", "syscall-ppoll", |fd| {
        let mut one = list(fd, EVERYTHING);
        let zero = timespec { tv_sec: 0, tv_nsec: 0 };
        let got = ret(unsafe {
            libc::syscall(libc::SYS_ppoll, one.as_mut_ptr(), 1, &raw const zero, 0usize, 8usize)
        });
        format!("{got} {:#x}", one[0].revents)
    }),
    ("7.4", "syscall-pselect6", |fd| {
        sets(fd, |r, w, e| unsafe {
            let zero = timespec { tv_sec: 0, tv_nsec: 0 };
            libc::syscall(libc::SYS_pselect6, fd + 1, r, w, e, &raw const zero, 0usize) as c_int
        })
    }),
];

/// How the connection got where it is.
const STATES: [(&str, fn(&mut Pair)); 9] = [
    ("idle", |_| {}),
    ("data", |p| p.receives(10)),
    ("full", Pair::fill),
    ("the far end has shut", |p| {
        p.far_says("shutdown", &[1]);
        p.until_end();
    }),
    ("data, then the end", |p| {
        p.receives(10);
        p.far_says("shutdown", &[1]);
        p.until_end();
    }),
    ("shut for writing", |p| {
        sys::shutdown(p.near, libc::SHUT_WR);
    }),
    ("shut for reading", |p| {
        sys::shutdown(p.near, libc::SHUT_RD);
    }),
    ("both have shut", |p| {
        sys::shutdown(p.near, libc::SHUT_WR);
        p.far_says("take", &[1]);
        p.far_says("shutdown", &[1]);
        p.until_end();
        p.until(libc::POLLHUP);
    }),
    ("reset", |p| {
        p.far_says("reset", &[]);
        p.until_reset();
    }),
];

/// Waits for input that comes later: what they answer.
const WAITS: [(&str, fn(c_int) -> Ret); 3] = [
    ("poll", |fd| sys::poll(fd, libc::POLLIN, 4000).0),
    ("select", |fd| unsafe {
        let mut set: fd_set = std::mem::zeroed();
        libc::FD_SET(fd, &raw mut set);
        let none = std::ptr::null_mut();
        let mut limit = libc::timeval { tv_sec: 4, tv_usec: 0 };
        ret(libc::select(fd + 1, &raw mut set, none, none, &raw mut limit))
    }),
    ("syscall-poll", |fd| {
        let mut one = list(fd, libc::POLLIN);
        ret(unsafe { libc::syscall(libc::SYS_poll, one.as_mut_ptr(), 1, 4000) })
    }),
];

pub fn group() -> Group {
    let mut group = Group::new("readiness");
    for (row, name, look) in LOOKS {
        for (state, reach) in STATES {
            group.case(row, &format!("{name}/{state}"), move |p| {
                reach(p);
                let said = look(p.near);
                p.note(said);
            });
        }
    }
    for (name, wait) in WAITS {
        group.case("7.24", &format!("{name}/data comes later"), move |p| {
            p.far("later send", &[5, 0]);
            let got = wait(p.near);
            p.call(name, got);
            p.recv(10, libc::MSG_DONTWAIT);
        });
        group.case("7.24", &format!("{name}/the end comes later"), move |p| {
            p.far("later shutdown", &[1]);
            let got = wait(p.near);
            p.call(name, got);
            p.recv(10, libc::MSG_DONTWAIT);
        });
        group.case("7.24", &format!("{name}/a reset comes later"), move |p| {
            p.far("later reset", &[]);
            let got = wait(p.near);
            p.call(name, got);
            p.recv(10, libc::MSG_DONTWAIT);
        });
    }
    group.case("7.24", "poll/time-out", |p| {
        let (got, revents) = sys::poll(p.near, libc::POLLIN, 20);
        p.call(format_args!("poll {revents:#x}"), got);
    });
    group.case("7.24", "poll/full, then room", |p| {
        p.fill();
        p.far("later take", &[64 << 20]);
        let (got, revents) = sys::poll(p.near, libc::POLLOUT, 4000);
        p.call(format_args!("poll {revents:#x}"), got);
        sys::shutdown(p.near, libc::SHUT_WR);
    });
    group.case("7.24", "poll/mixed, negative, closed", |p| {
        let pipe = sys::pipe();
        p.receives(3);
        let mut list = [
            pollfd { fd: p.near, events: libc::POLLIN | libc::POLLOUT, revents: 9 },
            pollfd { fd: -1, events: libc::POLLIN, revents: 9 },
            pollfd { fd: 3999, events: libc::POLLIN, revents: 9 },
            pollfd { fd: pipe[1], events: libc::POLLOUT, revents: 9 },
            pollfd { fd: pipe[0], events: libc::POLLIN, revents: 9 },
            pollfd { fd: p.near, events: 0, revents: 9 },
        ];
        let got = ret(unsafe { libc::poll(list.as_mut_ptr(), 6, 0) });
        p.call(format_args!("poll {:x?}", list.map(|e| e.revents)), got);
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
    });
    group.case("7.24", "select/a number that is not open", |p| unsafe {
        let mut set: fd_set = std::mem::zeroed();
        libc::FD_SET(p.near, &raw mut set);
        // Beyond the process's table the kernel does not look, and that may be small.
        libc::FD_SET(60, &raw mut set);
        let none = std::ptr::null_mut();
        let mut zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let got = ret(libc::select(61, &raw mut set, none, none, &raw mut zero));
        p.call("select", got);
    });
    group.case("7.24", "select/bad arguments", |p| unsafe {
        let mut set: fd_set = std::mem::zeroed();
        libc::FD_SET(p.near, &raw mut set);
        let none = std::ptr::null_mut();
        for (n, sec, usec) in
            [(-1, 0, 0), (p.near + 1, -1, 0), (p.near + 1, 0, -1), (p.near + 1, 0, 1_500_000)]
        {
            libc::FD_SET(p.near, &raw mut set);
            let mut limit = libc::timeval { tv_sec: sec, tv_usec: usec };
            let got = ret(libc::select(n, &raw mut set, none, none, &raw mut limit));
            p.call(format_args!("select {sec} {usec}"), got);
        }
    });
    group.case("7.24", "ppoll/bad time-outs", |p| {
        for (sec, nsec) in [(-1, 0), (0, 1_000_000_000), (0, -1)] {
            let mut one = list(p.near, libc::POLLIN);
            let limit = timespec { tv_sec: sec, tv_nsec: nsec };
            let got = ret(unsafe { libc::ppoll(one.as_mut_ptr(), 1, &raw const limit, std::ptr::null()) });
            p.call(format_args!("ppoll {sec} {nsec}"), got);
        }
    });
    group
}
