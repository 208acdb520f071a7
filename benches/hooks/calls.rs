//! The calls that are measured. None waits; each leaves everything as it was.

use libc::{c_int, c_void};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

/// Name, and how many calls of libc one turn makes.
pub const ALL: &[(&str, usize)] = &[
    ("read, /dev/zero", 1),
    ("write, /dev/null", 1),
    ("readv, /dev/zero", 1),
    ("writev, /dev/null", 1),
    ("write and read, pipe", 2),
    ("send and recv, UNIX socket", 2),
    ("sendto and recvfrom, UNIX socket", 2),
    ("sendmsg and recvmsg, UNIX socket", 2),
    ("sendmmsg and recvmmsg, UNIX socket", 2),
    ("recv, nothing is there", 1),
    ("sendfile, from nowhere", 1),
    ("splice, no pipe", 1),
    ("poll, one pipe", 1),
    ("poll, 64 pipes", 1),
    ("poll, 64 pipes and a set", 1),
    ("ppoll, one pipe", 1),
    ("select, one pipe", 1),
    ("select, 64 pipes", 1),
    ("pselect, one pipe", 1),
    ("epoll_wait, one pipe", 1),
    ("epoll_pwait, one pipe", 1),
    ("epoll_ctl, one pipe", 1),
    ("fcntl F_GETFL", 1),
    ("fcntl F_SETFL", 1),
    ("fcntl F_DUPFD and close", 2),
    ("dup and close", 2),
    ("dup2", 1),
    ("close, not open", 1),
    ("ioctl FIONREAD", 1),
    ("getsockopt", 1),
    ("setsockopt", 1),
    ("shutdown, no socket", 1),
    ("socketpair and two closes", 3),
    ("syscall getppid", 1),
    ("syscall read, /dev/zero", 1),
];

/// What they are made on.
pub struct Calls {
    zero: c_int,
    null: c_int,
    /// Has nothing.
    pipe: [c_int; 2],
    /// Each has a byte.
    full: Vec<[c_int; 2]>,
    unix: [c_int; 2],
    set: c_int,
    spare: c_int,
    _connection: (TcpStream, TcpStream),
}

fn pair() -> [c_int; 2] {
    let mut ends = [0; 2];
    // SAFETY: room for two numbers.
    unsafe { libc::pipe(ends.as_mut_ptr()) };
    ends
}

fn opened(path: &std::ffi::CStr) -> c_int {
    // SAFETY: a C string.
    unsafe { libc::open(path.as_ptr(), libc::O_RDWR) }
}

impl Calls {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
        let far = listener.accept().expect("its other end").0;
        std::thread::spawn(std::thread::park);
        let full: Vec<_> = (0..64).map(|_| pair()).collect();
        let mut unix = [0; 2];
        let spare = near.as_raw_fd() + 500;
        // SAFETY: descriptors and buffers of this function.
        let set = unsafe {
            full.iter().for_each(|one| {
                libc::write(one[1], [1u8].as_ptr().cast(), 1);
            });
            libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, unix.as_mut_ptr());
            let set = libc::epoll_create1(0);
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 1 };
            libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, full[0][0], &raw mut event);
            set
        };
        let (zero, null) = (opened(c"/dev/zero"), opened(c"/dev/null"));
        Self { zero, null, pipe: pair(), full, unix, set, spare, _connection: (near, far) }
    }

    /// One turn of a call.
    pub fn make(&mut self, which: usize) {
        // SAFETY: descriptors of this structure; buffers that outlive the calls.
        unsafe { self.turn(ALL[which].0) }
    }

    unsafe fn turn(&mut self, name: &str) {
        let mut byte = [0u8; 1];
        let buf = byte.as_mut_ptr().cast::<c_void>();
        let mut iov = libc::iovec { iov_base: buf, iov_len: 1 };
        let [near, far] = self.unix;
        // SAFETY: as in `make`.
        unsafe {
            match name {
                "read, /dev/zero" => assert_eq!(libc::read(self.zero, buf, 1), 1),
                "write, /dev/null" => assert_eq!(libc::write(self.null, buf, 1), 1),
                "readv, /dev/zero" => assert_eq!(libc::readv(self.zero, &raw const iov, 1), 1),
                "writev, /dev/null" => assert_eq!(libc::writev(self.null, &raw const iov, 1), 1),
                "write and read, pipe" => {
                    assert_eq!(libc::write(self.pipe[1], buf, 1), 1);
                    assert_eq!(libc::read(self.pipe[0], buf, 1), 1);
                }
                "send and recv, UNIX socket" => {
                    assert_eq!(libc::send(near, buf, 1, 0), 1);
                    assert_eq!(libc::recv(far, buf, 1, 0), 1);
                }
                "sendto and recvfrom, UNIX socket" => {
                    let null = std::ptr::null_mut();
                    assert_eq!(libc::sendto(near, buf, 1, 0, std::ptr::null(), 0), 1);
                    assert_eq!(libc::recvfrom(far, buf, 1, 0, null, std::ptr::null_mut()), 1);
                }
                "sendmsg and recvmsg, UNIX socket" => {
                    let mut message = message(&mut iov);
                    assert_eq!(libc::sendmsg(near, &raw const message, 0), 1);
                    assert_eq!(libc::recvmsg(far, &raw mut message, 0), 1);
                }
                "sendmmsg and recvmmsg, UNIX socket" => {
                    let mut one = libc::mmsghdr { msg_hdr: message(&mut iov), msg_len: 0 };
                    assert_eq!(libc::sendmmsg(near, &raw mut one, 1, 0), 1);
                    assert_eq!(libc::recvmmsg(far, &raw mut one, 1, 0, std::ptr::null_mut()), 1);
                }
                "recv, nothing is there" => assert_eq!(libc::recv(far, buf, 1, libc::MSG_DONTWAIT), -1),
                "sendfile, from nowhere" => {
                    assert_eq!(libc::sendfile(self.null, -1, std::ptr::null_mut(), 1), -1);
                }
                "splice, no pipe" => {
                    let null = std::ptr::null_mut();
                    assert_eq!(libc::splice(self.zero, null, self.null, null, 1, 0), -1);
                }
                "poll, one pipe" => self.poll(1, |list, n| libc::poll(list, n, -1)),
                "poll, 64 pipes" => self.poll(64, |list, n| libc::poll(list, n, 1000)),
                "poll, 64 pipes and a set" => {
                    self.poll(65, |list, n| libc::poll(list, n, 1000));
                }
                "ppoll, one pipe" => {
                    let limit = libc::timespec { tv_sec: 1, tv_nsec: 0 };
                    self.poll(1, |list, n| libc::ppoll(list, n, &raw const limit, std::ptr::null()));
                }
                "select, one pipe" => self.select(1, |n, set| {
                    let (null, mut limit) = (std::ptr::null_mut(), libc::timeval { tv_sec: 1, tv_usec: 0 });
                    libc::select(n, set, null, null, &raw mut limit)
                }),
                "select, 64 pipes" => self.select(64, |n, set| {
                    libc::select(n, set, std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut())
                }),
                "pselect, one pipe" => self.select(1, |n, set| {
                    let null = std::ptr::null_mut();
                    libc::pselect(n, set, null, null, std::ptr::null(), std::ptr::null())
                }),
                "epoll_wait, one pipe" => {
                    let mut event = libc::epoll_event { events: 0, u64: 0 };
                    assert_eq!(libc::epoll_wait(self.set, &raw mut event, 1, 1000), 1);
                }
                "epoll_pwait, one pipe" => {
                    let mut event = libc::epoll_event { events: 0, u64: 0 };
                    assert_eq!(libc::epoll_pwait(self.set, &raw mut event, 1, -1, std::ptr::null()), 1);
                }
                "epoll_ctl, one pipe" => {
                    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 1 };
                    let fd = self.full[0][0];
                    assert_eq!(libc::epoll_ctl(self.set, libc::EPOLL_CTL_MOD, fd, &raw mut event), 0);
                }
                "fcntl F_GETFL" => assert!(libc::fcntl(self.zero, libc::F_GETFL) > 0),
                "fcntl F_SETFL" => assert_eq!(libc::fcntl(self.zero, libc::F_SETFL, libc::O_RDWR), 0),
                "fcntl F_DUPFD and close" => {
                    let new = libc::fcntl(self.zero, libc::F_DUPFD, 0);
                    assert_eq!(libc::close(new), 0);
                }
                "dup and close" => assert_eq!(libc::close(libc::dup(self.zero)), 0),
                "dup2" => assert_eq!(libc::dup2(self.zero, self.spare), self.spare),
                "close, not open" => assert_eq!(libc::close(self.spare + 1), -1),
                "ioctl FIONREAD" => {
                    let mut n: c_int = 0;
                    assert_eq!(libc::ioctl(self.pipe[0], libc::FIONREAD, &raw mut n), 0);
                }
                "getsockopt" => {
                    let (mut value, mut len): (c_int, _) = (0, 4);
                    let place = (&raw mut value).cast();
                    assert_eq!(
                        libc::getsockopt(near, libc::SOL_SOCKET, libc::SO_TYPE, place, &raw mut len),
                        0
                    );
                }
                "setsockopt" => {
                    let value: c_int = 1;
                    let place = (&raw const value).cast();
                    assert_eq!(libc::setsockopt(near, libc::SOL_SOCKET, libc::SO_PASSCRED, place, 4), 0);
                }
                "shutdown, no socket" => assert_eq!(libc::shutdown(self.zero, libc::SHUT_WR), -1),
                "socketpair and two closes" => {
                    let mut ends = [0; 2];
                    libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr());
                    ends.iter().for_each(|fd| assert_eq!(libc::close(*fd), 0));
                }
                "syscall getppid" => assert!(libc::syscall(libc::SYS_getppid) > 0),
                "syscall read, /dev/zero" => {
                    assert_eq!(libc::syscall(libc::SYS_read, self.zero, buf, 1usize), 1);
                }
                other => unreachable!("{other}"),
            }
        }
    }

    fn poll(&self, n: usize, call: impl Fn(*mut libc::pollfd, libc::nfds_t) -> c_int) {
        let mut list = [libc::pollfd { fd: self.set, events: libc::POLLIN, revents: 0 }; 65];
        list.iter_mut().zip(&self.full).for_each(|(one, pipe)| one.fd = pipe[0]);
        assert_eq!(call(list.as_mut_ptr(), n as libc::nfds_t), n as c_int);
    }

    fn select(&self, n: usize, call: impl Fn(c_int, *mut libc::fd_set) -> c_int) {
        // SAFETY: zero is an empty set; the numbers are small.
        let mut set: libc::fd_set = unsafe { std::mem::zeroed() };
        let mut last = 0;
        for one in &self.full[..n] {
            // SAFETY: as above.
            unsafe { libc::FD_SET(one[0], &raw mut set) };
            last = last.max(one[0]);
        }
        assert_eq!(call(last + 1, &raw mut set), n as c_int);
    }
}

fn message(iov: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: zero is a message of nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (iov, 1);
    message
}
