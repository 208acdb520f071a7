//! Sending and receiving.

use crate::args;
use crate::hook::{is_cancelled, moving, ours, point};
use libc::{
    c_int, c_uint, c_void, iovec, mmsghdr, msghdr, off_t, size_t, sockaddr, socklen_t, ssize_t, timespec,
};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use vsocket_frontend::program::found;
use vsocket_frontend::program::pipes;
use vsocket_frontend::program::socket::{self, Route};
use vsocket_frontend::program::table::{self, Slot};

/// Whether a receiving call with these flags takes bytes of the stream.
fn counts(flags: c_int) -> bool {
    flags & (libc::MSG_PEEK | libc::MSG_OOB | libc::MSG_ERRQUEUE) == 0
}

/// Makes the real call on a counted descriptor; if the thread is cancelled in it, it has left the kernel all the same.
macro_rules! counted {
    ($inside:ident, $real:expr) => {
        if $inside.is_alone() {
            $real
        } else {
            let mut cleanup = Cleanup::new();
            cleanup.push($inside.slot());
            let n = $real;
            cleanup.pop();
            n
        }
    };
}

/// Serves a receiving call, or makes the real one and counts it.
macro_rules! receive {
    ($fd:expr, $flags:expr, $bufs:expr, $real:expr) => {
        if !socket::is_followed($fd) {
            $real
        } else {
            loop {
            point();
            let route = moving(|| socket::receiving($fd, RecvFlags::from_bits_retain($flags as c_uint)));
            let n = match route.unwrap_or(Ok(Route::Kernel)) {
                Err(error) => args::answer(Err(error)),
                Ok(Route::Kernel) => $real,
                // Urgent bytes and completions of sends are queues of the kernel's own, whatever lane the stream is on.
                Ok(Route::Served(_)) if $flags & (libc::MSG_ERRQUEUE | libc::MSG_OOB) != 0 => $real,
                Ok(Route::Counted(inside)) => {
                    let n = counted!(inside, $real);
                    ours(|| inside.returned(if counts($flags) { n } else { 0 }));
                    n
                }
                Ok(Route::Served(slot)) => {
                    let flags = RecvFlags::from_bits_retain($flags as c_uint);
                    let served = moving(|| args::answer($bufs.and_then(|bufs| socket::recv($fd, slot, bufs, flags))));
                    served.unwrap_or_else(|| $real)
                }
            };
            if !is_cancelled(n < 0) {
                break n;
            }
            }
        }
    };
}

/// Serves a call that reads without flags. For nothing, the kernel answers as for any file.
macro_rules! input {
    ($fd:expr, $total:expr, $bufs:expr, $real:expr) => {
        if $total == 0 { $real } else { receive!($fd, 0, $bufs, $real) }
    };
}

/// Serves a sending call, or makes the real one and counts it.
macro_rules! transmit {
    ($fd:expr, $flags:expr, $bufs:expr, $real:expr) => {
        if !socket::is_followed($fd) {
            $real
        } else {
            loop {
                point();
                let n = match moving(|| socket::sending($fd)).unwrap_or(Route::Kernel) {
                    Route::Kernel => $real,
                    Route::Counted(inside) => {
                        let n = counted!(inside, $real);
                        ours(|| inside.returned(n));
                        n
                    }
                    Route::Served(slot) => {
                        let flags = SendFlags::from_bits_retain($flags as c_uint);
                        let quiet = $flags & libc::MSG_NOSIGNAL != 0;
                        let served = moving(|| {
                            args::sent($bufs.and_then(|bufs| socket::send($fd, slot, bufs, flags)), quiet)
                        });
                        served.unwrap_or_else(|| $real)
                    }
                };
                if !is_cancelled(n < 0) {
                    break n;
                }
            }
        }
    };
}

/// Serves a call that writes a list as to a file. For nothing, the kernel answers without asking the socket, which may be shut.
macro_rules! output {
    ($fd:expr, $flags:expr, $iov:expr, $count:expr, $real:expr) => {
        if args::length($iov, $count) == 0 {
            $real
        } else {
            transmit!($fd, $flags, args::gather($iov, $count), $real)
        }
    };
}

/// What libc runs when a thread is cancelled, or ends, in a frame that stands below this: its `_pthread_cleanup_buffer`.
#[repr(C)]
struct Cleanup {
    routine: Option<extern "C" fn(*mut c_void)>,
    argument: *mut c_void,
    kind: c_int,
    previous: *mut c_void,
}

unsafe extern "C" {
    fn _pthread_cleanup_push(place: *mut Cleanup, routine: extern "C" fn(*mut c_void), argument: *mut c_void);
    fn _pthread_cleanup_pop(place: *mut Cleanup, execute: c_int);
}

extern "C" fn left(slot: *mut c_void) {
    // SAFETY: of the table, which lives as long as the process.
    unsafe { &*slot.cast::<Slot>() }.leave();
}

impl Cleanup {
    fn new() -> Self {
        let null = std::ptr::null_mut();
        Self { routine: None, argument: null, kind: 0, previous: null }
    }

    /// From now on the slot is left in such a case. The caller pops it before its frame ends.
    fn push(&mut self, slot: &'static Slot) {
        let slot = std::ptr::from_ref(slot).cast_mut().cast();
        // SAFETY: the place is in the caller's frame until it is popped, or that frame is unwound, when libc runs it.
        unsafe { _pthread_cleanup_push(self, left, slot) };
    }

    fn pop(&mut self) {
        // SAFETY: pushed by the same frame, the last that was.
        unsafe { _pthread_cleanup_pop(self, 0) };
    }
}

// SAFETY, for every hook of this file: the arguments are the application's own, valid as the C function's contract says;
// they are only handed on, or made into slices that end with the call.

hook! { unsafe fn read(fd: c_int, buf: *mut c_void, n: size_t) -> ssize_t => vs_read {
    // SAFETY: see above.
    unsafe { input!(fd, n, args::buffer(buf, n).as_mut().map(std::slice::from_mut).map_err(|e| *e), real!(read)(fd, buf, n)) }
} }

hook! { unsafe fn __read_chk(fd: c_int, buf: *mut c_void, n: size_t, room: size_t) -> ssize_t => vs_read_chk {
    // SAFETY: see above; a call that would overflow is the real function's to end.
    unsafe {
        if n > room {
            return real!(__read_chk)(fd, buf, n, room);
        }
        input!(fd, n, args::buffer(buf, n).as_mut().map(std::slice::from_mut).map_err(|e| *e), real!(__read_chk)(fd, buf, n, room))
    }
} }

hook! { unsafe fn readv(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t => vs_readv {
    // SAFETY: see above.
    unsafe { input!(fd, args::length(iov, count), args::scatter(iov, count), real!(readv)(fd, iov, count)) }
} }

/// What `preadv2` without an offset makes of its flags, if it is a receiving call.
fn rwf(offset: off_t, flags: c_int) -> Option<c_int> {
    match (offset, flags) {
        (-1, 0) => Some(0),
        (-1, libc::RWF_NOWAIT) => Some(libc::MSG_DONTWAIT),
        _ => None,
    }
}

hook! { unsafe fn preadv2(fd: c_int, iov: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t => vs_preadv2 {
    // SAFETY: see above.
    unsafe {
        match rwf(offset, flags) {
            Some(how) if args::length(iov, count) > 0 => {
                receive!(fd, how, args::scatter(iov, count), real!(preadv2)(fd, iov, count, offset, flags))
            }
            _ => real!(preadv2)(fd, iov, count, offset, flags),
        }
    }
} }

hook! { unsafe fn preadv64v2(fd: c_int, iov: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t => vs_preadv64v2 {
    // SAFETY: see above; off_t is 64 bits wide here.
    unsafe { vs_preadv2(fd, iov, count, offset, flags) }
} }

hook! { unsafe fn recv(fd: c_int, buf: *mut c_void, n: size_t, flags: c_int) -> ssize_t => vs_recv {
    // SAFETY: see above.
    unsafe { receive!(fd, flags, args::buffer(buf, n).as_mut().map(std::slice::from_mut).map_err(|e| *e), real!(recv)(fd, buf, n, flags)) }
} }

hook! { unsafe fn __recv_chk(fd: c_int, buf: *mut c_void, n: size_t, room: size_t, flags: c_int) -> ssize_t => vs_recv_chk {
    // SAFETY: see above; a call that would overflow is the real function's to end.
    unsafe {
        if n > room {
            return real!(__recv_chk)(fd, buf, n, room, flags);
        }
        receive!(fd, flags, args::buffer(buf, n).as_mut().map(std::slice::from_mut).map_err(|e| *e), real!(__recv_chk)(fd, buf, n, room, flags))
    }
} }

hook! { unsafe fn recvfrom(fd: c_int, buf: *mut c_void, n: size_t, flags: c_int, from: *mut sockaddr, len: *mut socklen_t) -> ssize_t => vs_recvfrom {
    // SAFETY: see above.
    unsafe {
        if socket::is_followed(fd) {
            return receive_from(fd, buf, n, flags, from, len);
        }
        real!(recvfrom)(fd, buf, n, flags, from, len)
    }
} }

/// `recvfrom` of a descriptor that was followed when it began: the agent's answer may come meanwhile, and be that it is
/// followed no more.
#[inline(never)]
unsafe fn receive_from(
    fd: c_int,
    buf: *mut c_void,
    n: size_t,
    flags: c_int,
    from: *mut sockaddr,
    len: *mut socklen_t,
) -> ssize_t {
    // SAFETY: see above.
    unsafe {
        let got = receive!(
            fd,
            flags,
            args::buffer(buf, n).as_mut().map(std::slice::from_mut).map_err(|e| *e),
            real!(recvfrom)(fd, buf, n, flags, from, len)
        );
        if got >= 0 && !from.is_null() && !len.is_null() {
            *len = 0;
        }
        got
    }
}

hook! { unsafe fn __recvfrom_chk(fd: c_int, buf: *mut c_void, n: size_t, room: size_t, flags: c_int, from: *mut sockaddr, len: *mut socklen_t) -> ssize_t => vs_recvfrom_chk {
    // SAFETY: see above; a call that would overflow is the real function's to end.
    unsafe {
        if n > room {
            return real!(__recvfrom_chk)(fd, buf, n, room, flags, from, len);
        }
        vs_recvfrom(fd, buf, n, flags, from, len)
    }
} }

/// Descriptors came with a message.
#[inline]
unsafe fn received(msg: *const msghdr) {
    // SAFETY: the application's message, of which the kernel has just stored as much control data as it says.
    unsafe {
        if (*msg).msg_controllen > 0 {
            ours(|| args::each_passed(msg, found::passed));
        }
    }
}

hook! { unsafe fn recvmsg(fd: c_int, msg: *mut msghdr, flags: c_int) -> ssize_t => vs_recvmsg {
    // SAFETY: see above.
    unsafe {
        if socket::is_followed(fd) {
            return receive_message(fd, msg, flags);
        }
        let got = real!(recvmsg)(fd, msg, flags);
        if got >= 0 {
            received(msg);
        }
        got
    }
} }

/// `recvmsg` of a descriptor that was followed when it began.
#[inline(never)]
unsafe fn receive_message(fd: c_int, msg: *mut msghdr, flags: c_int) -> ssize_t {
    // SAFETY: see above.
    unsafe {
        let mut served = true;
        let got = receive!(
            fd,
            flags,
            args::of_message(args::scatter((*msg).msg_iov, (*msg).msg_iovlen as c_int)),
            {
                served = false;
                real!(recvmsg)(fd, msg, flags)
            }
        );
        if got >= 0 && served {
            // As TCP: no name, no control data; the kernel hands this one flag back.
            (*msg).msg_namelen = 0;
            (*msg).msg_controllen = 0;
            (*msg).msg_flags = flags & libc::MSG_CMSG_CLOEXEC;
        } else if got >= 0 {
            received(msg);
        }
        got
    }
}

hook! { unsafe fn recvmmsg(fd: c_int, list: *mut mmsghdr, n: c_uint, flags: c_int, timeout: *mut timespec) -> c_int => vs_recvmmsg {
    // SAFETY: see above.
    unsafe {
        if !socket::is_followed(fd) || n == 0 {
            let got = real!(recvmmsg)(fd, list, n, flags, timeout);
            for message in 0..got.max(0) as usize {
                received(&raw const (*list.add(message)).msg_hdr);
            }
            return got;
        }
        let mut how = flags & !libc::MSG_WAITFORONE;
        let limit = args::timespec(timeout);
        let Ok(limit) = limit else { return args::answer(Err(Errno::INVAL)) as c_int };
        let end = limit.map(|limit| std::time::Instant::now() + limit);
        if flags & libc::MSG_ERRQUEUE == 0
            && let Some(error) = socket::pending_error(fd)
        {
            return args::answer(Err(error)) as c_int;
        }
        for done in 0..n {
            let message = list.add(done as usize);
            let got = vs_recvmsg(fd, &raw mut (*message).msg_hdr, how);
            if got < 0 {
                return if done > 0 { done as c_int } else { -1 };
            }
            (*message).msg_len = got as c_uint;
            // As the kernel: the time is looked at after each message, and no wait ends by it.
            if end.is_some_and(|end| end <= std::time::Instant::now()) {
                return done as c_int + 1;
            }
            if flags & libc::MSG_WAITFORONE != 0 {
                how |= libc::MSG_DONTWAIT;
            }
        }
        n as c_int
    }
} }

hook! { unsafe fn write(fd: c_int, buf: *const c_void, n: size_t) -> ssize_t => vs_write {
    // SAFETY: see above.
    unsafe { transmit!(fd, 0, args::bytes(buf, n).as_ref().map(std::slice::from_ref).map_err(|e| *e), real!(write)(fd, buf, n)) }
} }

hook! { unsafe fn writev(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t => vs_writev {
    // SAFETY: see above.
    unsafe { output!(fd, 0, iov, count, real!(writev)(fd, iov, count)) }
} }

hook! { unsafe fn pwritev2(fd: c_int, iov: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t => vs_pwritev2 {
    // SAFETY: see above.
    unsafe {
        match rwf(offset, flags) {
            Some(how) => output!(fd, how, iov, count, real!(pwritev2)(fd, iov, count, offset, flags)),
            None => real!(pwritev2)(fd, iov, count, offset, flags),
        }
    }
} }

hook! { unsafe fn pwritev64v2(fd: c_int, iov: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t => vs_pwritev64v2 {
    // SAFETY: see above; off_t is 64 bits wide here.
    unsafe { vs_pwritev2(fd, iov, count, offset, flags) }
} }

hook! { unsafe fn send(fd: c_int, buf: *const c_void, n: size_t, flags: c_int) -> ssize_t => vs_send {
    // SAFETY: see above.
    unsafe { transmit!(fd, flags, args::bytes(buf, n).as_ref().map(std::slice::from_ref).map_err(|e| *e), real!(send)(fd, buf, n, flags)) }
} }

hook! { unsafe fn sendto(fd: c_int, buf: *const c_void, n: size_t, flags: c_int, to: *const sockaddr, len: socklen_t) -> ssize_t => vs_sendto {
    // SAFETY: see above.
    unsafe { transmit!(fd, flags, args::bytes(buf, n).as_ref().map(std::slice::from_ref).map_err(|e| *e), real!(sendto)(fd, buf, n, flags, to, len)) }
} }

/// Whether the kernel takes a message's control data: it is asked by a message of no bytes.
unsafe fn control_is_fine(fd: c_int, msg: *const msghdr) -> bool {
    // SAFETY: the application's message, of which a copy names no buffers.
    unsafe {
        if (*msg).msg_control.is_null() || (*msg).msg_controllen == 0 {
            return true;
        }
        let mut empty = *msg;
        empty.msg_iovlen = 0;
        let got = real!(sendmsg)(fd, &raw const empty, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
        got >= 0 || args::errno() != libc::EINVAL
    }
}

/// Connections that a message passes on go back to TCP first.
#[inline]
unsafe fn passing(msg: *const msghdr) {
    // SAFETY: the application's message.
    unsafe {
        if (*msg).msg_controllen != 0 && !(*msg).msg_control.is_null() && table::has_followed() {
            pass(msg);
        }
    }
}

#[inline(never)]
unsafe fn pass(msg: *const msghdr) {
    let mut found = Vec::new();
    // SAFETY: as above; its control data are as long as it says.
    unsafe { args::each_passed(msg, |fd| found.extend(socket::is_followed(fd).then_some(fd))) };
    if !found.is_empty() {
        let errno = args::errno();
        ours(|| socket::passing(&found));
        args::set_errno(errno);
    }
}

hook! { unsafe fn sendmsg(fd: c_int, msg: *const msghdr, flags: c_int) -> ssize_t => vs_sendmsg {
    // SAFETY: see above.
    unsafe {
        passing(msg);
        if socket::is_followed(fd) { send_message(fd, msg, flags) } else { real!(sendmsg)(fd, msg, flags) }
    }
} }

/// `sendmsg` of a followed descriptor: not in the hook, which makes no frame for others'.
#[inline(never)]
unsafe fn send_message(fd: c_int, msg: *const msghdr, flags: c_int) -> ssize_t {
    // SAFETY: see above.
    unsafe {
        if !control_is_fine(fd, msg) {
            return args::answer(Err(Errno::INVAL));
        }
        let list = args::of_message(args::gather((*msg).msg_iov, (*msg).msg_iovlen as c_int));
        transmit!(fd, flags, list, real!(sendmsg)(fd, msg, flags))
    }
}

hook! { unsafe fn sendmmsg(fd: c_int, list: *mut mmsghdr, n: c_uint, flags: c_int) -> c_int => vs_sendmmsg {
    // SAFETY: see above.
    unsafe {
        if !socket::is_followed(fd) || n == 0 {
            (0..n as usize).for_each(|message| passing(&raw const (*list.add(message)).msg_hdr));
            return real!(sendmmsg)(fd, list, n, flags);
        }
        for done in 0..n {
            let message = list.add(done as usize);
            let sent = vs_sendmsg(fd, &raw const (*message).msg_hdr, flags);
            if sent < 0 {
                return if done > 0 { done as c_int } else { -1 };
            }
            (*message).msg_len = sent as c_uint;
            let header = &(*message).msg_hdr;
            if (sent as usize) < args::length(header.msg_iov, header.msg_iovlen as c_int) {
                return done as c_int + 1;
            }
        }
        n as c_int
    }
} }

/// `sendfile` to a followed descriptor: read, then send, until all is sent or a send would wait.
unsafe fn send_file(out: c_int, input: c_int, offset: *mut off_t, count: size_t) -> ssize_t {
    let mut done = 0;
    while done < count || count == 0 {
        // SAFETY: the offset is the application's, valid or null.
        let (sent, more) = unsafe { send_piece(out, input, offset, count - done) };
        if sent <= 0 {
            return if done > 0 { done as ssize_t } else { sent };
        }
        done += sent as usize;
        if !more {
            break;
        }
    }
    done as ssize_t
}

/// One piece of a file, and whether the next may be tried.
unsafe fn send_piece(out: c_int, input: c_int, offset: *mut off_t, count: size_t) -> (ssize_t, bool) {
    let mut piece = [0u8; 32768];
    let want = count.min(piece.len());
    // SAFETY: our own buffer; the offset is the application's, valid or null.
    unsafe {
        let at = if offset.is_null() { libc::lseek(input, 0, libc::SEEK_CUR) } else { *offset };
        if at < 0 && offset.is_null() {
            // From a pipe or a socket the kernel cannot send either.
            let errno = args::errno();
            args::set_errno(if errno == libc::ESPIPE { libc::EINVAL } else { errno });
            return (-1, false);
        }
        let got = libc::pread(input, piece.as_mut_ptr().cast(), want, at);
        if got <= 0 {
            return (got, false);
        }
        let sent = vs_write(out, piece.as_ptr().cast(), got as size_t);
        if sent > 0 && offset.is_null() {
            libc::lseek(input, at + sent as off_t, libc::SEEK_SET);
        } else if sent > 0 {
            *offset += sent as off_t;
        }
        (sent, sent == got)
    }
}

hook! { unsafe fn sendfile(out: c_int, input: c_int, offset: *mut off_t, count: size_t) -> ssize_t => vs_sendfile {
    // SAFETY: see above.
    unsafe {
        if !socket::is_followed(out) {
            return real!(sendfile)(out, input, offset, count);
        }
        match ours(|| socket::sending(out)).unwrap_or(Route::Kernel) {
            Route::Kernel => real!(sendfile)(out, input, offset, count),
            Route::Counted(inside) => {
                let n = counted!(inside, real!(sendfile)(out, input, offset, count));
                ours(|| inside.returned(n));
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
        if !from_at.is_null() || !to_at.is_null() || flags & !SPLICE_FLAGS != 0 || n == 0 {
            return real!(splice)(from, from_at, to, to_at, n, flags);
        }
        if !socket::is_followed(from) && !socket::is_followed(to) {
            return real!(splice)(from, from_at, to, to_at, n, flags);
        }
        let wait = flags & libc::SPLICE_F_NONBLOCK == 0;
        let (socket, direction) = if socket::is_followed(to) { (to, socket::sending as fn(c_int) -> Route) } else { (from, socket::splicing as fn(c_int) -> Route) };
        match ours(|| direction(socket)).unwrap_or(Route::Kernel) {
            Route::Kernel => real!(splice)(from, from_at, to, to_at, n, flags),
            Route::Counted(inside) => {
                let n = counted!(inside, real!(splice)(from, from_at, to, to_at, n, flags));
                ours(|| inside.returned(n));
                n
            }
            Route::Served(slot) if socket == to => {
                ours(|| args::sent(pipes::to_socket(from, to, slot, n, wait), false)).unwrap_or(-1)
            }
            Route::Served(slot) => ours(|| args::answer(pipes::from_socket(from, slot, to, n, wait))).unwrap_or(-1),
        }
    }
} }

/// What `splice` knows; others are the kernel's to refuse.
const SPLICE_FLAGS: c_uint =
    libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MORE | libc::SPLICE_F_GIFT;
