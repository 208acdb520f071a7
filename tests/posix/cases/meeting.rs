//! How two ends get together: ports of the kernel's choice, several listeners at one, more connections than a listener
//! takes, SYNs that meet.

use super::super::{Group, Setup};
use super::{host, is_near, port, talk};
use crate::pair::Pair;
use crate::sys;
use libc::c_int;

/// Goes on with a connection, if it comes to where the case begins.
fn goes_on(p: &mut Pair, near: c_int, peer: String) {
    match p.adopt(near, peer) {
        Ok(()) => talk(p),
        Err(why) => p.note(why),
    }
}

/// Bound before it connects: the address and port stay, or the address is chosen then.
fn bound_first(p: &mut Pair, at: &str) {
    let to = p.place.far[0].clone();
    let near = sys::socket(&to, libc::SOCK_CLOEXEC);
    p.call("bind", sys::bind(near, at));
    let before = sys::name(near, false);
    p.note(port(&before) != "0");
    p.call("connect", sys::connect(near, &to));
    let after = sys::name(near, false);
    p.note(format_args!("{} {}", is_near(p, &after), port(&before) == port(&after)));
    let peer = p.far.ask("accept 0");
    goes_on(p, near, peer);
}

/// A socket at an address, with its one option.
fn at(address: &str, level: c_int, option: c_int) -> (c_int, sys::Ret) {
    let fd = sys::socket(address, libc::SOCK_CLOEXEC);
    sys::set_option(fd, level, option, 1);
    (fd, sys::bind(fd, address))
}

/// Several listeners share a port: each connection comes to one of them, to which is the kernel's affair.
fn a_group(p: &mut Pair) {
    let (first, bound) = at(&format!("{}:0", p.place.near[0]), libc::SOL_SOCKET, libc::SO_REUSEPORT);
    p.call("bind", bound);
    let address = sys::name(first, false);
    let (second, bound) = at(&address, libc::SOL_SOCKET, libc::SO_REUSEPORT);
    p.call("bind", bound);
    let (stranger, refused) = at(&address, libc::SOL_SOCKET, libc::SO_REUSEADDR);
    p.call("bind without", refused);
    sys::close(stranger);
    let group = [first, second];
    for fd in group {
        p.call("listen", sys::listen(fd, 16));
        sys::set_nonblocking(fd, true);
    }
    let accept = |group: &[c_int]| {
        let mut got = sys::Ret(-1, libc::EAGAIN);
        sys::soon(|| {
            got = group.iter().map(|fd| sys::accept(*fd, 0)).find(|got| got.0 >= 0).unwrap_or(got);
            got.0 >= 0
        });
        got.0 as c_int
    };
    for _ in 0..8 {
        let peer = p.far.ask(&format!("connect {address}"));
        let near = accept(&group);
        let sent = p.far.ask(&format!("send {peer} 7 0"));
        let got = sys::recv(near, &mut [0; 16], 0);
        p.note(format_args!("{} {sent} {got}", near >= 0));
        p.far.ask(&format!("close {peer}"));
        sys::close(near);
    }
    // What comes then comes to the other.
    sys::close(first);
    let peer = p.far.ask(&format!("connect {address}"));
    let near = accept(&[second]);
    goes_on(p, near, peer);
    sys::close(second);
}

/// Two are taken in, and the third's SYN is dropped until there is room. It comes again after a second.
fn overflow(p: &mut Pair) {
    let listener = sys::listener(&format!("{}:0", p.place.near[0]), 1);
    let address = sys::name(listener, false);
    let taken = [(); 2].map(|()| p.far.ask(&format!("connect {address}")));
    for peer in &taken {
        let sent = p.far.ask(&format!("send {peer} 5 0"));
        p.note(format_args!("{} {sent}", peer.parse::<u32>().is_ok()));
    }
    let third = p.far.ask(&format!("begin {address}"));
    let waits = |p: &mut Pair, ms: u32| p.far.ask(&format!("wait {third} {} {ms}", libc::POLLOUT));
    let early = waits(p, 200);
    p.note(early);
    for peer in &taken {
        let near = sys::accept(listener, 0).0 as c_int;
        let mut room = [0; 8];
        let got = sys::recv(near, &mut room, 0);
        p.got("recv", got, &room);
        sys::close(near);
        p.far.ask(&format!("close {peer}"));
    }
    let late = waits(p, 4000);
    p.note(late);
    p.far.ask(&format!("blocks {third}"));
    let near = sys::accept(listener, 0).0 as c_int;
    goes_on(p, near, third);
    sys::close(listener);
}

/// This end's SYN finds nobody, and then meets the far end's.
fn simultaneous(p: &mut Pair, way: usize) {
    let near = sys::early(&format!("{}:0", p.place.near[way]));
    let bound = p.far.ask(&format!("bound {}:0", host(&p.place.far[way])));
    let (peer, to) = bound.split_once(' ').unwrap_or_default();
    let got = sys::connect(near, to);
    p.call("connect", got);
    let from = sys::name(near, false);
    let answer = p.far.ask(&format!("to {peer} {from}"));
    p.note(answer);
    p.note(format_args!("{:#x}", sys::poll(near, libc::POLLOUT, 4000).1));
    sys::hear_resets(near);
    goes_on(p, near, peer.to_owned());
}

/// A listener of IPv6 alone is not there for IPv4.
fn only_v6(p: &mut Pair) {
    let (listener, bound) = at("[::]:0", libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
    p.call("bind", bound);
    p.call("listen", sys::listen(listener, 4));
    let port = port(&sys::name(listener, false)).to_owned();
    let refused = p.far.ask(&format!("connect {}:{port}", p.place.near[0]));
    p.note(refused);
    let peer = p.far.ask(&format!("connect {}:{port}", p.place.near[1]));
    let near = sys::accept(listener, 0).0 as c_int;
    goes_on(p, near, peer);
    sys::close(listener);
}

/// Adds these cases to the group.
pub fn add(group: &mut Group) {
    let mut case = |name: &str, run: Box<dyn Fn(&mut Pair)>| {
        let row = if name.starts_with("SO_REUSEPORT") { "7.29" } else { "issue 5" };
        group.case(row, name, run).setup = Setup::Apart;
    };
    case(
        "bind/port 0, then connect",
        Box::new(|p| {
            let at = format!("{}:0", p.place.near[0]);
            bound_first(p, &at);
        }),
    );
    case("bind/any address and port, then connect", Box::new(|p| bound_first(p, "0.0.0.0:0")));
    case("SO_REUSEPORT/a group of two", Box::new(a_group));
    case("listen/more come than it takes", Box::new(overflow));
    case("IPV6_V6ONLY/IPv4 is refused", Box::new(only_v6));
    case("simultaneous open/over IPv4", Box::new(|p| simultaneous(p, 0)));
    case("simultaneous open/over IPv6", Box::new(|p| simultaneous(p, 1)));
}
