//! Streams of stdio over a connection: libc's own reads and writes, that no hook sees, and libc's own close.

use super::Group;
use crate::pair::Pair;
use crate::sys::{self, ret};
use libc::FILE;

// SAFETY, for all of the file: the stream is open and the buffers outlive the calls.

fn open(p: &mut Pair, mode: &std::ffi::CStr) -> *mut FILE {
    let file = unsafe { libc::fdopen(p.near, mode.as_ptr()) };
    p.note(format_args!("fdopen {mode:?} {}", !file.is_null()));
    file
}

fn close(p: &mut Pair, file: *mut FILE) {
    let got = ret(unsafe { libc::fclose(file) });
    p.call("fclose", got);
    p.near = -1;
}

fn put(p: &mut Pair, file: *mut FILE, n: usize) {
    let data = p.next(n);
    let got = ret(unsafe { libc::fwrite(data.as_ptr().cast(), 1, n, file) } as isize);
    p.taken(got);
    p.call(format_args!("fwrite {n}"), got);
}

fn get(p: &mut Pair, file: *mut FILE, n: usize) {
    let mut room = vec![0u8; n];
    let got = ret(unsafe { libc::fread(room.as_mut_ptr().cast(), 1, n, file) } as isize);
    p.got(format_args!("fread {n}"), got, &room);
    let said = unsafe { (libc::feof(file) != 0, libc::ferror(file) != 0) };
    p.note(format_args!("{said:?}"));
}

pub fn group() -> Group {
    let mut group = Group::new("stdio");
    group.case("7.8", "fread/exactly, then the end", |p| {
        let file = open(p, c"r");
        p.far("later send", &[3000, 0]);
        get(p, file, 1000);
        get(p, file, 2000);
        p.far_says("shutdown", &[1]);
        get(p, file, 10);
        close(p, file);
    });
    group.case("7.8", "fwrite/flushed", |p| {
        let file = open(p, c"w");
        put(p, file, 100);
        p.call("fflush", ret(unsafe { libc::fflush(file) }));
        p.far_says("take", &[100]);
        put(p, file, 20_000);
        close(p, file);
        p.far_says("take", &[20_001]);
    });
    group.case("7.8", "fclose/flushes and ends", |p| {
        let file = open(p, c"r+");
        put(p, file, 50);
        close(p, file);
        p.far_says("take", &[51]);
    });
    group.case("7.8", "fprintf/and what was sent before and after", |p| {
        p.send(4, 0);
        let file = open(p, c"w");
        unsafe { libc::fprintf(file, c"%s %d\n".as_ptr(), c"text".as_ptr(), 42) };
        p.call("fflush", ret(unsafe { libc::fflush(file) }));
        p.send(4, 0);
        p.far_says("take", &[16]);
        close(p, file);
    });
    group.case("7.8", "dprintf/a line", |p| {
        let got = ret(unsafe { sys::dprintf(p.near, c"%s %d\n".as_ptr(), c"text".as_ptr(), 42) });
        p.call("dprintf", got);
        p.far_says("take", &[8]);
    });
    group.case("7.8", "dprintf/more arguments than registers", |p| {
        let format = c"%d %f %s %ld %e %d %d %d %g %d %f %f %f %f %f %f %f\n".as_ptr();
        let (s, d) = (c"seven".as_ptr(), 2.5f64);
        let got = unsafe {
            sys::dprintf(
                p.near,
                format,
                1,
                0.5f64,
                s,
                1i64 << 40,
                d,
                -3,
                4,
                5,
                1e30f64,
                6,
                d,
                d,
                d,
                d,
                d,
                d,
                9.25f64,
            )
        };
        p.call("dprintf", ret(got));
        let n = i64::from(got);
        p.far_says("take", &[n]);
    });
    group.case("7.8", "dprintf/much, checked, and after the end", |p| {
        p.far("later take", &[70_000]);
        let got = ret(unsafe { sys::__dprintf_chk(p.near, 1, c"%70000d".as_ptr(), 42) });
        p.call("dprintf", got);
        p.far_says("told", &[]);
        sys::shutdown(p.near, libc::SHUT_WR);
        let got = ret(unsafe { sys::dprintf(p.near, c"%d".as_ptr(), 42) });
        p.call("dprintf", got);
    });
    group.case("7.8", "getc/what was received before", |p| {
        p.receives(10);
        p.recv(4, 0);
        let file = open(p, c"r");
        let got = ret(unsafe { libc::fgetc(file) });
        p.call("fgetc", got);
        get(p, file, 5);
        close(p, file);
    });
    group.case("7.8", "fdopen/two streams, one for each way", |p| {
        let twin = unsafe { libc::dup(p.near) };
        let out = open(p, c"w");
        let back = unsafe { libc::fdopen(twin, c"r".as_ptr()) };
        put(p, out, 10);
        p.call("fflush", ret(unsafe { libc::fflush(out) }));
        p.far_says("take", &[10]);
        p.far_says("send", &[10, 0]);
        get(p, back, 10);
        close(p, out);
        p.call("fclose", ret(unsafe { libc::fclose(back) }));
        p.far_says("take", &[1]);
    });
    group.case("7.8", "fclose/the number is free", |p| {
        let fd = p.near;
        let file = open(p, c"r+");
        close(p, file);
        let next = sys::file(b"x");
        p.note(next == fd);
        let mut room = [0; 4];
        let got = ret(unsafe { libc::read(next, room.as_mut_ptr().cast(), 4) });
        p.got("read", got, &room);
        sys::close(next);
    });
    group
}
