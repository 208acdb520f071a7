//! What the kernel says about an anchor: its state and its byte counters.

use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use std::io;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use vsocket_channel::message::Tuple;

/// The anchor's counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counters {
    /// Bytes this end has put into the anchor since the connection began.
    pub tx: u64,
    /// Bytes this end has taken from it.
    pub rx: u64,
    /// Whether it is established (`TCP_INFO`'s state 1).
    pub established: bool,
    /// Whether this end may send: established, or only the peer has shut.
    pub sends: bool,
}

const TCP_ESTABLISHED: u8 = 1;
const TCP_TIME_WAIT: u8 = 6;
const TCP_CLOSE: u8 = 7;
const TCP_CLOSE_WAIT: u8 = 8;
const TCP_LAST_ACK: u8 = 9;
const TCP_CLOSING: u8 = 11;

fn tcp_info(fd: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    // SAFETY: zero is a valid tcp_info; the kernel writes at most `len` bytes of it.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the pointers name `info` and `len`, which outlive the call.
    let got = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &raw mut len,
        )
    };
    if got == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// SIOCOUTQ: bytes that the peer has not acknowledged.
fn unsent(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: TIOCOUTQ (SIOCOUTQ for sockets) stores an int, as the getter's type says.
    let n: libc::c_int =
        unsafe { rustix::ioctl::ioctl(fd, rustix::ioctl::Getter::<{ libc::TIOCOUTQ as _ }, _>::new()) }?;
    Ok(n.max(0) as u64)
}

/// Bytes that can be read from the anchor now (FIONREAD).
pub fn unread(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(rustix::io::ioctl_fionread(fd)?)
}

/// The counters, if they stand still for the moment that reading them takes; `None` if they kept moving.
///
/// `tcpi_bytes_acked` counts the connector's SYN; what lies in the send queue is not acknowledged yet. Two readings of
/// `TCP_INFO` must agree, as the queues are read between them.
pub fn counters(fd: impl AsFd, connector: bool) -> io::Result<Option<Counters>> {
    let fd = fd.as_fd();
    let mut before = tcp_info(fd)?;
    for _ in 0..64 {
        let (out, inq) = (unsent(fd)?, unread(fd)?);
        let after = tcp_info(fd)?;
        let key = |i: &libc::tcp_info| (i.tcpi_bytes_acked, i.tcpi_bytes_received, i.tcpi_state);
        if key(&before) == key(&after) {
            return Ok(Some(Counters::of(&after, out, inq, connector)));
        }
        before = after;
    }
    Ok(None)
}

/// Counters that may be too high by what moves while they are read, never too low by what moved before. Always there:
/// beside a busy program every call here waits for the socket's lock, and [`counters`] may find no quiet moment.
pub fn counters_at_least(fd: impl AsFd, connector: bool) -> io::Result<Counters> {
    let fd = fd.as_fd();
    let (out, inq) = (unsent(fd)?, unread(fd)?);
    Ok(Counters::of(&tcp_info(fd)?, out, inq, connector))
}

impl Counters {
    /// From `TCP_INFO` and the queues' lengths before it.
    fn of(info: &libc::tcp_info, out: u64, inq: u64, connector: bool) -> Self {
        let state = info.tcpi_state;
        Self {
            tx: (info.tcpi_bytes_acked + out).saturating_sub(u64::from(connector)),
            rx: info.tcpi_bytes_received.saturating_sub(inq),
            established: state == TCP_ESTABLISHED,
            sends: matches!(state, TCP_ESTABLISHED | TCP_CLOSE_WAIT),
        }
    }
}

/// Whether this end of an established connection did the `connect`, as its counters tell: what was acknowledged or is under way is
/// what was sent, and the connector's SYN. `None` if they do not tell, as before Linux 4.19, or do not stand still.
pub fn is_connector(fd: impl AsFd) -> io::Result<Option<bool>> {
    let fd = fd.as_fd();
    let key = |i: &libc::tcp_info| (i.tcpi_bytes_acked, i.tcpi_bytes_sent, i.tcpi_notsent_bytes);
    for _ in 0..64 {
        let before = tcp_info(fd)?;
        let out = unsent(fd)?;
        let info = tcp_info(fd)?;
        if key(&before) != key(&info) {
            continue;
        }
        let under_way = out.wrapping_sub(u64::from(info.tcpi_notsent_bytes));
        let sent = info.tcpi_bytes_sent.wrapping_sub(info.tcpi_bytes_retrans);
        let tells = info.tcpi_state == TCP_ESTABLISHED && (sent > 0 || info.tcpi_data_segs_out == 0);
        return Ok(match info.tcpi_bytes_acked.wrapping_add(under_way).wrapping_sub(sent) {
            syn @ (0 | 1) if tells => Some(syn == 1),
            _ => None,
        });
    }
    Ok(None)
}

/// Whether what another process has done with a connection is only to move bytes: it is TCP by itself, without a protocol on top
/// (`TCP_ULP`, as kTLS), receives what comes (`SO_RCVLOWAT`), has nothing urgent, and is not shut.
pub fn is_as_new(fd: BorrowedFd<'_>) -> bool {
    use rustix::net::{ipproto, sockopt};
    let flags = rustix::event::PollFlags::RDHUP | rustix::event::PollFlags::PRI;
    let mut one = [rustix::event::PollFd::from_borrowed_fd(fd, flags)];
    let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let quiet = rustix::io::retry_on_intr(|| rustix::event::poll(&mut one, Some(&zero))) == Ok(0);
    sockopt::socket_protocol(fd) == Ok(Some(ipproto::TCP))
        && int_option(fd, libc::IPPROTO_TCP, libc::TCP_ULP).is_none_or(|(len, _)| len == 0)
        && int_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT) == Some((4, 1))
        && quiet
}

/// A socket option of up to four bytes, and how many it has; `None`: the kernel does not know it.
fn int_option(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> Option<(usize, libc::c_int)> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointers name `value` and `len`, which outlive the call; the kernel writes at most `len` bytes.
    let got = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, std::ptr::from_mut(&mut value).cast(), &raw mut len)
    };
    (got == 0).then_some((len as usize, value))
}

/// Whether the kernel is to report sends without copying (`SO_ZEROCOPY`).
pub fn reports_completions(fd: BorrowedFd<'_>) -> bool {
    int_option(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY).is_some_and(|(_, on)| on != 0)
}

/// Whether the peer's FIN has come.
pub fn peer_has_shut(fd: impl AsFd) -> bool {
    let fd = fd.as_fd();
    let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut one = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::RDHUP)];
    rustix::event::poll(&mut one, Some(&zero)).unwrap_or(0) > 0
}

/// Whether the peer's FIN has come, and ours has not gone: the kernel calls a reset that then comes `EPIPE`.
pub fn peer_has_shut_alone(fd: impl AsFd) -> bool {
    tcp_info(fd.as_fd()).is_ok_and(|info| info.tcpi_state == TCP_CLOSE_WAIT)
}

/// Whether the peer's FIN has come, or the connection is over: also of a socket that was shut for reading here.
pub fn has_ended(fd: impl AsFd) -> bool {
    const AFTER_FIN: [u8; 5] = [TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING];
    tcp_info(fd.as_fd()).is_ok_and(|info| AFTER_FIN.contains(&info.tcpi_state))
}

/// Whether the connection is over for the kernel: reset, or ended on both sides.
pub fn has_closed(fd: impl AsFd) -> bool {
    tcp_info(fd.as_fd()).is_ok_and(|info| info.tcpi_state == TCP_CLOSE)
}

/// The socket's addresses, if it is a TCP socket over IPv4 or IPv6 with a peer.
pub fn tuple(fd: impl AsFd) -> io::Result<Tuple> {
    let fd = fd.as_fd();
    let plain = |a: rustix::net::SocketAddrAny| {
        SocketAddr::try_from(a).map_err(|_| io::Error::from(rustix::io::Errno::AFNOSUPPORT))
    };
    if rustix::net::sockopt::socket_type(fd)? != rustix::net::SocketType::STREAM {
        return Err(rustix::io::Errno::PROTOTYPE.into());
    }
    let local = plain(rustix::net::getsockname(fd)?)?;
    let remote = rustix::net::getpeername(fd)?;
    Ok(Tuple::new(local, plain(remote.ok_or(rustix::io::Errno::NOTCONN)?)?))
}

/// Process and user at the other end of a UNIX socket. The process is 0 if it lives in a namespace that we do not see.
pub fn peer_credentials(fd: impl AsFd) -> io::Result<(i32, u32)> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the pointers name `peer` and `len`, which outlive the call; the kernel writes at most `len` bytes.
    let got = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            std::ptr::from_mut(&mut peer).cast(),
            &raw mut len,
        )
    };
    if got == 0 { Ok((peer.pid, peer.uid)) } else { Err(io::Error::last_os_error()) }
}

/// Whether the process has never had a second thread (glibc's `__libc_single_threaded`, 2.32): then nothing happens to a
/// connection while a call waits in the kernel.
pub fn single_threaded() -> bool {
    static FLAG: OnceLock<usize> = OnceLock::new();
    // SAFETY: the name is a C string; the answer is null or the address of a variable that lives as long as the process.
    let flag = *FLAG.get_or_init(|| unsafe {
        libc::dlsym(libc::RTLD_DEFAULT, c"__libc_single_threaded".as_ptr()) as usize
    });
    let flag = std::ptr::with_exposed_provenance::<AtomicU8>(flag);
    // SAFETY: null, or one byte that glibc writes when a thread is made; any value is valid.
    unsafe { flag.as_ref() }.is_some_and(|flag| flag.load(Ordering::Relaxed) != 0)
}

/// Whether the machine has only one processor. Not: whether this process may use only one, as one that is pinned.
pub fn one_processor() -> bool {
    static ONE: OnceLock<bool> = OnceLock::new();
    // SAFETY: only asks.
    *ONE.get_or_init(|| unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) } == 1)
}

/// Whether a socket call without a time-out that a signal interrupted goes on by itself: every handler that could have run
/// has `SA_RESTART` (signal(7)). Those of faults do not count: they are no interruption.
pub fn calls_are_restarted() -> bool {
    const FAULTS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];
    (1..=libc::SIGRTMAX()).filter(|signal| !FAULTS.contains(signal)).all(|signal| {
        let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: only asks; the pointer names a structure of the right type, for which zero is valid too.
        let action = unsafe {
            libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
            action.assume_init()
        };
        let handled = action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN;
        !handled || action.sa_flags & libc::SA_RESTART != 0
    })
}

/// Aborts the connection: a reset goes out at once, whoever else holds a duplicate (`connect` to `AF_UNSPEC`).
pub fn abort(fd: impl AsFd) {
    let _ = rustix::net::connect_unspec(fd);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_counters_agree_with_what_was_moved() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut b, _) = listener.accept().unwrap();
        a.write_all(&[1; 1000]).unwrap();
        b.write_all(&[1; 50]).unwrap();
        b.read_exact(&mut [0; 300]).unwrap();
        a.read_exact(&mut [0; 50]).unwrap();
        let (ca, cb) = (counters(&a, true).unwrap().unwrap(), counters(&b, false).unwrap().unwrap());
        assert_eq!((ca.tx, ca.rx, cb.tx, cb.rx), (1000, 50, 50, 300));
        assert!(ca.established && cb.established);
        assert!(is_as_new(a.as_fd()) && is_as_new(b.as_fd()));
        assert_eq!((is_connector(&a).unwrap(), is_connector(&b).unwrap()), (Some(true), Some(false)));
        assert_eq!((counters_at_least(&a, true).unwrap(), counters_at_least(&b, false).unwrap()), (ca, cb));
        assert_eq!(tuple(&a).unwrap(), tuple(&b).unwrap().mirrored());
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        rustix::net::shutdown(&other, rustix::net::Shutdown::Read).unwrap();
        assert!(!is_as_new(other.as_fd()), "shut for reading");
        abort(&a);
        assert_eq!(b.read(&mut [0; 2000]).unwrap(), 700, "what had arrived stays readable");
        assert_eq!(b.read(&mut [0; 9]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
