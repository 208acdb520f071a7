//! Epoll sets: level, edge, one shot, exclusive, nested, several, and what `epoll_ctl` refuses.

use super::Group;
use crate::pair::Pair;
use crate::sys::{self, Ret, ret};
use libc::{EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, c_int, epoll_event};
use std::fmt::Write;

const IN: u32 = libc::EPOLLIN as u32;
const OUT: u32 = libc::EPOLLOUT as u32;
const ET: u32 = libc::EPOLLET as u32;
const RDHUP: u32 = libc::EPOLLRDHUP as u32;
const ONESHOT: u32 = libc::EPOLLONESHOT as u32;
const EXCLUSIVE: u32 = libc::EPOLLEXCLUSIVE as u32;

/// An epoll set, closed with the value.
pub struct Set(pub c_int);

impl Set {
    pub fn new() -> Self {
        // SAFETY: a number.
        Self(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
    }

    /// A set with one descriptor, under 7.
    pub fn of(fd: c_int, events: u32) -> Self {
        let set = Self::new();
        set.ctl(EPOLL_CTL_ADD, fd, events, 7);
        set
    }

    pub fn ctl(&self, op: c_int, fd: c_int, events: u32, data: u64) -> Ret {
        let mut event = epoll_event { events, u64: data };
        // SAFETY: an event of our own.
        ret(unsafe { libc::epoll_ctl(self.0, op, fd, &raw mut event) })
    }

    /// What a wait says, as text, in the order of the data.
    pub fn wait(&self, most: usize, milliseconds: c_int) -> String {
        // Beside a busy ring the kernel is looked at only every 50 µs, which is by design.
        std::thread::sleep(std::time::Duration::from_micros(200));
        let mut list = vec![epoll_event { events: 0, u64: 0 }; most.max(1)];
        // SAFETY: a list of our own.
        let got = ret(unsafe { libc::epoll_wait(self.0, list.as_mut_ptr(), most as c_int, milliseconds) });
        list.truncate(got.0.max(0) as usize);
        list.sort_by_key(|e| e.u64);
        let mut text = format!("epoll_wait = {got}");
        for event in list {
            let (events, data) = (event.events, event.u64);
            let _ = write!(text, " {data}:{events:#x}");
        }
        text
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        sys::close(self.0);
    }
}

/// A wait in a set of its own for one descriptor.
pub fn once(fd: c_int, events: u32, milliseconds: c_int) -> Ret {
    let set = Set::of(fd, events);
    let mut event = epoll_event { events: 0, u64: 0 };
    // SAFETY: an event of our own.
    ret(unsafe { libc::epoll_wait(set.0, &raw mut event, 1, milliseconds) })
}

fn waits(p: &mut Pair, set: &Set) {
    let said = set.wait(8, 0);
    p.note(said);
}

fn drained(p: &mut Pair) {
    while p.recv(7, libc::MSG_DONTWAIT).0 > 0 {}
}

/// The same course with different interests: idle, data, more data, a part taken, all taken, again data, modified, end.
fn course(p: &mut Pair, events: u32) {
    let set = Set::of(p.near, events);
    waits(p, &set);
    waits(p, &set);
    p.receives(10);
    waits(p, &set);
    waits(p, &set);
    p.receives(5);
    waits(p, &set);
    p.recv(4, 0);
    waits(p, &set);
    drained(p);
    waits(p, &set);
    p.receives(6);
    waits(p, &set);
    let got = set.ctl(EPOLL_CTL_MOD, p.near, events, 8);
    p.call("MOD", got);
    waits(p, &set);
    waits(p, &set);
    drained(p);
    p.far_says("shutdown", &[1]);
    p.until_end();
    waits(p, &set);
    waits(p, &set);
    p.recv(4, 0);
    waits(p, &set);
}

fn refusals(p: &mut Pair) {
    let set = Set::of(p.near, IN);
    let other = Set::new();
    let pipe = sys::pipe();
    let calls = [
        ("ADD again", set.ctl(EPOLL_CTL_ADD, p.near, IN, 1)),
        ("MOD absent", other.ctl(EPOLL_CTL_MOD, p.near, IN, 1)),
        ("DEL absent", other.ctl(EPOLL_CTL_DEL, p.near, 0, 0)),
        ("bad operation", set.ctl(9, p.near, IN, 1)),
        ("not open", set.ctl(EPOLL_CTL_ADD, 4000, IN, 1)),
        ("itself", set.ctl(EPOLL_CTL_ADD, set.0, IN, 1)),
        ("not a set", Ret(Set(pipe[0]).ctl(EPOLL_CTL_ADD, p.near, IN, 1).0, 0)),
        ("exclusive MOD", set.ctl(EPOLL_CTL_MOD, p.near, IN | EXCLUSIVE, 1)),
        ("exclusive one-shot", other.ctl(EPOLL_CTL_ADD, p.near, IN | EXCLUSIVE | ONESHOT, 1)),
        ("exclusive ADD", other.ctl(EPOLL_CTL_ADD, p.near, IN | EXCLUSIVE, 1)),
        ("MOD of exclusive", other.ctl(EPOLL_CTL_MOD, p.near, IN, 1)),
        ("DEL", set.ctl(EPOLL_CTL_DEL, p.near, 0, 0)),
        ("DEL again", set.ctl(EPOLL_CTL_DEL, p.near, 0, 0)),
        // SAFETY: null is what is asked about.
        (
            "DEL without an event",
            ret(unsafe { libc::epoll_ctl(other.0, EPOLL_CTL_DEL, p.near, std::ptr::null_mut()) }),
        ),
        (
            "ADD without an event",
            ret(unsafe { libc::epoll_ctl(other.0, EPOLL_CTL_ADD, p.near, std::ptr::null_mut()) }),
        ),
    ];
    sys::close(pipe[1]);
    for (what, got) in calls {
        p.call(what, got);
    }
    p.receives(1);
    waits(p, &set);
    waits(p, &other);
    for most in [0, -1] {
        let mut event = epoll_event { events: 0, u64: 0 };
        // SAFETY: an event of our own, of which none is stored.
        let got = ret(unsafe { libc::epoll_wait(set.0, &raw mut event, most, 0) });
        p.call(format_args!("maxevents {most}"), got);
    }
}

pub fn group() -> Group {
    let mut group = Group::new("epoll");
    let interests = [
        ("level IN", IN),
        ("level IN|RDHUP", IN | RDHUP),
        ("level IN|OUT", IN | OUT),
        ("level nothing", 0),
        ("edge IN", IN | ET),
        ("edge IN|RDHUP", IN | RDHUP | ET),
        ("edge IN|OUT", IN | OUT | ET),
        ("edge OUT", OUT | ET),
        ("one shot IN", IN | ONESHOT),
        ("one shot IN|OUT", IN | OUT | ONESHOT),
        ("one shot edge IN", IN | ONESHOT | ET),
        ("exclusive IN", IN | EXCLUSIVE),
    ];
    for (name, events) in interests {
        let case = group.case("7.23", &format!("{name}/a course of events"), move |p| course(p, events));
        // Nobody knows whether the kernel has told of what it was asked to watch so far.
        case.across = (events & ET != 0).then_some("an edge may be told again when it comes to its lane");
        group.case("7.23", &format!("{name}/added when data is there"), move |p| {
            p.receives(10);
            let set = Set::of(p.near, events);
            waits(p, &set);
            waits(p, &set);
            drained(p);
            waits(p, &set);
        });
        group.case("7.23", &format!("{name}/reset"), move |p| {
            let set = Set::of(p.near, events);
            waits(p, &set);
            p.far_says("reset", &[]);
            p.until_reset();
            waits(p, &set);
            waits(p, &set);
            p.recv(5, libc::MSG_DONTWAIT);
            waits(p, &set);
        });
        // When the far kernel acknowledges a FIN, that is an edge, at a time of its own.
        if events & ET != 0 {
            continue;
        }
        group.case("7.23", &format!("{name}/this end shuts"), move |p| {
            let set = Set::of(p.near, events);
            waits(p, &set);
            for how in [libc::SHUT_WR, libc::SHUT_RD] {
                sys::shutdown(p.near, how);
                waits(p, &set);
                waits(p, &set);
            }
        });
    }
    for (name, events) in [("level OUT", OUT), ("edge OUT", OUT | ET), ("one shot OUT", OUT | ONESHOT)] {
        group.case("7.23", &format!("{name}/full, then room"), move |p| {
            let set = Set::of(p.near, events);
            waits(p, &set);
            p.fill();
            waits(p, &set);
            p.far("later take", &[64 << 20]);
            if events & ONESHOT != 0 {
                set.ctl(EPOLL_CTL_MOD, p.near, events, 7);
            }
            let said = set.wait(8, 4000);
            p.note(said);
            sys::shutdown(p.near, libc::SHUT_WR);
        });
    }
    group.case("7.23", "wait/data comes later", |p| {
        let set = Set::of(p.near, IN);
        p.far("later send", &[5, 0]);
        let said = set.wait(8, 4000);
        p.note(said);
        waits(p, &set);
    });
    group.case("7.23", "wait/time-out", |p| {
        let set = Set::of(p.near, IN);
        let said = set.wait(8, 20);
        p.note(said);
    });
    group.case("7.22", "two sets/both hear", |p| {
        let sets = [Set::of(p.near, IN), Set::of(p.near, IN | ET)];
        p.receives(5);
        for set in &sets {
            waits(p, set);
            waits(p, set);
        }
        drained(p);
        for set in &sets {
            waits(p, set);
        }
    });
    group.case("7.21", "a set in a set/level", |p| {
        let inner = Set::of(p.near, IN);
        let outer = Set::of(inner.0, IN);
        waits(p, &outer);
        p.receives(5);
        waits(p, &outer);
        waits(p, &outer);
        waits(p, &inner);
        drained(p);
        waits(p, &outer);
    });
    group.case("7.21", "a set in a set/data comes later", |p| {
        let inner = Set::of(p.near, IN);
        let outer = Set::of(inner.0, IN);
        p.far("later send", &[5, 0]);
        let said = outer.wait(8, 4000);
        p.note(said);
    });
    group.case("7.21", "a set in poll/data", |p| {
        let set = Set::of(p.near, IN);
        let before = sys::poll(set.0, libc::POLLIN, 0);
        p.call(format_args!("poll {:#x}", before.1), before.0);
        p.receives(5);
        let after = sys::poll(set.0, libc::POLLIN, 0);
        p.call(format_args!("poll {:#x}", after.1), after.0);
        drained(p);
        let after = sys::poll(set.0, libc::POLLIN, 0);
        p.call(format_args!("poll {:#x}", after.1), after.0);
    });
    group.case("7.21", "a set in poll/data comes later", |p| {
        let set = Set::of(p.near, IN);
        p.far("later send", &[5, 0]);
        let after = sys::poll(set.0, libc::POLLIN, 4000);
        p.call(format_args!("poll {:#x}", after.1), after.0);
    });
    group.case("7.21", "a set in a set/edge", |p| {
        let inner = Set::of(p.near, IN);
        let outer = Set::of(inner.0, IN | ET);
        waits(p, &outer);
        p.receives(5);
        waits(p, &outer);
        waits(p, &outer);
        drained(p);
        waits(p, &outer);
        p.receives(5);
        waits(p, &outer);
    });
    group.case("7.21", "a set in a set/one shot", |p| {
        let inner = Set::of(p.near, IN);
        let outer = Set::of(inner.0, IN | ONESHOT);
        waits(p, &outer);
        p.far("later send", &[5, 0]);
        let said = outer.wait(8, 4000);
        p.note(said);
        p.receives(5);
        waits(p, &outer);
        outer.ctl(EPOLL_CTL_MOD, inner.0, IN | ONESHOT, 7);
        waits(p, &outer);
    });
    group.case("7.21", "a set in a set/among other things", |p| {
        let pipe = sys::pipe();
        let inner = Set::of(p.near, IN);
        inner.ctl(EPOLL_CTL_ADD, pipe[0], IN, 9);
        let outer = Set::of(inner.0, IN);
        waits(p, &outer);
        // SAFETY: a byte of our own.
        unsafe { libc::write(pipe[1], b"x".as_ptr().cast(), 1) };
        waits(p, &outer);
        waits(p, &inner);
        p.receives(5);
        waits(p, &inner);
        inner.ctl(EPOLL_CTL_DEL, pipe[0], 0, 0);
        waits(p, &outer);
        drained(p);
        waits(p, &outer);
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
    });
    group.case("7.21", "a set in a set/three deep", |p| {
        let inner = Set::of(p.near, IN);
        let middle = Set::of(inner.0, IN);
        let outer = Set::of(middle.0, IN);
        waits(p, &outer);
        p.far("later send", &[5, 0]);
        let said = outer.wait(8, 4000);
        p.note(said);
        drained(p);
        waits(p, &outer);
        let polled = sys::poll(outer.0, libc::POLLIN, 0);
        p.call(format_args!("poll {:#x}", polled.1), polled.0);
    });
    group.case("7.21", "a set in a set/room", |p| {
        let inner = Set::of(p.near, OUT);
        let outer = Set::of(inner.0, IN);
        waits(p, &outer);
        waits(p, &inner);
        inner.ctl(EPOLL_CTL_MOD, p.near, IN, 7);
        waits(p, &outer);
        inner.ctl(EPOLL_CTL_DEL, p.near, 0, 0);
        p.receives(5);
        waits(p, &outer);
    });
    group.case("7.21", "a set in a set/closed", |p| {
        let inner = Set::of(p.near, IN);
        let outer = Set::of(inner.0, IN);
        p.receives(5);
        waits(p, &outer);
        drop(inner);
        waits(p, &outer);
    });
    group.case("7.21", "a set in a set/in a circle", |p| {
        let inner = Set::of(p.near, IN);
        let outer = Set::of(inner.0, IN);
        for (set, fd) in [(&inner, outer.0), (&outer, outer.0), (&inner, inner.0)] {
            let refused = set.ctl(EPOLL_CTL_ADD, fd, IN, 9);
            p.call("add", refused);
        }
        waits(p, &outer);
        p.receives(5);
        waits(p, &outer);
        waits(p, &inner);
    });
    group.case("7.20", "mixed/a pipe beside it, one event at a time", |p| {
        let pipe = sys::pipe();
        let set = Set::of(p.near, IN);
        set.ctl(EPOLL_CTL_ADD, pipe[0], IN, 9);
        p.receives(5);
        // SAFETY: a byte of our own.
        unsafe { libc::write(pipe[1], b"x".as_ptr().cast(), 1) };
        waits(p, &set);
        let seen: std::collections::BTreeSet<String> = (0..6).map(|_| set.wait(1, 0)).collect();
        p.note(format_args!("{seen:?}"));
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
    });
    group.case("7.23", "ctl/refusals", refusals);
    group.case("7.10", "close/takes it out of the set", |p| {
        let set = Set::of(p.near, IN);
        p.receives(5);
        sys::close(p.near);
        waits(p, &set);
        p.near = -1;
    });
    for (name, events) in [("level", IN), ("edge", IN | ET), ("one shot", IN | ONESHOT)] {
        group.case("7.10", &format!("close/a duplicate keeps it in the set, {name}"), move |p| {
            let set = Set::of(p.near, events);
            // SAFETY: a number.
            let twin = unsafe { libc::dup(p.near) };
            let number = p.near;
            sys::close(p.near);
            p.near = twin;
            p.receives(5);
            waits(p, &set);
            waits(p, &set);
            p.recv(3, 0);
            waits(p, &set);
            p.receives(5);
            waits(p, &set);
            // Neither number stands for it any more, or can take it out.
            for fd in [twin, number] {
                let got = set.ctl(EPOLL_CTL_DEL, fd, 0, 0);
                p.call("DEL", got);
            }
            let got = set.ctl(EPOLL_CTL_ADD, twin, IN, 8);
            p.call("ADD", got);
            waits(p, &set);
            sys::close(p.near);
            p.near = -1;
            waits(p, &set);
        });
    }
    group.case("7.10", "close/a duplicate keeps it, and the number names another", |p| {
        let set = Set::of(p.near, IN);
        // SAFETY: a number.
        let twin = unsafe { libc::dup(p.near) };
        let pipe = sys::pipe();
        // SAFETY: numbers.
        unsafe { libc::dup2(pipe[0], p.near) };
        let got = set.ctl(EPOLL_CTL_ADD, p.near, IN, 9);
        p.call("ADD", got);
        let number = std::mem::replace(&mut p.near, twin);
        p.receives(5);
        waits(p, &set);
        // SAFETY: a byte of our own.
        unsafe { libc::write(pipe[1], b"x".as_ptr().cast(), 1) };
        waits(p, &set);
        let got = set.ctl(EPOLL_CTL_DEL, number, 0, 0);
        p.call("DEL", got);
        drained(p);
        waits(p, &set);
        [number, pipe[0], pipe[1]].iter().for_each(|fd| {
            sys::close(*fd);
        });
    });
    group.case("7.10", "dup/both numbers in one set", |p| {
        let set = Set::of(p.near, IN);
        // SAFETY: a number.
        let twin = unsafe { libc::dup(p.near) };
        let got = set.ctl(EPOLL_CTL_ADD, twin, IN | ET, 11);
        p.call("ADD", got);
        p.receives(5);
        waits(p, &set);
        waits(p, &set);
        sys::close(twin);
    });
    group.case("7.23", "DEL/then ADD", |p| {
        let set = Set::of(p.near, IN);
        p.receives(5);
        let got = set.ctl(EPOLL_CTL_DEL, p.near, 0, 0);
        p.call("DEL", got);
        waits(p, &set);
        let got = set.ctl(EPOLL_CTL_ADD, p.near, IN | ET, 12);
        p.call("ADD", got);
        waits(p, &set);
        waits(p, &set);
    });
    group.case("7.23", "epoll_pwait2/limits", |p| {
        let set = Set::of(p.near, IN);
        for (sec, nsec) in [(0, 0), (0, 1_000_000), (-1, 0), (0, 1_000_000_000)] {
            let mut event = epoll_event { events: 0, u64: 0 };
            let limit = libc::timespec { tv_sec: sec, tv_nsec: nsec };
            // SAFETY: all of it outlives the call.
            let got = ret(unsafe {
                libc::syscall(
                    libc::SYS_epoll_pwait2,
                    set.0,
                    &raw mut event,
                    1,
                    &raw const limit,
                    0usize,
                    8usize,
                )
            });
            p.call(format_args!("epoll_pwait2 {sec} {nsec}"), got);
        }
        p.receives(2);
        let mut event = epoll_event { events: 0, u64: 0 };
        // SAFETY: all of it outlives the call.
        let got = ret(unsafe { libc::syscall(libc::SYS_epoll_wait, set.0, &raw mut event, 1, 0) });
        p.call("syscall epoll_wait", got);
    });
    group
}
