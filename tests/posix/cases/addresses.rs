//! Connecting and accepting: names, families, modes.

use super::{Group, Setup};

#[path = "inside.rs"]
mod inside;
#[path = "meeting.rs"]
mod meeting;

use crate::pair::Pair;
use crate::sys::{self, Ret};
use libc::c_int;

/// A name without the number of a port that the kernel chose.
fn host(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(host, _)| host)
}

/// The number of a name's port.
fn port(name: &str) -> &str {
    name.rsplit_once(':').map_or("", |(_, port)| port)
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

/// The far end connects, to the port of a listener at one address by way of another.
fn accepted(p: &mut Pair, at: &str, by: &str, flags: c_int) {
    let listener = sys::listener(&format!("{at}:0"), 8);
    let address = format!("{by}:{}", port(&sys::name(listener, false)));
    let peer = p.far.ask(&format!("connect {address}"));
    let got = sys::accept(listener, flags);
    p.note(got.0 >= 0);
    match p.adopt(got.0 as c_int, peer) {
        Ok(()) => {
            let got = sys::fcntl(p.near, libc::F_GETFL, 0);
            p.call("F_GETFL", Ret(got.0 & libc::O_NONBLOCK as isize, got.1));
            // As the kernel writes it, IPv4 perhaps as IPv6.
            let [peer, local] = [true, false].map(|peer| sys::name(p.near, peer));
            let line = format!("{} {}", host(&peer), is_near(p, &local));
            p.note(line);
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
        p.call("listen", sys::listen(p.near, 5));
        p.call("accept", sys::accept(p.near, 0));
        let at = format!("{}:0", p.place.near[0]);
        p.call("bind", sys::bind(p.near, &at));
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
                let at = p.place.near[0].clone();
                accepted(p, &at, &at, flags);
            })
            .setup = Setup::Apart;
    }
    group
        .case("7.45", "accept/IPv6", |p| {
            let at = p.place.near[1].clone();
            accepted(p, &at, &at, 0);
        })
        .setup = Setup::Apart;
    group
        .case("7.45", "accept/IPv4-mapped", |p| {
            let at = format!("[::ffff:{}]", p.place.near[0]);
            accepted(p, &at, &at, 0);
        })
        .setup = Setup::Apart;
    for (name, way) in [("IPv4", 0), ("IPv6", 1)] {
        group
            .case("issue 5", &format!("accept/dual stack, {name} comes"), move |p| {
                let by = p.place.near[way].clone();
                accepted(p, "[::]", &by, 0);
            })
            .setup = Setup::Apart;
    }
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
    inside::add(&mut group);
    meeting::add(&mut group);
    group
}
