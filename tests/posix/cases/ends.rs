//! How a connection ends: half-close, close, reset, and what is left in the pipes.

use super::Group;
use crate::pair::Pair;
use crate::sys;
use libc::c_int;

fn shut(p: &mut Pair, how: c_int) {
    let got = sys::shutdown(p.near, how);
    p.call(format_args!("shutdown {how}"), got);
}

fn close(p: &mut Pair) {
    let got = sys::close(p.near);
    p.call("close", got);
    p.near = -1;
}

/// What is said afterwards at both ends.
fn afterwards(p: &mut Pair) {
    p.polled(libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP);
    p.recv(8, libc::MSG_DONTWAIT);
    p.recv(8, libc::MSG_DONTWAIT);
    p.send(4, libc::MSG_NOSIGNAL);
    p.polled(libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP);
}

pub fn group() -> Group {
    let mut group = Group::new("ends");
    for (name, how) in [("RD", libc::SHUT_RD), ("WR", libc::SHUT_WR), ("RDWR", libc::SHUT_RDWR)] {
        group.case("7.32", &format!("shutdown {name}/idle"), move |p| {
            shut(p, how);
            afterwards(p);
            shut(p, how);
        });
        group.case("7.32", &format!("shutdown {name}/data both ways"), move |p| {
            p.receives(20);
            p.send(30, 0);
            shut(p, how);
            p.far_says("take", &[30]);
            afterwards(p);
        });
        group.case("7.32", &format!("shutdown {name}/the far end has shut"), move |p| {
            p.far_says("shutdown", &[1]);
            p.until_end();
            shut(p, how);
            p.polled(libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP);
            p.recv(8, 0);
        });
        group.case("7.32", &format!("shutdown {name}/after a reset"), move |p| {
            p.far_says("reset", &[]);
            p.until_reset();
            shut(p, how);
            p.recv(8, libc::MSG_DONTWAIT);
            shut(p, how);
        });
    }
    group.case("7.32", "shutdown/no such way", |p| {
        shut(p, 3);
        shut(p, -1);
        p.send(4, 0);
        p.far_says("take", &[4]);
    });
    group.case("7.32", "shutdown WR/much before it", |p| {
        p.far("later take", &[3_000_000]);
        p.send(2_000_000, 0);
        shut(p, libc::SHUT_WR);
        p.far_says("told", &[]);
        p.far_says("send", &[9, 0]);
        p.take(9);
        p.far_says("close", &[]);
        p.take(1);
    });
    group.case("7.32", "shutdown RD/the far end goes on sending", |p| {
        shut(p, libc::SHUT_RD);
        p.far_says("send", &[10, 0]);
        p.arrived(10);
        p.recv(8, 0);
        p.send(10, 0);
        p.far_says("take", &[10]);
    });
    group.case("7.32", "shutdown WR/then the answer", |p| {
        p.send(10, 0);
        shut(p, libc::SHUT_WR);
        p.far_says("take", &[11]);
        p.far_says("send", &[2000, 0]);
        p.far_says("close", &[]);
        p.take(2001);
        p.polled(libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP);
    });
    group.case("7.11", "close/everything is read", |p| {
        p.send(10, 0);
        close(p);
        p.far_says("take", &[11]);
    });
    group.case("7.11", "close/much under way", |p| {
        p.far("later take", &[3_000_000]);
        p.send(2_000_000, 0);
        close(p);
        p.far_says("told", &[]);
    });
    group.case("7.11", "close/unread data", |p| {
        p.receives(10);
        close(p);
        p.far_says("wait", &[libc::POLLERR.into(), 4000]);
        p.far_says("recv", &[8, libc::MSG_DONTWAIT.into()]);
        p.far_says("recv", &[8, libc::MSG_DONTWAIT.into()]);
    });
    group
        .case("7.11", "close/the far end sends afterwards", |p| {
            close(p);
            p.far_says("wait", &[libc::POLLRDHUP.into(), 4000]);
            p.far_says("send", &[10, 0]);
            p.far_says("wait", &[libc::POLLERR.into(), 4000]);
            p.far_says("recv", &[8, libc::MSG_DONTWAIT.into()]);
            p.far_says("recv", &[8, libc::MSG_DONTWAIT.into()]);
        })
        .open = Some("on a fabric lane a sender hears of its bytes' fate later than from the kernel");
    group.case("7.11", "close/twice", |p| {
        let fd = p.near;
        close(p);
        let got = sys::close(fd);
        p.call("close", got);
    });
    group.case("7.33", "close/linger 0", |p| {
        p.send(10, 0);
        p.far("arrived", &[10]);
        sys::set_linger(p.near, 1, 0);
        close(p);
        p.far_says("wait", &[libc::POLLERR.into(), 4000]);
    });
    group.case("7.33", "close/linger some seconds", |p| {
        sys::set_linger(p.near, 1, 4);
        p.send(10, 0);
        close(p);
        p.far_says("take", &[11]);
    });
    group.case("7.33", "the far end/reset with data unread here", |p| {
        p.receives(10);
        p.far_says("reset", &[]);
        p.until_reset();
        afterwards(p);
    });
    group.case("7.33", "the far end/reset while this end sends", |p| {
        // Beforehand: it takes a while, and the reset is to meet a sender that waits.
        let data = vec![1; 64 << 20];
        p.far("later reset", &[]);
        let got = sys::send(p.near, &data, libc::MSG_NOSIGNAL);
        p.note(format_args!("all of it: {}", got.0 == data.len() as isize));
        p.until(libc::POLLHUP);
        p.recv(8, libc::MSG_DONTWAIT);
        p.recv(8, libc::MSG_DONTWAIT);
        p.send(8, libc::MSG_NOSIGNAL);
    });
    group.case("7.33", "the far end/reset while this end waits", |p| {
        p.far("later reset", &[]);
        p.recv(8, 0);
        p.recv(8, 0);
    });
    group
        .case("7.11", "the far end/closes, then this end sends twice", |p| {
            p.far_says("close", &[]);
            p.until_end();
            p.send(5, libc::MSG_NOSIGNAL);
            p.until_reset();
            p.polled(libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP);
            p.send(5, libc::MSG_NOSIGNAL);
            p.recv(8, 0);
            p.recv(8, 0);
        })
        .open = Some("on a fabric lane a sender hears of its bytes' fate later than from the kernel");
    group.case("7.11", "the far end/closes with data under way here", |p| {
        p.receives(10);
        p.far_says("close", &[]);
        p.until_end();
        p.polled(libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP);
        p.take(11);
    });
    group.case("7.11", "the far end/shuts, then closes with unread data", |p| {
        p.send(10, 0);
        p.far("arrived", &[10]);
        p.far_says("shutdown", &[libc::SHUT_WR.into()]);
        p.until_end();
        p.far_says("close", &[]);
        p.until_reset();
        p.recv(8, 0);
        p.send(5, libc::MSG_NOSIGNAL);
        p.send(5, libc::MSG_NOSIGNAL);
        p.recv(8, 0);
    });
    group.case("7.11", "the far end/closes with unread data of who has shut", |p| {
        p.send(10, 0);
        p.far("arrived", &[10]);
        shut(p, libc::SHUT_WR);
        p.far_says("close", &[]);
        p.until_reset();
        p.send(5, libc::MSG_NOSIGNAL);
        p.send(5, libc::MSG_NOSIGNAL);
        p.recv(8, 0);
    });
    group.case("7.32", "shutdown WR/then nothing is written", |p| {
        shut(p, libc::SHUT_WR);
        let list = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }];
        // SAFETY: the list outlives the calls, and names no byte.
        let (list, plain) = unsafe {
            (
                sys::ret(libc::writev(p.near, list.as_ptr(), 1)),
                sys::ret(libc::write(p.near, [0u8; 1].as_ptr().cast(), 0)),
            )
        };
        p.call("writev", list);
        p.call("write", plain);
    });
    group.case("7.11", "the far end/closes with unread data", |p| {
        p.send(10, 0);
        p.far("arrived", &[10]);
        p.far_says("close", &[]);
        p.until_reset();
        afterwards(p);
    });
    group
}
