//! Files and pipes into a connection and out of it.

use super::Group;
use crate::pair::Pair;
use crate::sys::{self, Ret, ret};
use libc::c_int;

// SAFETY, for all of the file: numbers, and offsets that outlive the calls.

fn sendfile(out: c_int, file: c_int, offset: Option<&mut i64>, n: usize) -> Ret {
    let at = offset.map_or(std::ptr::null_mut(), std::ptr::from_mut);
    ret(unsafe { libc::sendfile(out, file, at, n) })
}

fn splice(from: c_int, to: c_int, n: usize, flags: u32) -> Ret {
    let none = std::ptr::null_mut();
    ret(unsafe { libc::splice(from, none, to, none, n, flags) })
}

/// All of a file, in as many calls as it takes.
fn whole(p: &mut Pair, file: c_int, n: usize, mut call: impl FnMut(c_int, c_int, usize) -> Ret) {
    let mut done = 0;
    while done < n {
        let got = call(p.near, file, n - done);
        if got.0 <= 0 {
            p.call("stopped", got);
            return;
        }
        done += got.0 as usize;
    }
    p.note(format_args!("{done} sent"));
}

fn position(p: &mut Pair, file: c_int) {
    p.call("position", ret(unsafe { libc::lseek(file, 0, libc::SEEK_CUR) }));
}

pub fn group() -> Group {
    let mut group = Group::new("files");
    group.case("7.37", "sendfile/small, at its position", |p| {
        let file = sys::file(&p.next(100));
        p.call("sendfile", sendfile(p.near, file, None, 60));
        position(p, file);
        p.call("sendfile", sendfile(p.near, file, None, 60));
        p.call("sendfile", sendfile(p.near, file, None, 60));
        position(p, file);
        p.far_says("take", &[100]);
        sys::close(file);
    });
    group.case("7.37", "sendfile/at an offset", |p| {
        let file = sys::file(&p.next(100));
        for (mut at, n) in [(10, 20), (90, 20), (100, 5), (500, 5), (-1, 5), (0, 0)] {
            let got = sendfile(p.near, file, Some(&mut at), n);
            p.call(format_args!("sendfile to {at}"), got);
        }
        position(p, file);
        p.far_says("take", &[30]);
        sys::close(file);
    });
    group.case("7.37", "sendfile/much", |p| {
        let n = 3_000_000;
        let file = sys::file(&p.next(n));
        p.far("later take", &[n as i64]);
        whole(p, file, n, |out, file, n| sendfile(out, file, None, n));
        p.far_says("told", &[]);
        sys::close(file);
    });
    group.case("7.37", "sendfile/wrong ends", |p| {
        let file = sys::file(&[1; 10]);
        let pipe = sys::pipe();
        p.receives(5);
        p.call("from the socket", sendfile(file, p.near, None, 5));
        p.call("from itself", sendfile(p.near, p.near, None, 5));
        p.call("from a pipe", sendfile(p.near, pipe[0], None, 5));
        p.call("from nothing", sendfile(p.near, 3999, None, 5));
        p.call("to nothing", sendfile(3999, file, None, 5));
        p.recv(10, 0);
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
        sys::close(file);
    });
    group.case("7.37", "sendfile/blocking takes all of a file", |p| {
        let n = 600_000;
        let file = sys::file(&p.next(n));
        p.far("later take", &[n as i64]);
        p.call("sendfile", sendfile(p.near, file, None, n));
        p.far_says("told", &[]);
        sys::close(file);
    });
    group.case("7.37", "splice/pipe to socket", |p| {
        let pipe = sys::pipe();
        let data = p.next(50);
        unsafe { libc::write(pipe[1], data.as_ptr().cast(), 50) };
        p.call("splice", splice(pipe[0], p.near, 30, 0));
        p.call("splice", splice(pipe[0], p.near, 30, libc::SPLICE_F_MORE));
        p.call("splice", splice(pipe[0], p.near, 30, libc::SPLICE_F_NONBLOCK));
        p.far_says("take", &[50]);
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
    });
    group.case("7.37", "splice/socket to pipe", |p| {
        let pipe = sys::pipe();
        p.receives(50);
        p.call("splice", splice(p.near, pipe[1], 30, 0));
        p.call("splice", splice(p.near, pipe[1], 30, 0));
        sys::set_nonblocking(p.near, true);
        p.call("splice", splice(p.near, pipe[1], 30, libc::SPLICE_F_NONBLOCK));
        let mut room = [0; 64];
        let got = ret(unsafe { libc::read(pipe[0], room.as_mut_ptr().cast(), 64) });
        p.got("read", got, &room);
        p.far_says("shutdown", &[1]);
        p.until_end();
        p.call("splice", splice(p.near, pipe[1], 30, 0));
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
    });
    group.case("7.37", "splice/socket to full pipe", |p| {
        let pipe = sys::pipe();
        let mut all = [0; 65536];
        unsafe { libc::write(pipe[1], all.as_ptr().cast(), all.len()) };
        p.receives(50);
        p.call("splice", splice(p.near, pipe[1], 30, libc::SPLICE_F_NONBLOCK));
        unsafe { libc::read(pipe[0], all.as_mut_ptr().cast(), all.len()) };
        p.call("splice", splice(p.near, pipe[1], 30, libc::SPLICE_F_NONBLOCK));
        let got = ret(unsafe { libc::read(pipe[0], all.as_mut_ptr().cast(), 64) });
        p.got("read", got, &all);
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
    });
    group.case("7.37", "splice/socket to pipe, data comes later", |p| {
        let pipe = sys::pipe();
        p.far("later send", &[20, 0]);
        p.call("splice", splice(p.near, pipe[1], 64, 0));
        let mut room = [0; 64];
        let got = ret(unsafe { libc::read(pipe[0], room.as_mut_ptr().cast(), 64) });
        p.got("read", got, &room);
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
    });
    group.case("7.37", "splice/refusals", |p| {
        let pipe = sys::pipe();
        let file = sys::file(&[1; 10]);
        p.receives(5);
        p.call("no pipe", splice(p.near, file, 5, 0));
        p.call("file to socket", splice(file, p.near, 5, 0));
        let mut at = 0;
        let none = std::ptr::null_mut();
        let got = ret(unsafe { libc::splice(p.near, &raw mut at, pipe[1], none, 5, 0) });
        p.call("at an offset", got);
        p.call("nothing", splice(p.near, pipe[1], 0, 0));
        p.call("bad flags", splice(p.near, pipe[1], 5, 0x80));
        p.call("tee", ret(unsafe { libc::tee(p.near, pipe[1], 5, 0) }));
        let got = ret(unsafe { libc::copy_file_range(file, none, p.near, none, 5, 0) });
        p.call("copy_file_range", got);
        p.recv(10, 0);
        pipe.iter().for_each(|fd| {
            sys::close(*fd);
        });
        sys::close(file);
    });
    group
}
