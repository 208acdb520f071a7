//! Every call that moves bytes, in every state of the connection that it may find.

use super::Group;
use crate::pair::Pair;
use crate::sys::{self, Ret, ret};
use libc::{c_int, iovec, msghdr};

/// A call that receives into a buffer.
pub type Receive = fn(c_int, &mut [u8]) -> Ret;
/// A call that sends a buffer.
pub type Transmit = fn(c_int, &[u8]) -> Ret;

/// Two buffers over the halves of one.
fn halves(data: &[u8]) -> [iovec; 2] {
    let (a, b) = data.split_at(data.len() / 2);
    [a, b].map(|half| iovec { iov_base: half.as_ptr().cast_mut().cast(), iov_len: half.len() })
}

/// A message of these buffers.
pub fn message(list: &mut [iovec]) -> msghdr {
    // SAFETY: zero is a valid message without anything.
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_mut_ptr();
    message.msg_iovlen = list.len();
    message
}

fn recvfrom(fd: c_int, room: &mut [u8]) -> Ret {
    let mut from = [0u8; 64];
    let mut len = 64;
    // SAFETY: all of it outlives the call.
    let got = ret(unsafe {
        libc::recvfrom(fd, room.as_mut_ptr().cast(), room.len(), 0, from.as_mut_ptr().cast(), &raw mut len)
    });
    // TCP stores no name; that it says so is part of the answer.
    if got.0 >= 0 && len != 0 { Ret(-2, 0) } else { got }
}

fn recvmmsg(fd: c_int, room: &mut [u8]) -> Ret {
    let mut list = halves(room);
    // SAFETY: zero is valid; all of it outlives the call.
    unsafe {
        let mut one: libc::mmsghdr = std::mem::zeroed();
        one.msg_hdr = message(&mut list);
        let got = ret(libc::recvmmsg(fd, &raw mut one, 1, 0, std::ptr::null_mut()));
        if got.0 == 1 { Ret(one.msg_len as isize, 0) } else { got }
    }
}

fn sendmmsg(fd: c_int, data: &[u8]) -> Ret {
    let mut list = halves(data);
    // SAFETY: zero is valid; all of it outlives the call.
    unsafe {
        let mut one: libc::mmsghdr = std::mem::zeroed();
        one.msg_hdr = message(&mut list);
        let got = ret(libc::sendmmsg(fd, &raw mut one, 1, 0));
        if got.0 == 1 { Ret(one.msg_len as isize, 0) } else { got }
    }
}

fn sendfile(fd: c_int, data: &[u8]) -> Ret {
    let file = sys::file(data);
    // SAFETY: numbers, and a null offset.
    let got = ret(unsafe { libc::sendfile(fd, file, std::ptr::null_mut(), data.len()) });
    let errno = got.1;
    sys::close(file);
    Ret(got.0, errno)
}

// SAFETY, for both tables: the buffers outlive the calls.
/// Calls that receive, with the rows they belong to.
pub const RECEIVE: [(&str, &str, Receive); 14] = [
    ("7.1", "read", |fd, b| ret(unsafe { libc::read(fd, b.as_mut_ptr().cast(), b.len()) })),
    ("7.1", "readv", |fd, b| ret(unsafe { libc::readv(fd, halves(b).as_ptr(), 2) })),
    ("7.1", "recv", |fd, b| sys::recv(fd, b, 0)),
    ("7.1", "recvfrom", recvfrom),
    ("7.43", "recvmsg", |fd, b| {
        let mut list = halves(b);
        let mut message = message(&mut list);
        ret(unsafe { libc::recvmsg(fd, &raw mut message, 0) })
    }),
    ("7.43", "recvmmsg", recvmmsg),
    ("7.43", "preadv2", |fd, b| ret(unsafe { libc::preadv2(fd, halves(b).as_ptr(), 2, -1, 0) })),
    ("7.2", "__read_chk", |fd, b| {
        ret(unsafe { sys::__read_chk(fd, b.as_mut_ptr().cast(), b.len(), b.len()) })
    }),
    ("7.2", "__recv_chk", |fd, b| {
        ret(unsafe { sys::__recv_chk(fd, b.as_mut_ptr().cast(), b.len(), b.len(), 0) })
    }),
    ("7.2", "__recvfrom_chk", |fd, b| {
        let none = std::ptr::null_mut();
        ret(unsafe { sys::__recvfrom_chk(fd, b.as_mut_ptr().cast(), b.len(), b.len(), 0, none, none.cast()) })
    }),
    ("7.4", "syscall-read", |fd, b| {
        ret(unsafe { libc::syscall(libc::SYS_read, fd, b.as_mut_ptr(), b.len()) })
    }),
    ("7.4", "syscall-readv", |fd, b| {
        ret(unsafe { libc::syscall(libc::SYS_readv, fd, halves(b).as_ptr(), 2) })
    }),
    ("7.4", "syscall-recvfrom", |fd, b| {
        ret(unsafe { libc::syscall(libc::SYS_recvfrom, fd, b.as_mut_ptr(), b.len(), 0usize, 0usize, 0usize) })
    }),
    ("7.4", "syscall-recvmsg", |fd, b| {
        let mut list = halves(b);
        let mut message = message(&mut list);
        ret(unsafe { libc::syscall(libc::SYS_recvmsg, fd, &raw mut message, 0) })
    }),
];

/// Calls that send.
pub const TRANSMIT: [(&str, &str, Transmit); 12] = [
    ("7.1", "write", |fd, b| ret(unsafe { libc::write(fd, b.as_ptr().cast(), b.len()) })),
    ("7.1", "writev", |fd, b| ret(unsafe { libc::writev(fd, halves(b).as_ptr(), 2) })),
    ("7.1", "send", |fd, b| sys::send(fd, b, 0)),
    ("7.1", "sendto", |fd, b| {
        ret(unsafe { libc::sendto(fd, b.as_ptr().cast(), b.len(), 0, std::ptr::null(), 0) })
    }),
    ("7.43", "sendmsg", |fd, b| {
        let mut list = halves(b);
        ret(unsafe { libc::sendmsg(fd, std::ptr::from_ref(&message(&mut list)), 0) })
    }),
    ("7.43", "sendmmsg", sendmmsg),
    ("7.43", "pwritev2", |fd, b| ret(unsafe { libc::pwritev2(fd, halves(b).as_ptr(), 2, -1, 0) })),
    ("7.37", "sendfile", sendfile),
    ("7.4", "syscall-write", |fd, b| ret(unsafe { libc::syscall(libc::SYS_write, fd, b.as_ptr(), b.len()) })),
    ("7.4", "syscall-writev", |fd, b| {
        ret(unsafe { libc::syscall(libc::SYS_writev, fd, halves(b).as_ptr(), 2) })
    }),
    ("7.4", "syscall-sendto", |fd, b| {
        ret(unsafe { libc::syscall(libc::SYS_sendto, fd, b.as_ptr(), b.len(), 0usize, 0usize, 0usize) })
    }),
    ("7.4", "syscall-sendmsg", |fd, b| {
        let mut list = halves(b);
        ret(unsafe { libc::syscall(libc::SYS_sendmsg, fd, std::ptr::from_ref(&message(&mut list)), 0) })
    }),
];

fn once(p: &mut Pair, name: &str, call: Receive, n: usize) -> Ret {
    let mut room = vec![0; n];
    let got = call(p.near, &mut room);
    p.got(format_args!("{name} {n}"), got, &room)
}

/// What a receiving call finds.
const FINDS: [(&str, fn(&mut Pair, &str, Receive)); 8] = [
    ("data", |p, name, call| {
        p.receives(40);
        once(p, name, call, 16);
        once(p, name, call, 0);
        once(p, name, call, 100);
    }),
    ("nothing", |p, name, call| {
        sys::set_nonblocking(p.near, true);
        once(p, name, call, 16);
        once(p, name, call, 0);
    }),
    ("later", |p, name, call| {
        p.far("later send", &[10, 0]);
        once(p, name, call, 16);
    }),
    ("time-out", |p, name, call| {
        sys::set_timeout(p.near, libc::SO_RCVTIMEO, 20);
        once(p, name, call, 16);
        p.receives(5);
        once(p, name, call, 16);
    }),
    ("end", |p, name, call| {
        p.receives(20);
        p.far_says("shutdown", &[libc::SHUT_WR.into()]);
        p.until_end();
        once(p, name, call, 16);
        once(p, name, call, 16);
        once(p, name, call, 16);
        once(p, name, call, 16);
        p.send(10, 0);
        p.far_says("take", &[10]);
    }),
    ("shut", |p, name, call| {
        p.receives(20);
        let got = sys::shutdown(p.near, libc::SHUT_RD);
        p.call("shutdown", got);
        once(p, name, call, 16);
        once(p, name, call, 16);
        once(p, name, call, 16);
        p.send(10, 0);
        p.far_says("take", &[10]);
    }),
    ("reset", |p, name, call| {
        p.far_says("reset", &[]);
        p.until_reset();
        once(p, name, call, 16);
        once(p, name, call, 16);
        once(p, name, call, 16);
    }),
    ("much", |p, name, call| {
        let sent = p.far("later send", &[400_000, 0]);
        p.note(sent);
        let mut data = Vec::new();
        let mut room = vec![0; 50_000];
        while data.len() < 400_000 {
            let got = call(p.near, &mut room);
            if got.0 <= 0 {
                p.call(name, got);
                break;
            }
            data.extend_from_slice(&room[..got.0 as usize]);
        }
        p.note(sys::show(&data));
    }),
];

fn give(p: &mut Pair, name: &str, call: Transmit, n: usize) -> Ret {
    let data = p.next(n);
    let got = call(p.near, &data);
    p.taken(got);
    p.call(format_args!("{name} {n}"), got)
}

/// Sends until it is refused: now and then a full kernel socket finds a little room.
fn refused(p: &mut Pair, name: &str, call: Transmit) {
    let answers = (0..10_000).map(|_| call(p.near, &[1; 100]));
    let last = answers.into_iter().find(|got| got.0 < 0).unwrap_or(Ret(100, 0));
    p.call(name, last);
}

/// What a sending call finds.
const WAYS: [(&str, fn(&mut Pair, &str, Transmit)); 7] = [
    ("free", |p, name, call| {
        give(p, name, call, 30);
        give(p, name, call, 1);
        give(p, name, call, 5000);
        p.far_says("take", &[5031]);
    }),
    ("nothing", |p, name, call| {
        give(p, name, call, 0);
        give(p, name, call, 7);
        p.far_says("take", &[7]);
    }),
    ("full", |p, name, call| {
        p.fill();
        sys::set_nonblocking(p.near, true);
        refused(p, name, call);
    }),
    ("time-out", |p, name, call| {
        p.fill();
        sys::set_timeout(p.near, libc::SO_SNDTIMEO, 20);
        refused(p, name, call);
    }),
    ("shut", |p, name, call| {
        give(p, name, call, 10);
        let got = sys::shutdown(p.near, libc::SHUT_WR);
        p.call("shutdown", got);
        give(p, name, call, 10);
        super::signals::caught(p);
        p.far_says("take", &[100]);
        p.receives(10);
        p.recv(20, 0);
    }),
    ("reset", |p, name, call| {
        p.far_says("reset", &[]);
        p.until_reset();
        give(p, name, call, 10);
        super::signals::caught(p);
        give(p, name, call, 10);
        super::signals::caught(p);
    }),
    ("much", |p, name, call| {
        let n = 3_000_000;
        p.far("later take", &[n]);
        let data = p.next(n as usize);
        let mut done = 0;
        while done < data.len() {
            let got = call(p.near, &data[done..]);
            if got.0 <= 0 {
                p.call(name, got);
                break;
            }
            done += got.0 as usize;
        }
        p.far_says("told", &[]);
    }),
];

/// The states in which another name of a function is tried: enough to tell that it leads to the same place.
const TWINS: [&str; 5] = ["data", "nothing", "later", "free", "shut"];

pub fn group() -> Group {
    let mut group = Group::new("transfer");
    for (row, name, call) in RECEIVE {
        let twin = name.starts_with("syscall-") || name.starts_with("__");
        for (state, find) in FINDS.into_iter().filter(|(state, _)| !twin || TWINS.contains(state)) {
            group.case(row, &format!("{name}/{state}"), move |p| find(p, name, call));
        }
    }
    for (row, name, call) in TRANSMIT {
        let twin = name.starts_with("syscall-");
        for (state, way) in WAYS.into_iter().filter(|(state, _)| !twin || TWINS.contains(state)) {
            group.case(row, &format!("{name}/{state}"), move |p| {
                super::signals::catch();
                way(p, name, call);
            });
        }
    }
    group
}
