//! The calls that the cases make: through libc's symbols, as any program's, with errno kept beside what was returned.
//!
//! All memory handed over belongs to the caller of a function here and outlives the call.

use libc::{c_int, c_void};
use std::ffi::CString;
use std::time::{Duration, Instant};

/// A call's answer: what it returned, and errno if that was -1.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ret(pub isize, pub i32);

/// The answer of a call that has just returned `value`.
pub fn ret(value: impl TryInto<isize>) -> Ret {
    let value = value.try_into().unwrap_or(isize::MIN);
    let errno = if value == -1 { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 };
    Ret(value, errno)
}

impl std::fmt::Display for Ret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self(-1, errno) => f.write_str(&error_name(*errno)),
            Self(value, _) => write!(f, "{value}"),
        }
    }
}

/// The name of an errno.
pub fn error_name(errno: i32) -> String {
    // SAFETY: the answer is null or a constant string; glibc 2.32.
    let name = unsafe { strerrorname_np(errno).as_ref().map(|c| std::ffi::CStr::from_ptr(c)) };
    name.map_or_else(|| format!("errno {errno}"), |name| name.to_string_lossy().into_owned())
}

unsafe extern "C" {
    fn strerrorname_np(errno: c_int) -> *const libc::c_char;
    pub fn __read_chk(fd: c_int, buf: *mut c_void, n: usize, room: usize) -> isize;
    pub fn __recv_chk(fd: c_int, buf: *mut c_void, n: usize, room: usize, flags: c_int) -> isize;
    pub fn __recvfrom_chk(
        fd: c_int,
        buf: *mut c_void,
        n: usize,
        room: usize,
        flags: c_int,
        from: *mut libc::sockaddr,
        len: *mut libc::socklen_t,
    ) -> isize;
    pub fn __poll_chk(fds: *mut libc::pollfd, n: libc::nfds_t, timeout: c_int, room: usize) -> c_int;
    pub fn __dprintf_chk(fd: c_int, flag: c_int, format: *const libc::c_char, ...) -> c_int;
    pub fn dprintf(fd: c_int, format: *const libc::c_char, ...) -> c_int;
}

/// Byte `at` of the stream in one direction.
pub fn byte(direction: u8, at: u64) -> u8 {
    let mixed = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(direction) << 32;
    (mixed >> 29) as u8
}

/// Bytes from `at` on.
pub fn pattern(direction: u8, at: u64, n: usize) -> Vec<u8> {
    (at..at + n as u64).map(|at| byte(direction, at)).collect()
}

/// Data in a trace: short ones as they are, long ones by their sum.
pub fn show(data: &[u8]) -> String {
    if data.len() <= 16 {
        return data.iter().map(|b| format!("{b:02x}")).collect();
    }
    let sum =
        data.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    format!("#{sum:016x}")
}

pub fn close(fd: c_int) -> Ret {
    // SAFETY: a number; what is not open gives EBADF.
    ret(unsafe { libc::close(fd) })
}

pub fn send(fd: c_int, data: &[u8], flags: c_int) -> Ret {
    // SAFETY: see the module.
    ret(unsafe { libc::send(fd, data.as_ptr().cast(), data.len(), flags) })
}

pub fn recv(fd: c_int, room: &mut [u8], flags: c_int) -> Ret {
    // SAFETY: see the module.
    ret(unsafe { libc::recv(fd, room.as_mut_ptr().cast(), room.len(), flags) })
}

pub fn shutdown(fd: c_int, how: c_int) -> Ret {
    // SAFETY: numbers.
    ret(unsafe { libc::shutdown(fd, how) })
}

pub fn fcntl(fd: c_int, command: c_int, argument: c_int) -> Ret {
    // SAFETY: only commands that take a number.
    ret(unsafe { libc::fcntl(fd, command, argument) })
}

/// `ioctl` that stores, and may read, an int.
pub fn ioctl(fd: c_int, request: libc::c_ulong, value: &mut c_int) -> Ret {
    // SAFETY: see the module.
    ret(unsafe { libc::ioctl(fd, request, std::ptr::from_mut(value)) })
}

pub fn set_option(fd: c_int, level: c_int, name: c_int, value: c_int) -> Ret {
    set_option_bytes(fd, level, name, &value.to_ne_bytes())
}

pub fn set_option_bytes(fd: c_int, level: c_int, name: c_int, value: &[u8]) -> Ret {
    let len = value.len() as libc::socklen_t;
    // SAFETY: see the module.
    ret(unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), len) })
}

/// The answer, and the bytes stored.
pub fn option(fd: c_int, level: c_int, name: c_int, room: usize) -> (Ret, Vec<u8>) {
    let mut value = vec![0u8; room];
    let mut len = room as libc::socklen_t;
    // SAFETY: see the module.
    let got = ret(unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &raw mut len) });
    value.truncate(len as usize);
    (got, value)
}

/// `SO_RCVTIMEO` or `SO_SNDTIMEO`.
pub fn set_timeout(fd: c_int, name: c_int, milliseconds: i64) -> Ret {
    let value = [milliseconds / 1000, milliseconds % 1000 * 1000];
    set_option_bytes(fd, libc::SOL_SOCKET, name, &value.map(i64::to_ne_bytes).concat())
}

pub fn set_linger(fd: c_int, on: c_int, seconds: c_int) -> Ret {
    set_option_bytes(
        fd,
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &[on.to_ne_bytes(), seconds.to_ne_bytes()].concat(),
    )
}

pub fn set_nonblocking(fd: c_int, on: bool) {
    let flags = fcntl(fd, libc::F_GETFL, 0).0 as c_int;
    let flags = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
    fcntl(fd, libc::F_SETFL, flags);
}

/// One descriptor, polled.
pub fn poll(fd: c_int, events: i16, milliseconds: c_int) -> (Ret, i16) {
    let mut one = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: see the module.
    let got = ret(unsafe { libc::poll(&raw mut one, 1, milliseconds) });
    (got, one.revents)
}

/// Bytes that can be read now, if the descriptor says.
pub fn unread(fd: c_int) -> usize {
    let mut n = 0;
    if ioctl(fd, libc::FIONREAD, &mut n).0 == 0 { n.max(0) as usize } else { 0 }
}

/// Longest wait for something that has to come.
pub const SOON: Duration = Duration::from_secs(4);

/// Looks until it holds; false if it does not come to.
pub fn soon(mut holds: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + SOON;
    while !holds() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}

/// An address for `connect`, `bind` and the like.
pub fn address(text: &str) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: zero is a valid address of no family.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let len = match text.parse::<std::net::SocketAddr>().expect("an address and a port") {
        std::net::SocketAddr::V4(a) => {
            let to = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: a.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(a.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is large and aligned enough for each kind.
            unsafe { std::ptr::from_mut(&mut storage).cast::<libc::sockaddr_in>().write(to) };
            size_of::<libc::sockaddr_in>()
        }
        std::net::SocketAddr::V6(a) => {
            let to = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: a.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: a.ip().octets() },
                sin6_scope_id: 0,
            };
            // SAFETY: as above.
            unsafe { std::ptr::from_mut(&mut storage).cast::<libc::sockaddr_in6>().write(to) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, len as libc::socklen_t)
}

/// A TCP socket of the family of an address.
pub fn socket(text: &str, flags: c_int) -> c_int {
    let family = if text.starts_with('[') { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: numbers.
    unsafe { libc::socket(family, libc::SOCK_STREAM | flags, 0) }
}

pub fn connect(fd: c_int, text: &str) -> Ret {
    let (to, len) = address(text);
    // SAFETY: see the module.
    ret(unsafe { libc::connect(fd, std::ptr::from_ref(&to).cast(), len) })
}

pub fn bind(fd: c_int, text: &str) -> Ret {
    let (at, len) = address(text);
    // SAFETY: see the module.
    ret(unsafe { libc::bind(fd, std::ptr::from_ref(&at).cast(), len) })
}

pub fn listen(fd: c_int, backlog: c_int) -> Ret {
    // SAFETY: numbers.
    ret(unsafe { libc::listen(fd, backlog) })
}

/// A listener at an address; port 0 is any.
pub fn listener(text: &str, backlog: c_int) -> c_int {
    let fd = socket(text, libc::SOCK_CLOEXEC);
    set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
    let bound = bind(fd, text);
    assert_eq!(bound.0, 0, "bind {text}: {bound}");
    assert_eq!(listen(fd, backlog).0, 0);
    fd
}

/// A socket that is bound to a port of the kernel's choice, and does not hear of resets until [`hear_resets`]: its SYN to
/// a port where nobody is yet stays out, so that the SYN of who comes there meets it.
pub fn early(text: &str) -> c_int {
    let fd = socket(text, libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
    let bound = bind(fd, text);
    assert_eq!(bound.0, 0, "bind {text}: {bound}");
    // At the TCP header: the byte of flags; if RST is among them nothing of the segment is taken, else all.
    let op = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut code = [
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 13),
        op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, 4),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    let len = size_of_val(&program) as libc::socklen_t;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
    // SAFETY: the program and its instructions outlive the call.
    let got = ret(unsafe { libc::setsockopt(fd, level, option, std::ptr::from_ref(&program).cast(), len) });
    assert_eq!(got.0, 0, "a filter: {got}");
    fd
}

/// It is a socket as any other from now on.
pub fn hear_resets(fd: c_int) {
    set_option(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0);
    set_nonblocking(fd, false);
}

pub fn accept(fd: c_int, flags: c_int) -> Ret {
    // SAFETY: null is allowed for both.
    ret(unsafe { libc::accept4(fd, std::ptr::null_mut(), std::ptr::null_mut(), flags) })
}

/// `getsockname` or `getpeername`, as text.
pub fn name(fd: c_int, peer: bool) -> String {
    // SAFETY: zero is a valid address of no family.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    let call = if peer { libc::getpeername } else { libc::getsockname };
    // SAFETY: see the module.
    let got = ret(unsafe { call(fd, std::ptr::from_mut(&mut storage).cast(), &raw mut len) });
    if got.0 != 0 {
        return got.to_string();
    }
    if c_int::from(storage.ss_family) == libc::AF_INET {
        // SAFETY: the kernel stored one of this family.
        let a = unsafe { std::ptr::from_ref(&storage).cast::<libc::sockaddr_in>().read() };
        let ip = std::net::Ipv4Addr::from(a.sin_addr.s_addr.to_ne_bytes());
        return format!("{ip}:{}", u16::from_be(a.sin_port));
    }
    // SAFETY: the kernel stored one of this family.
    let a = unsafe { std::ptr::from_ref(&storage).cast::<libc::sockaddr_in6>().read() };
    format!("[{}]:{}", std::net::Ipv6Addr::from(a.sin6_addr.s6_addr), u16::from_be(a.sin6_port))
}

/// A pipe: its reading and its writing end.
pub fn pipe() -> [c_int; 2] {
    let mut ends = [0; 2];
    // SAFETY: see the module.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    ends
}

/// A file with these bytes, without a name.
pub fn file(data: &[u8]) -> c_int {
    let name = CString::new("posix").expect("no zero in it");
    // SAFETY: a valid name; then see the module.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        assert_eq!(libc::write(fd, data.as_ptr().cast(), data.len()), data.len() as isize);
        libc::lseek(fd, 0, libc::SEEK_SET);
        fd
    }
}
