//! Flags of `send` and `recv`, alone and together.

use super::Group;
use super::transfer::message;
use crate::pair::Pair;
use crate::sys::{self, ret};
use libc::c_int;

/// Flags of a receiving call.
const RECV: [(&str, &str, c_int); 12] = [
    ("7.30", "PEEK", libc::MSG_PEEK),
    ("7.30", "WAITALL", libc::MSG_WAITALL),
    ("7.30", "TRUNC", libc::MSG_TRUNC),
    ("7.30", "PEEK|TRUNC", libc::MSG_PEEK | libc::MSG_TRUNC),
    ("7.30", "PEEK|WAITALL", libc::MSG_PEEK | libc::MSG_WAITALL),
    ("7.30", "TRUNC|WAITALL", libc::MSG_TRUNC | libc::MSG_WAITALL),
    ("7.30", "ERRQUEUE", libc::MSG_ERRQUEUE),
    ("7.30", "ERRQUEUE|DONTWAIT", libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT),
    ("7.31", "OOB", libc::MSG_OOB),
    ("7.30", "CMSG_CLOEXEC", libc::MSG_CMSG_CLOEXEC),
    ("7.30", "NOSIGNAL", libc::MSG_NOSIGNAL),
    ("7.30", "CONFIRM|EOR", libc::MSG_CONFIRM | libc::MSG_EOR),
];

/// What such a call finds: bytes there, whether the stream has ended behind them, and the room given.
const FINDS: [(&str, usize, bool, usize); 5] = [
    ("less than asked, then the end", 5, true, 12),
    ("more than asked", 20, false, 12),
    ("as much as asked", 12, false, 12),
    ("the end", 0, true, 12),
    ("data, no room", 12, false, 0),
];

/// Flags of a sending call.
const SEND: [(&str, c_int); 7] = [
    ("MORE", libc::MSG_MORE),
    ("DONTWAIT", libc::MSG_DONTWAIT),
    ("EOR", libc::MSG_EOR),
    ("CONFIRM", libc::MSG_CONFIRM),
    ("DONTROUTE", libc::MSG_DONTROUTE),
    ("ZEROCOPY without SO_ZEROCOPY", libc::MSG_ZEROCOPY),
    ("NOSIGNAL", libc::MSG_NOSIGNAL),
];

fn flagged(p: &mut Pair, flags: c_int, there: usize, ended: bool, room: usize) {
    if there > 0 {
        p.receives(there);
    }
    if ended {
        p.far_says("shutdown", &[1]);
        p.until_end();
    }
    p.recv(room, flags);
    p.recv(room, flags | libc::MSG_DONTWAIT);
    p.recv(64, libc::MSG_DONTWAIT);
}

pub fn group() -> Group {
    let mut group = Group::new("flags");
    for (row, name, flags) in RECV {
        for (state, there, ended, room) in FINDS {
            group.case(row, &format!("recv {name}/{state}"), move |p| flagged(p, flags, there, ended, room));
        }
    }
    for (name, flags) in SEND {
        group.case("7.30", &format!("send {name}/twice"), move |p| {
            p.send(20, flags);
            p.send(30, flags);
            p.send(1, 0);
            p.far_says("take", &[51]);
        });
    }
    group.case("7.30", "recv WAITALL/the rest comes later", |p| {
        p.receives(4);
        p.far("later send", &[8, 0]);
        p.recv(12, libc::MSG_WAITALL);
    });
    group.case("7.30", "recv WAITALL/reset after a part", |p| {
        p.receives(4);
        p.far("later reset", &[]);
        p.recv(12, libc::MSG_WAITALL);
        p.recv(12, libc::MSG_WAITALL);
    });
    group.case("7.35", "recv WAITALL/time-out after a part", |p| {
        sys::set_timeout(p.near, libc::SO_RCVTIMEO, 30);
        p.receives(4);
        p.recv(12, libc::MSG_WAITALL);
        p.recv(12, libc::MSG_WAITALL);
    });
    group.case("7.30", "recv WAITALL/much", |p| {
        p.far("later send", &[900_000, 0]);
        p.recv(900_000, libc::MSG_WAITALL);
    });
    group.case("7.30", "recv WAITALL/non-blocking with a part", |p| {
        sys::set_nonblocking(p.near, true);
        p.receives(4);
        p.recv(12, libc::MSG_WAITALL);
    });
    group.case("7.30", "recv PEEK/waits", |p| {
        p.far("later send", &[8, 0]);
        p.recv(12, libc::MSG_PEEK);
        p.recv(12, 0);
    });
    group.case("7.30", "recv PEEK/grows", |p| {
        p.receives(4);
        p.recv(12, libc::MSG_PEEK);
        p.receives(4);
        p.recv(12, libc::MSG_PEEK);
        p.recv(3, 0);
        p.recv(12, libc::MSG_PEEK);
        p.recv(12, 0);
    });
    group.case("7.43", "recvmsg/flags and lengths come back", |p| {
        p.receives(10);
        for (room, flags) in [(4, libc::MSG_PEEK), (4, 0), (4, libc::MSG_TRUNC), (64, 0)] {
            let mut data = vec![0u8; room];
            let (mut name, mut control) = ([0u8; 32], [0u8; 64]);
            let mut list = [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: room }];
            let mut msg = message(&mut list);
            (msg.msg_name, msg.msg_namelen) = (name.as_mut_ptr().cast(), 32);
            (msg.msg_control, msg.msg_controllen) = (control.as_mut_ptr().cast(), 64);
            msg.msg_flags = 0x7f;
            // SAFETY: all of it outlives the call.
            let got = ret(unsafe { libc::recvmsg(p.near, &raw mut msg, flags) });
            let said = (msg.msg_flags, msg.msg_namelen, msg.msg_controllen);
            p.got(format_args!("recvmsg {flags:#x} {said:?}"), got, &data);
        }
    });
    group.case("7.43", "recvmsg/refused leaves the message alone", |p| {
        sys::set_nonblocking(p.near, true);
        let mut data = [0u8; 8];
        let mut list = [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: 8 }];
        let mut msg = message(&mut list);
        (msg.msg_flags, msg.msg_controllen) = (0x55, 0);
        // SAFETY: all of it outlives the call.
        let got = ret(unsafe { libc::recvmsg(p.near, &raw mut msg, 0) });
        p.call(format_args!("recvmsg {:#x}", msg.msg_flags), got);
    });
    group.case("7.43", "sendmsg/too many buffers", |p| {
        let data = [0u8; 1];
        let mut list = vec![libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: 1 }; 1025];
        // SAFETY: all of it outlives the calls.
        unsafe {
            let msg = message(&mut list);
            let got = [
                ret(libc::sendmsg(p.near, &raw const msg, 0)),
                ret(libc::writev(p.near, list.as_ptr(), 1025)),
                ret(libc::readv(p.near, list.as_ptr(), 1025)),
                ret(libc::writev(p.near, list.as_ptr(), -1)),
                ret(libc::writev(p.near, list.as_ptr(), 1024)),
            ];
            for got in got {
                p.call("1025", got);
            }
        }
        p.far_says("take", &[1024]);
    });
    group.case("7.43", "sendmsg/control data", |p| {
        let data = p.next(5);
        let mut list = [libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: 5 }];
        let mut msg = message(&mut list);
        let control = [0xffu8; 64];
        (msg.msg_control, msg.msg_controllen) = (control.as_ptr().cast_mut().cast(), 64);
        // SAFETY: all of it outlives the call.
        let got = ret(unsafe { libc::sendmsg(p.near, &raw const msg, 0) });
        p.call("sendmsg", got);
    });
    group.case("7.43", "recvmmsg/several messages", |p| {
        p.receives(10);
        let mut room = [[0u8; 4]; 4];
        let mut parts: Vec<_> =
            room.iter_mut().map(|r| [libc::iovec { iov_base: r.as_mut_ptr().cast(), iov_len: 4 }]).collect();
        let mut list: Vec<libc::mmsghdr> =
            parts.iter_mut().map(|part| libc::mmsghdr { msg_hdr: message(part), msg_len: 77 }).collect();
        // SAFETY: all of it outlives the call.
        let got = ret(unsafe {
            libc::recvmmsg(p.near, list.as_mut_ptr(), 4, libc::MSG_DONTWAIT, std::ptr::null_mut())
        });
        let lengths: Vec<_> = list.iter().map(|m| m.msg_len).collect();
        p.call(format_args!("recvmmsg {lengths:?} {}", sys::show(&room.concat())), got);
    });
    group.case("7.43", "sendmmsg/several messages", |p| {
        let data = p.next(9);
        let mut parts: Vec<_> = data
            .chunks(3)
            .map(|r| [libc::iovec { iov_base: r.as_ptr().cast_mut().cast(), iov_len: 3 }])
            .collect();
        let mut list: Vec<libc::mmsghdr> =
            parts.iter_mut().map(|part| libc::mmsghdr { msg_hdr: message(part), msg_len: 77 }).collect();
        // SAFETY: all of it outlives the call.
        let got = ret(unsafe { libc::sendmmsg(p.near, list.as_mut_ptr(), 3, 0) });
        let lengths: Vec<_> = list.iter().map(|m| m.msg_len).collect();
        p.call(format_args!("sendmmsg {lengths:?}"), got);
        p.far_says("take", &[9]);
    });
    group.case("7.30", "sendto/an address on a connected socket", |p| {
        let (to, len) = sys::address(&p.place.far[0].clone());
        let data = p.next(6);
        // SAFETY: all of it outlives the call.
        let got = ret(unsafe {
            libc::sendto(p.near, data.as_ptr().cast(), 6, 0, std::ptr::from_ref(&to).cast(), len)
        });
        p.call("sendto", got);
        p.far_says("take", &[6]);
    });
    group.case("7.30", "pointers/null", |p| {
        p.receives(4);
        // SAFETY: none: the kernel says EFAULT.
        let got = unsafe {
            [
                ret(libc::send(p.near, std::ptr::null(), 10, 0)),
                ret(libc::write(p.near, std::ptr::null(), 10)),
                ret(libc::read(p.near, std::ptr::null_mut(), 10)),
            ]
        };
        for got in got {
            p.call("null", got);
        }
        p.recv(10, 0);
    });
    group
        .case("7.30", "pointers/that lead nowhere", |p| {
            let bad = 8usize as *mut libc::c_void;
            p.receives(4);
            // SAFETY: none: the kernel says EFAULT.
            let got = unsafe {
                [
                    ret(libc::send(p.near, bad, 10, 0)),
                    ret(libc::recv(p.near, bad, 10, 0)),
                    ret(libc::recv(p.near, bad, 10, libc::MSG_DONTWAIT)),
                ]
            };
            for got in got {
                p.call("bad pointer", got);
            }
        })
        .open = Some("a buffer that cannot be reached ends the program, as it would in its own code");
    group
        .case("7.31", "send OOB/one byte", |p| {
            p.send(5, 0);
            p.send(1, libc::MSG_OOB);
            p.far_says("take", &[5]);
            p.far_says("recv", &[1, libc::MSG_OOB.into()]);
        })
        .carried = super::Carried::Beside("only TCP has urgent bytes");
    group
        .case("7.31", "recv OOB/one byte", |p| {
            p.far_says("send", &[5, 0]);
            p.far_says("send", &[1, libc::MSG_OOB.into()]);
            p.until(libc::POLLPRI);
            let mut mark = 0;
            let got = sys::ioctl(p.near, 0x8905, &mut mark);
            p.call(format_args!("SIOCATMARK {mark}"), got);
            p.recv(1, libc::MSG_OOB);
            p.recv(20, 0);
        })
        .carried = super::Carried::Beside("only TCP has urgent bytes");
    group
}
