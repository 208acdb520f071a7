//! Socket options: what is set, what is told, and what they do to calls.

use super::Group;
use crate::pair::Pair;
use crate::sys;
use libc::c_int;

const SOCKET: c_int = libc::SOL_SOCKET;
const TCP: c_int = libc::IPPROTO_TCP;

/// Options whose value is told as it is.
const TOLD: [(&str, c_int, c_int, usize); 17] = [
    ("SO_TYPE", SOCKET, libc::SO_TYPE, 4),
    ("SO_DOMAIN", SOCKET, libc::SO_DOMAIN, 4),
    ("SO_PROTOCOL", SOCKET, libc::SO_PROTOCOL, 4),
    ("SO_ERROR", SOCKET, libc::SO_ERROR, 4),
    ("SO_ACCEPTCONN", SOCKET, libc::SO_ACCEPTCONN, 4),
    ("SO_RCVLOWAT", SOCKET, libc::SO_RCVLOWAT, 4),
    ("SO_SNDLOWAT", SOCKET, libc::SO_SNDLOWAT, 4),
    ("SO_LINGER", SOCKET, libc::SO_LINGER, 8),
    ("SO_RCVTIMEO", SOCKET, libc::SO_RCVTIMEO, 16),
    ("TCP_MAXSEG too short", TCP, libc::TCP_MAXSEG, 0),
    ("TCP_NODELAY", TCP, libc::TCP_NODELAY, 4),
    ("TCP_KEEPIDLE", TCP, libc::TCP_KEEPIDLE, 4),
    ("TCP_USER_TIMEOUT", TCP, libc::TCP_USER_TIMEOUT, 4),
    ("TCP_CONGESTION", TCP, libc::TCP_CONGESTION, 16),
    ("TCP_INFO state", TCP, libc::TCP_INFO, 1),
    ("unknown option", SOCKET, 9999, 4),
    ("unknown level", 9999, 1, 4),
];

/// Options that are set, told, and kept over data.
const SET: [(&str, c_int, c_int, c_int); 12] = [
    ("SO_KEEPALIVE", SOCKET, libc::SO_KEEPALIVE, 1),
    ("SO_OOBINLINE", SOCKET, libc::SO_OOBINLINE, 1),
    ("SO_PRIORITY", SOCKET, libc::SO_PRIORITY, 3),
    ("SO_REUSEADDR", SOCKET, libc::SO_REUSEADDR, 1),
    ("SO_ZEROCOPY", SOCKET, libc::SO_ZEROCOPY, 1),
    ("SO_BUSY_POLL", SOCKET, libc::SO_BUSY_POLL, 0),
    ("TCP_NODELAY", TCP, libc::TCP_NODELAY, 1),
    ("TCP_CORK", TCP, libc::TCP_CORK, 1),
    ("TCP_QUICKACK", TCP, libc::TCP_QUICKACK, 1),
    ("TCP_KEEPCNT", TCP, libc::TCP_KEEPCNT, 7),
    ("TCP_USER_TIMEOUT", TCP, libc::TCP_USER_TIMEOUT, 30_000),
    ("TCP_NODELAY bad value", TCP, libc::TCP_NODELAY, -1),
];

fn told(p: &mut Pair, level: c_int, name: c_int, room: usize) {
    let (got, value) = sys::option(p.near, level, name, room);
    p.got("getsockopt", got, &value);
    p.note(sys::show(&value));
}

/// After an end of a kind, `SO_ERROR` and the calls behind it.
fn error_after(p: &mut Pair, reset: bool, first: bool) {
    if reset {
        p.far_says("reset", &[]);
        p.until_reset();
    } else {
        p.far_says("shutdown", &[1]);
        p.until_end();
    }
    if first {
        told(p, SOCKET, libc::SO_ERROR, 4);
        told(p, SOCKET, libc::SO_ERROR, 4);
    }
    p.recv(5, libc::MSG_DONTWAIT);
    p.recv(5, libc::MSG_DONTWAIT);
    told(p, SOCKET, libc::SO_ERROR, 4);
    p.send(5, libc::MSG_NOSIGNAL);
    told(p, SOCKET, libc::SO_ERROR, 4);
    p.polled(libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP);
}

pub fn group() -> Group {
    let mut group = Group::new("options");
    for (name, level, option, room) in TOLD {
        group.case("7.34", &format!("get {name}/connected"), move |p| {
            told(p, level, option, room);
            p.receives(3);
            told(p, level, option, room);
        });
    }
    for (name, level, option, value) in SET {
        group.case("7.34", &format!("set {name}/then data"), move |p| {
            let got = sys::set_option(p.near, level, option, value);
            p.call("setsockopt", got);
            told(p, level, option, 4);
            p.send(10, 0);
            p.far_says("take", &[10]);
            p.receives(10);
            p.recv(20, 0);
        });
    }
    for (name, reset, first) in [
        ("reset, asked first", true, true),
        ("reset, received first", true, false),
        ("half-close", false, true),
    ] {
        group.case("7.33", &format!("get SO_ERROR/{name}"), move |p| error_after(p, reset, first));
    }
    group.case("7.35", "SO_RCVLOWAT/poll", |p| {
        let got = sys::set_option(p.near, SOCKET, libc::SO_RCVLOWAT, 10);
        p.call("setsockopt", got);
        p.receives(5);
        p.polled(libc::POLLIN);
        p.receives(5);
        p.polled(libc::POLLIN);
        p.recv(3, 0);
        p.polled(libc::POLLIN);
        p.far_says("shutdown", &[1]);
        p.until_end();
        p.polled(libc::POLLIN);
    });
    group.case("7.35", "SO_RCVLOWAT/recv waits for it", |p| {
        sys::set_option(p.near, SOCKET, libc::SO_RCVLOWAT, 10);
        p.receives(5);
        // Fewer than ten more, and Linux never wakes: it counts only what was not copied yet.
        p.far("later send", &[10, 0]);
        p.recv(20, 0);
    });
    group.case("7.35", "SO_RCVLOWAT/recv without waiting", |p| {
        sys::set_option(p.near, SOCKET, libc::SO_RCVLOWAT, 10);
        p.receives(5);
        p.recv(20, libc::MSG_DONTWAIT);
    });
    group.case("7.35", "SO_RCVLOWAT/epoll", |p| {
        sys::set_option(p.near, SOCKET, libc::SO_RCVLOWAT, 10);
        let set = super::epoll::Set::of(p.near, libc::EPOLLIN as u32);
        p.receives(5);
        p.note(set.wait(8, 0));
        p.receives(5);
        p.note(set.wait(8, 0));
    });
    group.case("7.35", "SO_SNDTIMEO/part of much", |p| {
        sys::set_timeout(p.near, libc::SO_SNDTIMEO, 40);
        let data = vec![3; 32 << 20];
        let got = sys::send(p.near, &data, 0);
        p.note(format_args!("a part {}", got.0 > 0 && got.0 < data.len() as isize));
    });
    group.case("7.35", "SO_RCVTIMEO/read back and zero", |p| {
        for ms in [1500, 0] {
            let got = sys::set_timeout(p.near, libc::SO_RCVTIMEO, ms);
            p.call("set", got);
            told(p, SOCKET, libc::SO_RCVTIMEO, 16);
        }
        p.far("later send", &[4, 0]);
        p.recv(4, 0);
    });
    group.case("7.34", "TCP_CORK/holds nothing back for ever", |p| {
        sys::set_option(p.near, TCP, libc::TCP_CORK, 1);
        p.send(10, 0);
        sys::set_option(p.near, TCP, libc::TCP_CORK, 0);
        p.far_says("take", &[10]);
    });
    for (name, option) in [("SO_RCVBUF", libc::SO_RCVBUF), ("SO_SNDBUF", libc::SO_SNDBUF)] {
        group.case("7.35", &format!("{name}/set and told"), move |p| {
            let got = sys::set_option(p.near, SOCKET, option, 50_000);
            p.call("set", got);
            told(p, SOCKET, option, 4);
            p.send(100, 0);
            p.far_says("take", &[100]);
        });
    }
    group
}
