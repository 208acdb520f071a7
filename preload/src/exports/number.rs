//! `syscall(2)`: the numbers of the calls that have hooks are served as those; libuv and others make them so.

use super::control;
use super::{exec as run, lifetime as life, readiness as ready, transfer as data, unseen};
use crate::hook::Next;
use libc::{c_int, c_long, c_uint, sigset_t};
use vsocket_frontend::program::cancel::Held;
use vsocket_frontend::program::{client, socket};

static SYSCALL: Next = Next::new(c"syscall");
type Syscall = unsafe extern "C-unwind" fn(c_long, ...) -> c_long;

/// What `pselect6` is given in place of a signal mask.
#[repr(C)]
struct Masked {
    mask: *const sigset_t,
    size: usize,
}

/// `syscall(2)`. It takes as many arguments as the call with the most.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn syscall(
    number: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> c_long {
    // SAFETY: the application's arguments, of the call that it names.
    unsafe {
        let moves = moves_data(number);
        if !moves || socket::is_followed(a as c_int) {
            // The calls themselves are cancellation points; `syscall` is none.
            let _held = (moves || waits(number)).then(Held::now);
            if let Some(done) = served(number, [a, b, c, d, e, f]) {
                return done;
            }
        }
        // SAFETY: the symbol is syscall, of this type.
        let real: Syscall = std::mem::transmute(SYSCALL.get());
        real(number, a, b, c, d, e, f)
    }
}

/// Whether it is a call that moves data of the descriptor that it names first.
fn moves_data(number: c_long) -> bool {
    matches!(
        number,
        libc::SYS_read
            | libc::SYS_write
            | libc::SYS_readv
            | libc::SYS_writev
            | libc::SYS_recvfrom
            | libc::SYS_sendto
            | libc::SYS_recvmsg
            | libc::SYS_sendmsg
            | libc::SYS_recvmmsg
            | libc::SYS_sendmmsg
    )
}

/// Whether it waits for descriptors, or for a connection.
fn waits(number: c_long) -> bool {
    #[cfg(target_arch = "x86_64")]
    if matches!(number, libc::SYS_poll | libc::SYS_select | libc::SYS_epoll_wait) {
        return true;
    }
    matches!(
        number,
        libc::SYS_ppoll
            | libc::SYS_pselect6
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_connect
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_splice
            | libc::SYS_close
            | libc::SYS_fcntl
    )
}

/// A number with a hook; `None` for others.
unsafe fn served(number: c_long, [a, b, c, d, e, f]: [usize; 6]) -> Option<c_long> {
    let fd = a as c_int;
    // SAFETY: as in `syscall`.
    Some(unsafe {
        match number {
            libc::SYS_read => data::vs_read(fd, b as _, c) as c_long,
            libc::SYS_write => data::vs_write(fd, b as _, c) as c_long,
            libc::SYS_readv => data::vs_readv(fd, b as _, c as c_int) as c_long,
            libc::SYS_writev => data::vs_writev(fd, b as _, c as c_int) as c_long,
            libc::SYS_recvfrom => data::vs_recvfrom(fd, b as _, c, d as c_int, e as _, f as _) as c_long,
            libc::SYS_sendto => data::vs_sendto(fd, b as _, c, d as c_int, e as _, f as _) as c_long,
            libc::SYS_recvmsg => data::vs_recvmsg(fd, b as _, c as c_int) as c_long,
            libc::SYS_sendmsg => data::vs_sendmsg(fd, b as _, c as c_int) as c_long,
            libc::SYS_recvmmsg => data::vs_recvmmsg(fd, b as _, c as c_uint, d as c_int, e as _).into(),
            libc::SYS_sendmmsg => data::vs_sendmmsg(fd, b as _, c as c_uint, d as c_int).into(),
            libc::SYS_sendfile => data::vs_sendfile(fd, b as c_int, c as _, d) as c_long,
            libc::SYS_splice => data::vs_splice(fd, b as _, c as c_int, d as _, e, f as c_uint) as c_long,
            libc::SYS_close => life::vs_close(fd).into(),
            libc::SYS_close_range => life::vs_close_range(a as c_uint, b as c_uint, c as c_int).into(),
            libc::SYS_shutdown => life::vs_shutdown(fd, b as c_int).into(),
            libc::SYS_dup => life::vs_dup(fd).into(),
            libc::SYS_dup3 => life::vs_dup3(fd, b as c_int, c as c_int).into(),
            libc::SYS_connect => life::vs_connect(fd, b as _, c as _).into(),
            libc::SYS_accept => life::vs_accept(fd, b as _, c as _).into(),
            libc::SYS_accept4 => life::vs_accept4(fd, b as _, c as _, d as c_int).into(),
            libc::SYS_epoll_create1 => life::vs_epoll_create1(fd).into(),
            libc::SYS_fcntl => control::fcntl(fd, b as c_int, c).into(),
            libc::SYS_ioctl => control::ioctl(fd, b as _, c).into(),
            libc::SYS_setsockopt => control::setsockopt(fd, b as c_int, c as c_int, d as _, e as _).into(),
            libc::SYS_getsockopt => control::getsockopt(fd, b as c_int, c as c_int, d as _, e as _).into(),
            libc::SYS_epoll_ctl => ready::vs_epoll_ctl(fd, b as c_int, c as c_int, d as _).into(),
            libc::SYS_epoll_pwait => ready::vs_epoll_pwait(fd, b as _, c as c_int, d as c_int, e as _).into(),
            libc::SYS_epoll_pwait2 => ready::vs_epoll_pwait2(fd, b as _, c as c_int, d as _, e as _).into(),
            libc::SYS_execve => run::vs_execve(a as _, b as _, c as _).into(),
            libc::SYS_execveat => run::vs_execveat(fd, b as _, c as _, d as _, e as c_int).into(),
            libc::SYS_ppoll => ready::vs_ppoll(a as _, b as _, c as _, d as _).into(),
            libc::SYS_pselect6 => {
                let mask = (f as *const Masked).as_ref().map_or(std::ptr::null(), |m| m.mask);
                ready::vs_pselect(fd, b as _, c as _, d as _, e as _, mask).into()
            }
            libc::SYS_prctl => control::prctl(fd, b as _, c as _, d as _, e as _).into(),
            // The other way into the same sandbox; the call itself is made as it is.
            libc::SYS_seccomp => {
                client::confine();
                return None;
            }
            // The ring is made by the call itself.
            libc::SYS_io_uring_setup => {
                unseen::ring_made();
                return None;
            }
            libc::SYS_io_submit => {
                unseen::submitted(b as i64, c as _);
                return None;
            }
            other => return old(other, [a, b, c, d, e]),
        }
    })
}

/// Calls that newer architectures do not have.
#[cfg(target_arch = "x86_64")]
unsafe fn old(number: c_long, [a, b, c, d, e]: [usize; 5]) -> Option<c_long> {
    let fd = a as c_int;
    // SAFETY: as in `syscall`.
    Some(unsafe {
        match number {
            libc::SYS_poll => ready::vs_poll(a as _, b as _, c as c_int).into(),
            libc::SYS_select => ready::vs_select(fd, b as _, c as _, d as _, e as _).into(),
            libc::SYS_dup2 => life::vs_dup2(fd, b as c_int).into(),
            libc::SYS_epoll_create => life::vs_epoll_create(fd).into(),
            libc::SYS_epoll_wait => ready::vs_epoll_wait(fd, b as _, c as c_int, d as c_int).into(),
            _ => return None,
        }
    })
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn old(_: c_long, _: [usize; 5]) -> Option<c_long> {
    None
}
