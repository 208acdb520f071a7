//! Several threads on one connection.

use super::Group;

#[path = "cancel.rs"]
mod cancel;

use crate::pair::Pair;
use crate::sys::{self, Ret};
use libc::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// One thread waits while the other acts, a moment later.
fn beside(p: &mut Pair, wait: fn(c_int) -> Ret, act: fn(c_int) -> Ret) {
    let fd = p.near;
    let waits = std::thread::spawn(move || wait(fd));
    std::thread::sleep(Duration::from_millis(25));
    p.call("act", act(fd));
    let got = waits.join().unwrap_or(Ret(-3, 0));
    p.call("wait", got);
}

fn reads(fd: c_int) -> Ret {
    sys::recv(fd, &mut [0; 8], 0)
}

fn writes(fd: c_int) -> Ret {
    // Zeros, which come without being written: it is to wait in the call when the other thread acts.
    let data = vec![0; 64 << 20];
    let got = sys::send(fd, &data, libc::MSG_NOSIGNAL);
    if got.0 >= 0 { Ret(isize::from(got.0 < data.len() as isize), 0) } else { got }
}

fn polls(fd: c_int) -> Ret {
    sys::poll(fd, libc::POLLIN, 4000).0
}

fn sets(fd: c_int) -> Ret {
    super::epoll::once(fd, libc::EPOLLIN as u32, 4000)
}

pub fn group() -> Group {
    let mut group = Group::new("threads");
    for (name, wait) in [("recv", reads as fn(c_int) -> Ret), ("poll", polls), ("epoll", sets)] {
        let shuts: [(&str, fn(c_int) -> Ret); 2] = [
            ("RD", |fd| sys::shutdown(fd, libc::SHUT_RD)),
            ("RDWR", |fd| sys::shutdown(fd, libc::SHUT_RDWR)),
        ];
        for (what, act) in shuts {
            group.case("7.41", &format!("{name}/another thread shuts {what}"), move |p| beside(p, wait, act));
        }
        group.case("7.41", &format!("{name}/another thread sends"), move |p| {
            p.far("later send", &[5, 0]);
            beside(p, wait, |fd| sys::send(fd, &[1; 5], 0));
        });
    }
    group.case("7.41", "send/another thread shuts RDWR", |p| beside(p, writes, |fd| sys::shutdown(fd, 2)));
    group.case("7.42", "send/four threads, whole messages", |p| {
        let fd = p.near;
        p.far("later take", &[4 * 200 * 64]);
        let threads: Vec<_> = (0..4u8)
            .map(|t| {
                std::thread::spawn(move || (0..200).map(|_| sys::send(fd, &[t; 64], 0).0).sum::<isize>())
            })
            .collect();
        let sent: isize = threads.into_iter().map(|t| t.join().unwrap_or(-1)).sum();
        p.note(sent);
        let took = p.far("told", &[]);
        p.note(took.split(' ').next().unwrap_or_default().to_owned());
    });
    group.case("7.42", "recv/four threads share the bytes", |p| {
        static TAKEN: AtomicUsize = AtomicUsize::new(0);
        TAKEN.store(0, Ordering::Relaxed);
        let fd = p.near;
        p.far("later send", &[200_000, 0]);
        let takes = move || {
            let mut room = [0; 500];
            while let n @ 1.. = sys::recv(fd, &mut room, 0).0 {
                TAKEN.fetch_add(n as usize, Ordering::Relaxed);
            }
        };
        let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(takes)).collect();
        // The end comes behind them: it takes what is still under way off the lane.
        p.note(sys::soon(|| TAKEN.load(Ordering::Relaxed) == 200_000));
        p.far_says("shutdown", &[1]);
        p.note(threads.into_iter().all(|t| t.join().is_ok()));
        p.note(TAKEN.load(Ordering::Relaxed));
    });
    group.case("7.42", "both ways/a thread each", |p| {
        let fd = p.near;
        let n = 1_000_000;
        let data = p.next(n);
        p.far("later take", &[n as i64]);
        let sender = std::thread::spawn(move || sys::send(fd, &data, 0).0);
        p.note(sender.join().unwrap_or(-1));
        p.far_says("told", &[]);
        p.far("later send", &[n as i64, 0]);
        p.take(n);
    });
    group.case("7.23", "epoll/ADD while another thread waits", |p| {
        let set = super::epoll::Set::new();
        let number = set.0;
        let waits = std::thread::spawn(move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: an event of our own.
            sys::ret(unsafe { libc::epoll_wait(number, &raw mut event, 1, 4000) })
        });
        p.receives(5);
        std::thread::sleep(Duration::from_millis(20));
        p.call("ADD", set.ctl(libc::EPOLL_CTL_ADD, p.near, libc::EPOLLIN as u32, 3));
        let got = waits.join().unwrap_or(Ret(-3, 0));
        p.call("epoll_wait", got);
    });
    group.case("7.23", "epoll/MOD while another thread waits", |p| {
        let set = super::epoll::Set::of(p.near, 0);
        let number = set.0;
        let waits = std::thread::spawn(move || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: an event of our own.
            sys::ret(unsafe { libc::epoll_wait(number, &raw mut event, 1, 4000) })
        });
        p.receives(5);
        std::thread::sleep(Duration::from_millis(20));
        p.call("MOD", set.ctl(libc::EPOLL_CTL_MOD, p.near, libc::EPOLLIN as u32, 3));
        let got = waits.join().unwrap_or(Ret(-3, 0));
        p.call("epoll_wait", got);
    });
    for (name, waits) in cancel::WAYS {
        group.case("7.40", &format!("cancel/a thread that waits in {name}"), move |p| {
            cancel::waiting(p, waits)
        });
    }
    group.case("7.40", "cancel/a thread that waits in send", |p| {
        let fd = p.near;
        let mut said = String::new();
        // The kernel may find room for a few bytes more, and then nobody waits.
        for _ in 0..20 {
            p.fill();
            said = cancel::ended(cancel::sends, fd, Duration::from_millis(25));
            if said != "0 0 0 0 0" {
                break;
            }
        }
        p.note(said);
        p.polled(libc::POLLOUT);
    });
    group.case("7.40", "cancel/before the call, with data", |p| {
        p.receives(5);
        let fd = p.near;
        p.note(cancel::ended(cancel::late, fd, Duration::ZERO));
        p.recv(8, 0);
    });
    group.case("7.40", "cancel/not while it is disabled", |p| {
        let fd = p.near;
        p.far("later send", &[5, 0]);
        p.note(cancel::ended(cancel::disabled, fd, Duration::ZERO));
        p.receives(6);
        p.recv(9, 0);
    });
    group.case("7.40", "cancel/a thread that waits for something else", |p| {
        p.note(cancel::ended(cancel::receives, sys::pipe()[0], Duration::from_millis(25)));
        p.note(cancel::ended(cancel::reads, sys::pipe()[0], Duration::from_millis(25)));
        p.receives(6);
        p.recv(9, 0);
    });
    // The last: from here on the library takes none but the long way.
    group.case("7.40", "cancel/a thread that may be cancelled at any moment", |p| {
        let fd = p.near;
        p.note(cancel::ended(cancel::anywhere, fd, Duration::from_millis(25)));
        p.receives(6);
        p.recv(9, 0);
    });
    group
}
