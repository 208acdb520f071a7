//! Connecting and accepting: names, families, modes, loopback, one process talking to itself.

use super::{Group, Setup};
use crate::pair::Pair;
use crate::sys::{self, Ret, ret};
use libc::c_int;

/// A name without the number of a port that the kernel chose.
fn host(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(host, _)| host)
}

/// Whether a name is this guest's address; IPv4 may be written as IPv6.
fn is_near(p: &Pair, name: &str) -> bool {
    p.place.near.iter().any(|near| host(name).ends_with(near) || host(name) == format!("[::ffff:{near}]"))
}

fn names(p: &mut Pair) {
    let [local, peer] = [sys::name(p.near, false), sys::name(p.near, true)];
    let far = p.place.far.iter().find(|far| host(&peer).contains(host(far).trim_matches(['[', ']'])));
    let whole = far.is_some_and(|far| peer.ends_with(far.rsplit_once(':').map_or("", |(_, port)| port)));
    p.note(format_args!("{} {whole}", is_near(p, &local)));
}

fn talk(p: &mut Pair) {
    p.send(20, 0);
    p.far_says("take", &[20]);
    p.receives(30);
    p.recv(40, 0);
}

/// Both ends in this process.
fn itself(p: &mut Pair, at: &str, to: &str) {
    let listener = sys::listener(at, 8);
    let bound = sys::name(listener, false);
    let port = bound.rsplit_once(':').map_or("", |(_, port)| port);
    let to = format!("{to}:{port}");
    let near = sys::socket(&to, 0);
    p.call("connect", sys::connect(near, &to));
    let far = sys::accept(listener, 0).0 as c_int;
    let mut room = [0; 64];
    for i in 0..40u8 {
        let sent = sys::send(near, &[i; 30], 0);
        let got = sys::recv(far, &mut room, 0);
        let back = sys::send(far, &[i; 3], 0);
        let here = sys::recv(near, &mut room, 0);
        if [sent.0, got.0, back.0, here.0] != [30, 30, 3, 3] {
            p.note(format_args!("{i}: {sent} {got} {back} {here}"));
        }
    }
    let [a, b] = [near, far].map(|fd| sys::name(fd, true));
    let same = |name: &str| if is_near(p, name) { "this guest".to_owned() } else { host(name).to_owned() };
    let line = format!("{} {}", same(&a), same(&b));
    p.note(line);
    sys::send(near, b"last", 0);
    sys::close(near);
    let got = sys::recv(far, &mut room, 0);
    p.got("recv", got, &room);
    let got = sys::recv(far, &mut room, 0);
    p.got("recv", got, &room);
    sys::close(far);
    sys::close(listener);
}

fn accepted(p: &mut Pair, at: &str, flags: c_int) {
    let listener = sys::listener(at, 8);
    let address = sys::name(listener, false);
    let peer = p.far.ask(&format!("connect {address}"));
    let got = sys::accept(listener, flags);
    p.note(got.0 >= 0);
    match p.adopt(got.0 as c_int, peer) {
        Ok(()) => {
            let got = sys::fcntl(p.near, libc::F_GETFL, 0);
            p.call("F_GETFL", Ret(got.0 & libc::O_NONBLOCK as isize, got.1));
            let peer = sys::name(p.near, true);
            p.note(p.place.far.iter().any(|far| host(far) == host(&peer)));
            talk(p);
        }
        Err(why) => p.note(why),
    }
    sys::close(listener);
}

pub fn group() -> Group {
    let mut group = Group::new("addresses");
    group.case("7.45", "names/connected", |p| {
        names(p);
        talk(p);
        names(p);
    });
    group.case("7.45", "names/after the end", |p| {
        p.far_says("reset", &[]);
        p.until_reset();
        let local = sys::name(p.near, false);
        p.note(is_near(p, &local));
        p.note(sys::name(p.near, true));
    });
    group.case("7.27", "connect/again", |p| {
        let to = p.place.far[0].clone();
        p.call("connect", sys::connect(p.near, &to));
        talk(p);
    });
    group.case("7.28", "listen, accept, bind/on a connected socket", |p| {
        // SAFETY: numbers.
        p.call("listen", ret(unsafe { libc::listen(p.near, 5) }));
        p.call("accept", sys::accept(p.near, 0));
        let (at, len) = sys::address(&format!("{}:0", p.place.near[0]));
        // SAFETY: the address outlives the call.
        let got = ret(unsafe { libc::bind(p.near, std::ptr::from_ref(&at).cast(), len) });
        p.call("bind", got);
    });
    group
        .case("7.45", "IPv6/connected", |p| {
            let to = p.place.far[1].clone();
            let near = sys::socket(&to, 0);
            p.call("connect", sys::connect(near, &to));
            let peer = p.far.ask("accept 1");
            match p.adopt(near, peer) {
                Ok(()) => {
                    names(p);
                    talk(p);
                }
                Err(why) => p.note(why),
            }
        })
        .setup = Setup::Apart;
    group
        .case("7.45", "IPv4-mapped/connected", |p| {
            let to = format!("[::ffff:{}", p.place.far[0].replace(':', "]:"));
            let near = sys::socket("[", 0);
            p.call("connect", sys::connect(near, &to));
            let peer = p.far.ask("accept 0");
            match p.adopt(near, peer) {
                Ok(()) => {
                    names(p);
                    talk(p);
                }
                Err(why) => p.note(why),
            }
        })
        .setup = Setup::Apart;
    for (name, flags) in [("blocking", 0), ("SOCK_NONBLOCK", libc::SOCK_NONBLOCK)] {
        group
            .case("7.28", &format!("accept/{name}"), move |p| {
                let at = format!("{}:0", p.place.near[0]);
                accepted(p, &at, flags);
            })
            .setup = Setup::Apart;
    }
    group
        .case("7.45", "accept/IPv6", |p| {
            let at = format!("{}:0", p.place.near[1]);
            accepted(p, &at, 0);
        })
        .setup = Setup::Apart;
    group
        .case("7.27", "connect/non-blocking", |p| {
            let to = p.place.far[0].clone();
            let near = sys::socket(&to, libc::SOCK_NONBLOCK);
            let got = sys::connect(near, &to);
            p.call("connect", got);
            let (_, revents) = sys::poll(near, libc::POLLOUT, 4000);
            let (_, error) = sys::option(near, libc::SOL_SOCKET, libc::SO_ERROR, 4);
            p.note(format_args!("{revents:#x} {error:?}"));
            let peer = p.far.ask("accept 0");
            sys::set_nonblocking(near, false);
            match p.adopt(near, peer) {
                Ok(()) => talk(p),
                Err(why) => p.note(why),
            }
        })
        .setup = Setup::Apart;
    group
        .case("7.27", "connect/refused", |p| {
            let to = format!("{}:1", host(&p.place.far[0]));
            let near = sys::socket(&to, 0);
            p.call("connect", sys::connect(near, &to));
            p.call("send", sys::send(near, b"x", libc::MSG_NOSIGNAL));
            p.call("recv", sys::recv(near, &mut [0; 4], 0));
            p.call("poll", sys::poll(near, libc::POLLIN, 0).0);
            sys::close(near);
        })
        .setup = Setup::Apart;
    group
        .case("7.27", "not connected/every call says so", |p| {
            let near = sys::socket("127.0.0.1", 0);
            for (what, got) in [
                ("recv", sys::recv(near, &mut [0; 4], 0)),
                ("send", sys::send(near, b"x", libc::MSG_NOSIGNAL)),
                ("shutdown", sys::shutdown(near, 1)),
            ] {
                p.call(what, got);
            }
            let (got, revents) = sys::poll(near, libc::POLLIN | libc::POLLOUT, 0);
            p.call(format_args!("poll {revents:#x}"), got);
            sys::close(near);
        })
        .setup = Setup::Apart;
    for (name, at, to) in [
        ("127.0.0.1", "127.0.0.1:0", "127.0.0.1"),
        ("::1", "[::1]:0", "[::1]"),
        ("dual stack", "[::]:0", "127.0.0.1"),
        ("mapped", "127.0.0.1:0", "[::ffff:127.0.0.1]"),
    ] {
        group.case("issue 5", &format!("itself/over {name}"), move |p| itself(p, at, to)).setup =
            Setup::Apart;
    }
    group
        .case("issue 5", "itself/over the guest's own address", |p| {
            let near = p.place.near[0].clone();
            itself(p, &format!("{near}:0"), &near);
        })
        .setup = Setup::Apart;
    group
        .case("issue 5", "itself/simultaneous open", |p| {
            let near = sys::socket("127.0.0.1", 0);
            let to = format!("127.0.0.1:{}", 1024 + std::process::id() % 8000);
            let (at, len) = sys::address(&to);
            sys::set_option(near, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
            // SAFETY: the address outlives the call.
            p.call("bind", ret(unsafe { libc::bind(near, std::ptr::from_ref(&at).cast(), len) }));
            p.call("connect", sys::connect(near, &to));
            let mut room = [0; 16];
            for i in 0..30u8 {
                let sent = sys::send(near, &[i; 9], 0);
                let got = sys::recv(near, &mut room, 0);
                if (sent.0, got.0, room[0]) != (9, 9, i) {
                    p.note(format_args!("{i}: {sent} {got}"));
                }
            }
            p.call("shutdown", sys::shutdown(near, 1));
            p.call("recv", sys::recv(near, &mut room, 0));
            sys::close(near);
        })
        .setup = Setup::Apart;
    group
}
