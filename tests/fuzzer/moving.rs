//! Every call that moves bytes.

use crate::sys::{self, Ret, ret};
use libc::{c_int, iovec, msghdr};

/// Sends a buffer.
type Send = fn(c_int, &[u8], c_int) -> Ret;
/// Receives into a buffer; what else it stored, as text.
type Receive = fn(c_int, &mut [u8], c_int) -> (Ret, String);

/// Two buffers over one, cut where a third of it ends.
fn parts(data: &[u8]) -> [iovec; 2] {
    let (a, b) = data.split_at(data.len() / 3);
    [a, b].map(|part| iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
}

fn message(list: &mut [iovec]) -> msghdr {
    // SAFETY: zero is a valid message without anything.
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_mut_ptr();
    message.msg_iovlen = list.len();
    message
}

fn sendmmsg(fd: c_int, data: &[u8], flags: c_int) -> Ret {
    let mut list = parts(data);
    // SAFETY: zero is valid; all of it outlives the call.
    unsafe {
        let mut one: libc::mmsghdr = std::mem::zeroed();
        one.msg_hdr = message(&mut list);
        let got = ret(libc::sendmmsg(fd, &raw mut one, 1, flags));
        if got.0 == 1 { Ret(one.msg_len as isize, 0) } else { got }
    }
}

fn sendfile(fd: c_int, data: &[u8], _: c_int) -> Ret {
    let file = sys::file(data);
    // SAFETY: numbers, and a null offset.
    let got = ret(unsafe { libc::sendfile(fd, file, std::ptr::null_mut(), data.len()) });
    sys::close(file);
    got
}

/// Through a pipe, as much as it holds at a time.
fn splice_to(fd: c_int, data: &[u8], _: c_int) -> Ret {
    let pipe = sys::pipe();
    let mut done = 0;
    let mut got = Ret(0, 0);
    let null = std::ptr::null_mut();
    for piece in data.chunks(4096) {
        // SAFETY: the piece outlives the call; then numbers and null.
        let moved = unsafe {
            libc::write(pipe[1], piece.as_ptr().cast(), piece.len());
            ret(libc::splice(pipe[0], null, fd, null, piece.len(), 0))
        };
        if moved.0 <= 0 {
            got = moved;
            break;
        }
        done += moved.0;
        if moved.0 as usize != piece.len() {
            break;
        }
    }
    pipe.iter().for_each(|fd| {
        sys::close(*fd);
    });
    if done > 0 { Ret(done, 0) } else { got }
}

// SAFETY, for both tables: the buffers outlive the calls.
/// Those that send, and whether they take flags.
pub const SEND: [(&str, bool, Send); 12] = [
    ("send", true, sys::send),
    ("send", true, sys::send),
    ("write", false, |fd, b, _| ret(unsafe { libc::write(fd, b.as_ptr().cast(), b.len()) })),
    ("writev", false, |fd, b, _| ret(unsafe { libc::writev(fd, parts(b).as_ptr(), 2) })),
    ("sendto", true, |fd, b, f| {
        ret(unsafe { libc::sendto(fd, b.as_ptr().cast(), b.len(), f, std::ptr::null(), 0) })
    }),
    ("sendmsg", true, |fd, b, f| {
        let mut list = parts(b);
        ret(unsafe { libc::sendmsg(fd, std::ptr::from_ref(&message(&mut list)), f) })
    }),
    ("sendmmsg", true, sendmmsg),
    ("pwritev2", false, |fd, b, _| ret(unsafe { libc::pwritev2(fd, parts(b).as_ptr(), 2, -1, 0) })),
    ("sendfile", false, sendfile),
    ("splice", false, splice_to),
    ("syscall-write", false, |fd, b, _| {
        ret(unsafe { libc::syscall(libc::SYS_write, fd, b.as_ptr(), b.len()) })
    }),
    ("syscall-sendto", true, |fd, b, f| {
        ret(unsafe { libc::syscall(libc::SYS_sendto, fd, b.as_ptr(), b.len(), f, 0usize, 0usize) })
    }),
];

fn recvfrom(fd: c_int, room: &mut [u8], flags: c_int) -> (Ret, String) {
    let mut from = [0u8; 64];
    let mut len = 64;
    // SAFETY: all of it outlives the call.
    let got = ret(unsafe {
        libc::recvfrom(
            fd,
            room.as_mut_ptr().cast(),
            room.len(),
            flags,
            from.as_mut_ptr().cast(),
            &raw mut len,
        )
    });
    (got, if got.0 >= 0 { format!("name {len}") } else { String::new() })
}

fn recvmsg(fd: c_int, room: &mut [u8], flags: c_int) -> (Ret, String) {
    let (mut list, mut name, mut control) = (parts(room), [0u64; 16], [0u64; 16]);
    let mut message = message(&mut list);
    message.msg_name = name.as_mut_ptr().cast();
    message.msg_namelen = size_of_val(&name) as u32;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: all of it outlives the call.
    let got = ret(unsafe { libc::recvmsg(fd, &raw mut message, flags) });
    let stored = format!(
        "name {} control {} flags {:#x}",
        message.msg_namelen, message.msg_controllen, message.msg_flags
    );
    (got, if got.0 >= 0 { stored } else { String::new() })
}

/// Two messages; the second does not wait.
fn recvmmsg(fd: c_int, room: &mut [u8], flags: c_int) -> (Ret, String) {
    let [mut a, mut b] = parts(room);
    // SAFETY: zero is valid; all of it outlives the call.
    unsafe {
        let mut two: [libc::mmsghdr; 2] = std::mem::zeroed();
        two[0].msg_hdr = message(std::slice::from_mut(&mut a));
        two[1].msg_hdr = message(std::slice::from_mut(&mut b));
        let flags = flags | libc::MSG_WAITFORONE;
        let got = ret(libc::recvmmsg(fd, two.as_mut_ptr(), 2, flags as _, std::ptr::null_mut()));
        let lengths = two.map(|m| m.msg_len);
        // Bytes of the second begin behind the first's room: a gap where the first was not full.
        match got.0 {
            1 => (Ret(lengths[0] as isize, 0), format!("1 of {lengths:?}")),
            2 if flags & libc::MSG_PEEK != 0 => {
                (Ret(lengths[0] as isize, 0), format!("2 of {lengths:?} {:#x}", two[1].msg_hdr.msg_flags))
            }
            2 => {
                let (first, second) = (lengths[0] as usize, lengths[1] as usize);
                room.copy_within(a.iov_len..a.iov_len + second, first);
                (Ret((first + second) as isize, 0), format!("2 of {lengths:?}"))
            }
            _ => (got, String::new()),
        }
    }
}

/// To a pipe, until all is there or nothing comes.
fn splice_from(fd: c_int, room: &mut [u8], _: c_int) -> (Ret, String) {
    let pipe = sys::pipe();
    let (mut done, mut last) = (0, Ret(0, 0));
    let null = std::ptr::null_mut();
    while done < room.len() {
        // SAFETY: numbers and null; the room outlives the call.
        let moved = unsafe {
            last = ret(libc::splice(fd, null, pipe[1], null, room.len() - done, libc::SPLICE_F_NONBLOCK));
            if last.0 <= 0 {
                break;
            }
            libc::read(pipe[0], room[done..].as_mut_ptr().cast(), last.0 as usize)
        };
        done += moved.max(0) as usize;
    }
    pipe.iter().for_each(|fd| {
        sys::close(*fd);
    });
    (if done > 0 { Ret(done as isize, 0) } else { last }, String::new())
}

fn plainly(got: Ret) -> (Ret, String) {
    (got, String::new())
}

/// Those that receive, and whether they take flags.
pub const RECEIVE: [(&str, bool, Receive); 13] = [
    ("recv", true, |fd, b, f| plainly(sys::recv(fd, b, f))),
    ("recv", true, |fd, b, f| plainly(sys::recv(fd, b, f))),
    ("read", false, |fd, b, _| plainly(ret(unsafe { libc::read(fd, b.as_mut_ptr().cast(), b.len()) }))),
    ("readv", false, |fd, b, _| plainly(ret(unsafe { libc::readv(fd, parts(b).as_ptr(), 2) }))),
    ("recvfrom", true, recvfrom),
    ("recvmsg", true, recvmsg),
    ("recvmmsg", true, recvmmsg),
    ("preadv2", false, |fd, b, _| plainly(ret(unsafe { libc::preadv2(fd, parts(b).as_ptr(), 2, -1, 0) }))),
    ("splice", false, splice_from),
    ("__read_chk", false, |fd, b, _| {
        plainly(ret(unsafe { sys::__read_chk(fd, b.as_mut_ptr().cast(), b.len(), b.len()) }))
    }),
    ("__recv_chk", true, |fd, b, f| {
        plainly(ret(unsafe { sys::__recv_chk(fd, b.as_mut_ptr().cast(), b.len(), b.len(), f) }))
    }),
    ("syscall-read", false, |fd, b, _| {
        plainly(ret(unsafe { libc::syscall(libc::SYS_read, fd, b.as_mut_ptr(), b.len()) }))
    }),
    ("syscall-recvfrom", true, |fd, b, f| {
        plainly(ret(unsafe {
            libc::syscall(libc::SYS_recvfrom, fd, b.as_mut_ptr(), b.len(), f, 0usize, 0usize)
        }))
    }),
];
