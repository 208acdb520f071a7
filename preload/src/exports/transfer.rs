//! Sending and receiving.

use crate::args;
use libc::{
    c_int, c_uint, c_void, iovec, mmsghdr, msghdr, off_t, size_t, sockaddr, socklen_t, ssize_t, timespec,
};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use vsocket_frontend::program::socket::{self, Route};

/// Serves a receiving call, or makes the real one and counts it.
macro_rules! receive {
    ($fd:expr, $flags:expr, $bufs:expr, $real:expr) => {
        match socket::receiving($fd, RecvFlags::from_bits_retain($flags as c_uint)) {
            Err(error) => args::answer(Err(error)),
            Ok(Route::Kernel) => $real,
            Ok(Route::Counted(inside)) => {
                let n = $real;
                inside.returned(if $flags & libc::MSG_PEEK != 0 { 0 } else { n });
                n
            }
            Ok(Route::Served(slot)) if $flags & libc::MSG_ERRQUEUE == 0 => {
                let flags = RecvFlags::from_bits_retain($flags as c_uint);
                args::answer($bufs.and_then(|bufs| socket::recv($fd, slot, bufs, flags)))
            }
            Ok(Route::Served(_)) => args::answer(Err(Errno::AGAIN)),
        }
    };
}

/// Serves a sending call, or makes the real one and counts it.
macro_rules! transmit {
    ($fd:expr, $flags:expr, $bufs:expr, $real:expr) => {
        match socket::sending($fd) {
            Route::Kernel => $real,
            Route::Counted(inside) => {
                let n = $real;
                inside.returned(n);
                n
            }
            Route::Served(slot) => {
                let flags = SendFlags::from_bits_retain($flags as c_uint);
                let quiet = $flags & libc::MSG_NOSIGNAL != 0;
                args::sent($bufs.and_then(|bufs| socket::send($fd, slot, bufs, flags)), quiet)
            }
        }
    };
}

// SAFETY, for every hook of this file: the arguments are the application's own, valid as the C function's contract says;
// they are only handed on, or made into slices that end with the call.

hook! { unsafe fn read(fd: c_int, buf: *mut c_void, n: size_t) -> ssize_t => vs_read {
    // SAFETY: see above.
    unsafe { receive!(fd, 0, Ok(&mut [args::buffer(buf, n)][..]), real!(read)(fd, buf, n)) }
} }

hook! { unsafe fn __read_chk(fd: c_int, buf: *mut c_void, n: size_t, room: size_t) -> ssize_t => vs_read_chk {
    // SAFETY: see above; a call that would overflow is the real function's to end.
    unsafe {
        if n > room {
            return real!(__read_chk)(fd, buf, n, room);
        }
        receive!(fd, 0, Ok(&mut [args::buffer(buf, n)][..]), real!(__read_chk)(fd, buf, n, room))
    }
} }

hook! { unsafe fn readv(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t => vs_readv {
    // SAFETY: see above.
    unsafe { receive!(fd, 0, args::scatter(iov, count), real!(readv)(fd, iov, count)) }
} }

hook! { unsafe fn recv(fd: c_int, buf: *mut c_void, n: size_t, flags: c_int) -> ssize_t => vs_recv {
    // SAFETY: see above.
    unsafe { receive!(fd, flags, Ok(&mut [args::buffer(buf, n)][..]), real!(recv)(fd, buf, n, flags)) }
} }

hook! { unsafe fn __recv_chk(fd: c_int, buf: *mut c_void, n: size_t, room: size_t, flags: c_int) -> ssize_t => vs_recv_chk {
    // SAFETY: see above; a call that would overflow is the real function's to end.
    unsafe {
        if n > room {
            return real!(__recv_chk)(fd, buf, n, room, flags);
        }
        receive!(fd, flags, Ok(&mut [args::buffer(buf, n)][..]), real!(__recv_chk)(fd, buf, n, room, flags))
    }
} }

hook! { unsafe fn recvfrom(fd: c_int, buf: *mut c_void, n: size_t, flags: c_int, from: *mut sockaddr, len: *mut socklen_t) -> ssize_t => vs_recvfrom {
    // SAFETY: see above.
    unsafe {
        let got = receive!(fd, flags, Ok(&mut [args::buffer(buf, n)][..]), real!(recvfrom)(fd, buf, n, flags, from, len));
        if !len.is_null() && socket::held(fd).is_some() {
            *len = 0;
        }
        got
    }
} }

hook! { unsafe fn __recvfrom_chk(fd: c_int, buf: *mut c_void, n: size_t, room: size_t, flags: c_int, from: *mut sockaddr, len: *mut socklen_t) -> ssize_t => vs_recvfrom_chk {
    // SAFETY: see above; a call that would overflow is the real function's to end.
    unsafe {
        if n > room {
            return real!(__recvfrom_chk)(fd, buf, n, room, flags, from, len);
        }
        vs_recvfrom(fd, buf, n, flags, from, len)
    }
} }

hook! { unsafe fn recvmsg(fd: c_int, msg: *mut msghdr, flags: c_int) -> ssize_t => vs_recvmsg {
    // SAFETY: see above.
    unsafe {
        let got = receive!(fd, flags, args::scatter((*msg).msg_iov, (*msg).msg_iovlen as c_int), real!(recvmsg)(fd, msg, flags));
        if got >= 0 && socket::held(fd).is_some() {
            // As TCP: no name, no control data.
            (*msg).msg_namelen = 0;
            (*msg).msg_controllen = 0;
            (*msg).msg_flags = 0;
        }
        got
    }
} }

hook! { unsafe fn recvmmsg(fd: c_int, list: *mut mmsghdr, n: c_uint, flags: c_int, timeout: *mut timespec) -> c_int => vs_recvmmsg {
    // SAFETY: see above.
    unsafe {
        if !socket::is_followed(fd) || n == 0 {
            return real!(recvmmsg)(fd, list, n, flags, timeout);
        }
        // One message is a permitted answer on a stream.
        let got = vs_recvmsg(fd, &raw mut (*list).msg_hdr, flags & !libc::MSG_WAITFORONE);
        if got < 0 {
            return -1;
        }
        (*list).msg_len = got as c_uint;
        1
    }
} }

hook! { unsafe fn write(fd: c_int, buf: *const c_void, n: size_t) -> ssize_t => vs_write {
    // SAFETY: see above.
    unsafe { transmit!(fd, 0, Ok(&[args::bytes(buf, n)][..]), real!(write)(fd, buf, n)) }
} }

hook! { unsafe fn writev(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t => vs_writev {
    // SAFETY: see above.
    unsafe { transmit!(fd, 0, args::gather(iov, count), real!(writev)(fd, iov, count)) }
} }

hook! { unsafe fn send(fd: c_int, buf: *const c_void, n: size_t, flags: c_int) -> ssize_t => vs_send {
    // SAFETY: see above.
    unsafe { transmit!(fd, flags, Ok(&[args::bytes(buf, n)][..]), real!(send)(fd, buf, n, flags)) }
} }

hook! { unsafe fn sendto(fd: c_int, buf: *const c_void, n: size_t, flags: c_int, to: *const sockaddr, len: socklen_t) -> ssize_t => vs_sendto {
    // SAFETY: see above.
    unsafe { transmit!(fd, flags, Ok(&[args::bytes(buf, n)][..]), real!(sendto)(fd, buf, n, flags, to, len)) }
} }

hook! { unsafe fn sendmsg(fd: c_int, msg: *const msghdr, flags: c_int) -> ssize_t => vs_sendmsg {
    // SAFETY: see above.
    unsafe { transmit!(fd, flags, args::gather((*msg).msg_iov, (*msg).msg_iovlen as c_int), real!(sendmsg)(fd, msg, flags)) }
} }

hook! { unsafe fn sendmmsg(fd: c_int, list: *mut mmsghdr, n: c_uint, flags: c_int) -> c_int => vs_sendmmsg {
    // SAFETY: see above.
    unsafe {
        if !socket::is_followed(fd) || n == 0 {
            return real!(sendmmsg)(fd, list, n, flags);
        }
        let sent = vs_sendmsg(fd, &raw const (*list).msg_hdr, flags);
        if sent < 0 {
            return -1;
        }
        (*list).msg_len = sent as c_uint;
        1
    }
} }

/// `sendfile` to a followed descriptor: read, then send. A short count is a permitted answer.
unsafe fn send_file(out: c_int, input: c_int, offset: *mut off_t, count: size_t) -> ssize_t {
    let mut piece = [0u8; 32768];
    let want = count.min(piece.len());
    // SAFETY: our own buffer; the offset is the application's, valid or null.
    unsafe {
        let at = if offset.is_null() { libc::lseek(input, 0, libc::SEEK_CUR) } else { *offset };
        let got = libc::pread(input, piece.as_mut_ptr().cast(), want, at);
        if got <= 0 {
            return got;
        }
        let sent = vs_write(out, piece.as_ptr().cast(), got as size_t);
        if sent > 0 && offset.is_null() {
            libc::lseek(input, at + sent as off_t, libc::SEEK_SET);
        } else if sent > 0 {
            *offset += sent as off_t;
        }
        sent
    }
}

hook! { unsafe fn sendfile(out: c_int, input: c_int, offset: *mut off_t, count: size_t) -> ssize_t => vs_sendfile {
    // SAFETY: see above.
    unsafe {
        match socket::sending(out) {
            Route::Kernel => real!(sendfile)(out, input, offset, count),
            Route::Counted(inside) => {
                let n = real!(sendfile)(out, input, offset, count);
                inside.returned(n);
                n
            }
            Route::Served(_) => send_file(out, input, offset, count),
        }
    }
} }

hook! { unsafe fn sendfile64(out: c_int, input: c_int, offset: *mut off_t, count: size_t) -> ssize_t => vs_sendfile64 {
    // SAFETY: see above; off_t is 64 bits wide here.
    unsafe { vs_sendfile(out, input, offset, count) }
} }

hook! { unsafe fn splice(from: c_int, from_at: *mut off_t, to: c_int, to_at: *mut off_t, n: size_t, flags: c_uint) -> ssize_t => vs_splice {
    // SAFETY: see above.
    unsafe {
        // A connection object's bytes cannot be spliced: the answer of a descriptor that does not support it makes
        // programs copy.
        if socket::held(from).is_some() || socket::held(to).is_some() {
            return args::answer(Err(Errno::INVAL));
        }
        // What is spliced is not counted, so the descriptor stays on TCP.
        socket::leave_alone(from);
        socket::leave_alone(to);
        real!(splice)(from, from_at, to, to_at, n, flags)
    }
} }
