//! Asynchronous I/O, and rings: what they work on goes back to TCP first.

use crate::args;
use crate::hook::{Next, ours};
use libc::{aiocb, c_int, c_long, c_void, sigevent};
use vsocket_frontend::program::{socket, unseen};

// SAFETY, for every hook of this file: the arguments are the application's own and are only handed on, or read as the C
// function's contract says.

/// The beginning of the kernel's `struct iocb`, as far as its descriptor.
#[repr(C)]
struct Block {
    data: u64,
    key: u32,
    flags: c_int,
    what: u16,
    priority: i16,
    fd: c_int,
}

/// A ring is about to be made.
pub fn ring_made() {
    let errno = args::errno();
    ours(unseen::ring);
    args::set_errno(errno);
}

fn given(fds: impl Iterator<Item = c_int>) {
    let followed: Vec<c_int> = fds.filter(|fd| socket::is_followed(*fd)).collect();
    if !followed.is_empty() {
        let errno = args::errno();
        ours(|| unseen::submitted(&followed));
        args::set_errno(errno);
    }
}

/// Blocks are about to be submitted to the kernel.
pub unsafe fn submitted(n: i64, list: *const *const c_void) {
    if list.is_null() || !(1..=1 << 16).contains(&n) {
        return;
    }
    // SAFETY: the application promises so many pointers, each null or to a block.
    given(
        (0..n as usize)
            .filter_map(|at| unsafe { (*list.add(at)).cast::<Block>().as_ref() })
            .map(|block| block.fd),
    );
}

unsafe fn one(block: *const aiocb) {
    // SAFETY: null, or the application's block.
    given(unsafe { block.as_ref() }.map(|block| block.aio_fildes).into_iter());
}

unsafe fn several(list: *const *const aiocb, n: c_int) {
    if !list.is_null() {
        // SAFETY: the application promises so many pointers, each null or to a block.
        given(
            (0..n.max(0) as usize)
                .filter_map(|at| unsafe { (*list.add(at)).as_ref() })
                .map(|block| block.aio_fildes),
        );
    }
}

hook! { unsafe fn aio_read(block: *mut aiocb) -> c_int => vs_aio_read {
    // SAFETY: see above.
    unsafe {
        one(block);
        real!(aio_read)(block)
    }
} }

hook! { unsafe fn aio_read64(block: *mut aiocb) -> c_int => vs_aio_read64 {
    // SAFETY: see above.
    unsafe {
        one(block);
        real!(aio_read64)(block)
    }
} }

hook! { unsafe fn aio_write(block: *mut aiocb) -> c_int => vs_aio_write {
    // SAFETY: see above.
    unsafe {
        one(block);
        real!(aio_write)(block)
    }
} }

hook! { unsafe fn aio_write64(block: *mut aiocb) -> c_int => vs_aio_write64 {
    // SAFETY: see above.
    unsafe {
        one(block);
        real!(aio_write64)(block)
    }
} }

hook! { unsafe fn lio_listio(mode: c_int, list: *const *const aiocb, n: c_int, event: *mut sigevent) -> c_int => vs_lio_listio {
    // SAFETY: see above.
    unsafe {
        several(list, n);
        real!(lio_listio)(mode, list, n, event)
    }
} }

hook! { unsafe fn lio_listio64(mode: c_int, list: *const *const aiocb, n: c_int, event: *mut sigevent) -> c_int => vs_lio_listio64 {
    // SAFETY: see above.
    unsafe {
        several(list, n);
        real!(lio_listio64)(mode, list, n, event)
    }
} }

static SUBMIT: Next = Next::new(c"io_submit");
type Submit = unsafe extern "C" fn(*mut c_void, c_long, *const *const c_void) -> c_int;

/// `io_submit` of libaio, which makes the system call by an instruction of its own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn io_submit(context: *mut c_void, n: c_long, list: *const *const c_void) -> c_int {
    // SAFETY: see above; libaio's function is the system call with its error as the answer, so where it cannot be found, as in
    // a library that was loaded for another alone, the call is made here.
    unsafe {
        submitted(n, list);
        let next = SUBMIT.get();
        if !next.is_null() {
            let real: Submit = std::mem::transmute(next);
            return real(context, n, list);
        }
        let errno = args::errno();
        let got = libc::syscall(libc::SYS_io_submit, context, n, list);
        let answer = if got < 0 { -args::errno() } else { got as c_int };
        args::set_errno(errno);
        answer
    }
}
