//! Numbers and what they name: duplicates, modes, ioctls, and calls that are for files.

use super::Group;
use crate::pair::Pair;
use crate::sys::{self, Ret, ret};
use libc::c_int;

/// Ways to make a second number for the same connection.
// SAFETY, for all: numbers.
const TWINS: [(&str, fn(c_int) -> Ret); 7] = [
    ("dup", |fd| ret(unsafe { libc::dup(fd) })),
    ("dup2", |fd| ret(unsafe { libc::dup2(fd, 700) })),
    ("dup3", |fd| ret(unsafe { libc::dup3(fd, 701, libc::O_CLOEXEC) })),
    ("F_DUPFD", |fd| sys::fcntl(fd, libc::F_DUPFD, 600)),
    ("F_DUPFD_CLOEXEC", |fd| sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, 600)),
    ("syscall-dup", |fd| ret(unsafe { libc::syscall(libc::SYS_dup, fd) })),
    ("syscall-fcntl", |fd| ret(unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_DUPFD, 600) })),
];

fn through(p: &mut Pair, fd: c_int) {
    let data = p.next(12);
    let got = sys::send(fd, &data, 0);
    p.taken(got);
    p.call("send", got);
    p.far_says("take", &[12]);
    p.receives(8);
    let mut room = [0; 20];
    let got = sys::recv(fd, &mut room, 0);
    p.got("recv", got, &room);
}

/// Ways to change the mode.
const MODES: [(&str, fn(c_int)); 4] = [
    ("F_SETFL", |fd| sys::set_nonblocking(fd, true)),
    ("FIONBIO", |fd| {
        sys::ioctl(fd, libc::FIONBIO, &mut 1);
    }),
    ("syscall-fcntl", |fd| unsafe {
        libc::syscall(libc::SYS_fcntl, fd, libc::F_SETFL, libc::O_NONBLOCK);
    }),
    ("syscall-ioctl", |fd| unsafe {
        let on: c_int = 1;
        libc::syscall(libc::SYS_ioctl, fd, libc::FIONBIO, &raw const on);
    }),
];

/// `ioctl`s that tell a number of bytes.
fn counts(p: &mut Pair) {
    for (name, request) in [("FIONREAD", libc::FIONREAD), ("SIOCATMARK", 0x8905), ("no such", 0x1234)] {
        let mut n = -7;
        let got = sys::ioctl(p.near, request, &mut n);
        p.call(format_args!("{name} {n}"), got);
    }
}

pub fn group() -> Group {
    let mut group = Group::new("descriptors");
    for (name, twin) in TWINS {
        group.case("7.10", &format!("{name}/both numbers serve"), move |p| {
            let other = twin(p.near).0 as c_int;
            through(p, other);
            let near = p.near;
            through(p, near);
            p.call("close", sys::close(other));
            through(p, near);
        });
        group.case("7.10", &format!("{name}/the first is closed"), move |p| {
            let other = twin(p.near).0 as c_int;
            let got = sys::close(p.near);
            p.call("close", got);
            p.near = other;
            through(p, other);
            p.far_says("shutdown", &[1]);
            p.take(1);
        });
        group.case("7.26", &format!("{name}/the mode is shared"), move |p| {
            let other = twin(p.near).0 as c_int;
            p.recv(5, libc::MSG_DONTWAIT);
            sys::set_nonblocking(other, true);
            p.recv(5, 0);
            sys::close(other);
        });
    }
    for (name, set) in MODES {
        group.case("7.26", &format!("{name}/non-blocking, and back"), move |p| {
            p.recv(5, libc::MSG_DONTWAIT);
            set(p.near);
            p.recv(5, 0);
            p.call("F_GETFL", sys::fcntl(p.near, libc::F_GETFL, 0));
            sys::set_nonblocking(p.near, false);
            p.far("later send", &[5, 0]);
            p.recv(5, 0);
        });
    }
    group.case("7.36", "FIONREAD/as bytes come and go", |p| {
        counts(p);
        p.receives(30);
        counts(p);
        p.recv(10, 0);
        counts(p);
        p.recv(10, libc::MSG_PEEK);
        counts(p);
        p.recv(30, 0);
        counts(p);
        p.far_says("shutdown", &[1]);
        p.until_end();
        counts(p);
    });
    group.case("7.36", "FIONREAD/syscall", |p| {
        p.receives(30);
        let mut n: c_int = -1;
        let got = ret(unsafe { libc::syscall(libc::SYS_ioctl, p.near, libc::FIONREAD, &raw mut n) });
        p.call(format_args!("FIONREAD {n}"), got);
    });
    group.case("7.36", "SIOCOUTQ/comes down to nothing", |p| {
        p.send(100, 0);
        p.far_says("take", &[100]);
        let near = p.near;
        let empty = sys::soon(|| {
            let mut n = -1;
            sys::ioctl(near, libc::TIOCOUTQ, &mut n).0 == 0 && n == 0
        });
        p.note(empty);
    });
    group
        .case("7.36", "SIOCOUTQ/much that nobody takes", |p| {
            p.fill();
            let mut n = -1;
            let got = sys::ioctl(p.near, libc::TIOCOUTQ, &mut n);
            p.call(format_args!("SIOCOUTQ {}", n > 0), got);
        })
        .open = Some("what lies in a ring counts as received, as it does in the far kernel's buffer");
    group.case("7.10", "dup2/onto the connection", |p| {
        let file = sys::file(b"a file's bytes");
        let got = ret(unsafe { libc::dup2(file, p.near) });
        p.note(got.0 == p.near as isize);
        let mut room = [0; 20];
        let got = ret(unsafe { libc::read(p.near, room.as_mut_ptr().cast(), 20) });
        p.got("read", got, &room);
        p.far_says("take", &[1]);
        sys::close(file);
    });
    group.case("7.10", "dup2/onto itself, and bad numbers", |p| {
        let same = ret(unsafe { libc::dup2(p.near, p.near) });
        p.note(same.0 == p.near as isize);
        for got in unsafe {
            [ret(libc::dup3(p.near, p.near, 0)), ret(libc::dup2(3999, p.near)), ret(libc::dup2(p.near, -1))]
        } {
            p.call("dup", got);
        }
        let near = p.near;
        through(p, near);
    });
    group.case("7.12", "close_range/the connection among others", |p| {
        let fd = sys::fcntl(p.near, libc::F_DUPFD, 500).0 as c_int;
        sys::close(p.near);
        p.near = -1;
        let got = ret(unsafe { libc::close_range(400, 899, 0) });
        p.call("close_range", got);
        p.call("close", sys::close(fd));
        p.far_says("take", &[1]);
    });
    group.case("7.12", "close_range/only CLOEXEC", |p| {
        let fd = p.near as u32;
        let got = ret(unsafe { libc::close_range(fd, fd, libc::CLOSE_RANGE_CLOEXEC as c_int) });
        p.call("close_range", got);
        p.call("F_GETFD", sys::fcntl(p.near, libc::F_GETFD, 0));
        let near = p.near;
        through(p, near);
    });
    group.case("7.4", "syscall-close/the far end hears", |p| {
        p.send(10, 0);
        let got = ret(unsafe { libc::syscall(libc::SYS_close, p.near) });
        p.call("close", got);
        p.near = -1;
        p.far_says("take", &[11]);
    });
    group.case("7.4", "syscall-shutdown/the far end hears", |p| {
        p.send(10, 0);
        let got = ret(unsafe { libc::syscall(libc::SYS_shutdown, p.near, libc::SHUT_WR) });
        p.call("shutdown", got);
        p.far_says("take", &[11]);
        p.receives(4);
        p.recv(10, 0);
    });
    group.case("7.9", "numbers/the lowest is used again", |p| {
        let fd = p.near;
        sys::close(fd);
        let next = ret(unsafe { libc::dup(1) });
        p.note(next.0 == fd as isize);
        sys::close(next.0 as c_int);
        p.near = -1;
    });
    group.case("7.9", "numbers/a file under the number of a connection", |p| {
        let fd = p.near;
        p.send(3, 0);
        sys::close(fd);
        let file = sys::file(b"not a socket");
        p.note(file == fd);
        let mut room = [0; 20];
        let got = ret(unsafe { libc::read(file, room.as_mut_ptr().cast(), 20) });
        p.got("read", got, &room);
        p.call("recv", sys::recv(file, &mut room, 0));
        p.near = file;
    });
    group.case("7.44", "identity/fstat", |p| {
        // SAFETY: zero is a valid stat.
        let (got, mode) = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            (ret(libc::fstat(p.near, &raw mut stat)), stat.st_mode)
        };
        p.call(format_args!("fstat {}", mode & libc::S_IFMT == libc::S_IFSOCK), got);
    });
    group.case("7.43", "file calls/on a socket", |p| {
        let mut room = [0u8; 8];
        let at = room.as_mut_ptr().cast();
        let list = [libc::iovec { iov_base: at, iov_len: 8 }];
        p.receives(4);
        let calls = unsafe {
            [
                ("lseek", ret(libc::lseek(p.near, 0, libc::SEEK_CUR))),
                ("pread", ret(libc::pread(p.near, at, 8, 0))),
                ("pwrite", ret(libc::pwrite(p.near, at, 8, 0))),
                ("preadv", ret(libc::preadv(p.near, list.as_ptr(), 1, 0))),
                ("preadv2 at 0", ret(libc::preadv2(p.near, list.as_ptr(), 1, 0, 0))),
                ("preadv2 bad flags", ret(libc::preadv2(p.near, list.as_ptr(), 1, -1, 1 << 20))),
                ("pwritev2 at 0", ret(libc::pwritev2(p.near, list.as_ptr(), 1, 0, 0))),
                ("ftruncate", ret(libc::ftruncate(p.near, 0))),
                ("fsync", ret(libc::fsync(p.near))),
                ("fallocate", ret(libc::fallocate(p.near, 0, 0, 8))),
            ]
        };
        for (what, got) in calls {
            p.call(what, got);
        }
        p.recv(10, 0);
    });
    group.case("7.43", "preadv2/RWF_NOWAIT", |p| {
        let mut room = [0u8; 8];
        let list = [libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: 8 }];
        let got = ret(unsafe { libc::preadv2(p.near, list.as_ptr(), 1, -1, libc::RWF_NOWAIT) });
        p.call("preadv2", got);
        p.receives(4);
        let got = ret(unsafe { libc::preadv2(p.near, list.as_ptr(), 1, -1, libc::RWF_NOWAIT) });
        p.got("preadv2", got, &room);
    });
    group.case("7.11", "closed/every call says so", |p| {
        let fd = p.near;
        sys::close(fd);
        p.near = -1;
        for (what, got) in [
            ("recv", sys::recv(fd, &mut [0; 4], 0)),
            ("send", sys::send(fd, &[0; 4], 0)),
            ("shutdown", sys::shutdown(fd, 1)),
            ("poll", sys::poll(fd, libc::POLLIN, 0).0),
            ("fcntl", sys::fcntl(fd, libc::F_GETFL, 0)),
            ("dup", ret(unsafe { libc::dup(fd) })),
        ] {
            p.call(what, got);
        }
    });
    group.case("7.39", "F_SETOWN/told again", |p| {
        p.call("F_SETOWN", sys::fcntl(p.near, libc::F_SETOWN, 1));
        p.call("F_GETOWN", sys::fcntl(p.near, libc::F_GETOWN, 0));
    });
    group
}
