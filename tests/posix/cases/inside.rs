//! Connections inside one guest: one process talking to itself, two processes, a socket connected to itself. They stay on
//! TCP, and the agent says why.

use super::super::{Carried, Group, Setup, processes};
use super::{host, is_near, port};
use crate::pair::Pair;
use crate::sys;
use libc::c_int;

/// More than makes a connection worth its lane.
const ROUNDS: u8 = 40;

/// Where a listener is, and how it is reached: the guest's own address is written as `4` or `6`.
const WAYS: [(&str, &str, &str, &str); 6] = [
    ("127.0.0.1", "127.0.0.1", "127.0.0.1", LOOPBACK),
    ("::1", "[::1]", "[::1]", LOOPBACK),
    ("dual stack", "[::]", "127.0.0.1", LOOPBACK),
    ("mapped", "127.0.0.1", "[::ffff:127.0.0.1]", LOOPBACK),
    ("the guest's own address", "4", "4", OWN),
    ("the guest's own IPv6 address", "6", "6", OWN),
];

/// A loopback address is no vport's.
const LOOPBACK: &str = "address-not-yours";
/// No other guest has the guest's own.
const OWN: &str = "peer-unknown";

fn address(p: &Pair, text: &str) -> String {
    match text {
        "4" => p.place.near[0].clone(),
        "6" => p.place.near[1].clone(),
        other => other.to_owned(),
    }
}

/// One end sends and the other answers; true if all came.
fn round(near: c_int, far: c_int) -> bool {
    let mut room = [0; 64];
    let sent = sys::send(near, &[1; 30], 0);
    let got = sys::recv(far, &mut room, 0);
    let back = sys::send(far, &[2; 3], 0);
    let here = sys::recv(near, &mut room, 0);
    [sent.0, got.0, back.0, here.0] == [30, 30, 3, 3]
}

/// A listener, and where to connect.
fn listens(p: &Pair, at: &str, to: &str) -> (c_int, String) {
    let listener = sys::listener(&format!("{}:0", address(p, at)), 8);
    let to = format!("{}:{}", address(p, to), port(&sys::name(listener, false)));
    (listener, to)
}

/// Both ends in this process.
fn itself(p: &mut Pair, at: &str, to: &str, reason: &str) {
    let (listener, to) = listens(p, at, to);
    let near = sys::socket(&to, 0);
    p.call("connect", sys::connect(near, &to));
    let far = sys::accept(listener, 0).0 as c_int;
    p.note((0..ROUNDS).all(|_| round(near, far)));
    let [a, b] = [near, far].map(|fd| sys::name(fd, true));
    let same = |name: &str| if is_near(p, name) { "this guest".to_owned() } else { host(name).to_owned() };
    let line = format!("{} {}", same(&a), same(&b));
    p.note(line);
    p.stays([&b, &a], reason, || {
        round(near, far);
    });
    sys::send(near, b"last", 0);
    sys::close(near);
    let mut room = [0; 64];
    for _ in 0..2 {
        let got = sys::recv(far, &mut room, 0);
        p.got("recv", got, &room);
    }
    p.moves_nothing_fast();
    sys::close(far);
    sys::close(listener);
}

/// What a child does: asks until it is told otherwise. Its exit status is 0 if all went well.
fn asks(to: &str) -> c_int {
    let near = sys::socket(to, 0);
    let mut connected = sys::connect(near, to).0 == 0;
    loop {
        let sent = sys::send(near, &[1; 30], libc::MSG_NOSIGNAL);
        match (sent.0, sys::recv(near, &mut [0; 8], 0).0) {
            (30, 3) => {}
            (30, 4) => return c_int::from(!connected),
            _ => connected = false,
        }
        if !connected {
            return 2;
        }
    }
}

/// A child connects, and both talk.
fn two_processes(p: &mut Pair, at: &str, to: &str, reason: &str) {
    let (listener, to) = listens(p, at, to);
    // SAFETY: the child makes calls and ends; this program has one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: a number.
        unsafe { libc::_exit(asks(&to)) };
    }
    let far = sys::accept(listener, 0).0 as c_int;
    let answers = |with: &[u8]| {
        let got = sys::recv(far, &mut [0; 64], 0);
        [got.0, sys::send(far, with, libc::MSG_NOSIGNAL).0] == [30, with.len() as isize]
    };
    p.note((0..ROUNDS).all(|_| answers(&[2; 3])));
    let [local, peer] = [sys::name(far, false), sys::name(far, true)];
    p.stays([&local, &peer], reason, || {
        answers(&[2; 3]);
    });
    p.note(answers(b"last"));
    p.note(processes::ended(child));
    p.call("recv", sys::recv(far, &mut [0; 8], 0));
    p.moves_nothing_fast();
    sys::close(far);
    sys::close(listener);
}

/// A socket that is connected to itself: its own SYN meets it, as in a simultaneous open.
fn self_connect(p: &mut Pair, at: &str, reason: &str) {
    let at = address(p, at);
    let near = sys::socket(&at, 0);
    p.call("bind", sys::bind(near, &format!("{at}:0")));
    let to = sys::name(near, false);
    p.call("connect", sys::connect(near, &to));
    let mut room = [0; 16];
    let mut round = |i: u8| {
        let sent = sys::send(near, &[i; 9], 0);
        let got = sys::recv(near, &mut room, 0);
        (sent.0, got.0, room[0]) == (9, 9, i)
    };
    p.note((0..ROUNDS).all(&mut round));
    p.stays([&to, &to], reason, || {
        round(0);
    });
    p.call("shutdown", sys::shutdown(near, 1));
    p.call("recv", sys::recv(near, &mut room, 0));
    p.moves_nothing_fast();
    sys::close(near);
}

/// Two sockets of this process whose SYNs meet.
fn simultaneous(p: &mut Pair, at: &str, reason: &str) {
    let at = format!("{}:0", address(p, at));
    let ends = [sys::early(&at), sys::early(&at)];
    let names = ends.map(|fd| sys::name(fd, false));
    for (fd, to) in [(ends[0], &names[1]), (ends[1], &names[0])] {
        let got = sys::connect(fd, to);
        p.note(got.0 == 0 || got.1 == libc::EINPROGRESS);
    }
    for fd in ends {
        p.note(format_args!("{:#x}", sys::poll(fd, libc::POLLOUT, 4000).1));
        sys::hear_resets(fd);
    }
    p.note((0..ROUNDS).all(|_| round(ends[0], ends[1])));
    p.stays([&names[0], &names[1]], reason, || {
        round(ends[0], ends[1]);
    });
    p.moves_nothing_fast();
    for fd in ends {
        sys::close(fd);
    }
}

/// Adds these cases to the group.
pub fn add(group: &mut Group) {
    let mut case = |name: String, reason: &'static str, run: Box<dyn Fn(&mut Pair)>| {
        let case = group.case("issue 5", &name, run);
        (case.setup, case.carried) = (Setup::Apart, Carried::Tcp(reason));
    };
    for (name, at, to, reason) in WAYS {
        case(format!("itself/over {name}"), reason, Box::new(move |p| itself(p, at, to, reason)));
        let run = Box::new(move |p: &mut Pair| two_processes(p, at, to, reason));
        case(format!("two processes/over {name}"), reason, run);
    }
    for (name, at, reason) in [
        ("127.0.0.1", "127.0.0.1", LOOPBACK),
        ("::1", "[::1]", LOOPBACK),
        ("the guest's own address", "4", OWN),
    ] {
        case(format!("self-connect/at {name}"), reason, Box::new(move |p| self_connect(p, at, reason)));
        let run = Box::new(move |p: &mut Pair| simultaneous(p, at, reason));
        case(format!("simultaneous open/inside the guest, at {name}"), reason, run);
    }
}
