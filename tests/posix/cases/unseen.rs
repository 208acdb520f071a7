//! Input and output by other ways than calls on the descriptor: rings, and asynchronous I/O. Each in a child, as what a process
//! has done once decides for all of its connections.

use super::Group;
use super::processes::{exchange, forked};
use crate::pair::Pair;
use crate::sys::Ret;
use libc::{c_int, c_long, c_void};

/// What is done with a connection: the operation's answer.
type Does = fn(c_int, &mut [u8], bool) -> c_int;

/// A ring of one entry, made and used without a library; what its operation on the connection answered.
fn by_ring(fd: c_int, data: &mut [u8], sends: bool) -> c_int {
    const OFFSETS: [i64; 3] = [0, 0x800_0000, 0x1000_0000];
    let mut parameters = [0u32; 30];
    // SAFETY: the structure has 120 bytes; the mappings are the kernel's, of a page at least each; offsets into them are its own.
    unsafe {
        let ring = libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) as c_int;
        if ring < 0 {
            return -1000;
        }
        let map = |offset| {
            let (protection, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
            libc::mmap(std::ptr::null_mut(), 4096, protection, flags, ring, offset).cast::<u8>()
        };
        let [requests, answers, entries] = OFFSETS.map(map);
        let word = |base: *mut u8, offset: u32| base.add(offset as usize).cast::<u32>();
        // IORING_OP_SEND, IORING_OP_RECV.
        entries.write(if sends { 26 } else { 27 });
        entries.add(4).cast::<c_int>().write(fd);
        entries.add(16).cast::<u64>().write(data.as_mut_ptr().addr() as u64);
        entries.add(24).cast::<u32>().write(data.len() as u32);
        word(requests, parameters[16]).write(0);
        word(requests, parameters[11]).write_volatile(1);
        // IORING_ENTER_GETEVENTS.
        libc::syscall(libc::SYS_io_uring_enter, ring, 1, 1, 1, std::ptr::null::<c_void>(), 0usize);
        answers.add(parameters[25] as usize + 8).cast::<c_int>().read_volatile()
    }
}

fn block(fd: c_int, data: &mut [u8]) -> libc::aiocb {
    // SAFETY: zero is a block of nothing.
    let mut block: libc::aiocb = unsafe { std::mem::zeroed() };
    (block.aio_fildes, block.aio_buf, block.aio_nbytes) = (fd, data.as_mut_ptr().cast(), data.len());
    block
}

/// Waits for a block of glibc's.
fn done(block: &mut libc::aiocb, begun: c_int) -> c_int {
    let list = [std::ptr::from_ref::<libc::aiocb>(block)];
    let limit = libc::timespec { tv_sec: 4, tv_nsec: 0 };
    // SAFETY: the block lives until it is done.
    unsafe {
        while begun == 0 && libc::aio_error(block) == libc::EINPROGRESS {
            if libc::aio_suspend(list.as_ptr(), 1, &raw const limit) != 0 {
                return -1001;
            }
        }
        libc::aio_return(block) as c_int
    }
}

fn by_aio(fd: c_int, data: &mut [u8], sends: bool) -> c_int {
    let mut block = block(fd, data);
    let call = if sends { libc::aio_write } else { libc::aio_read };
    // SAFETY: the block lives until it is done.
    let begun = unsafe { call(&raw mut block) };
    done(&mut block, begun)
}

fn by_list(fd: c_int, data: &mut [u8], sends: bool) -> c_int {
    let mut block = block(fd, data);
    block.aio_lio_opcode = if sends { libc::LIO_WRITE } else { libc::LIO_READ };
    let list = [&raw mut block];
    // SAFETY: the block lives until it is done.
    let begun = unsafe { libc::lio_listio(libc::LIO_WAIT, list.as_ptr(), 1, std::ptr::null_mut()) };
    done(&mut block, begun)
}

/// The kernel's asynchronous I/O, by number.
fn by_submit(fd: c_int, data: &mut [u8], sends: bool) -> c_int {
    let mut block = [0u64; 8];
    // IOCB_CMD_PWRITE, IOCB_CMD_PREAD.
    block[2] = u64::from(sends) | (fd as u64) << 32;
    (block[3], block[4]) = (data.as_mut_ptr().addr() as u64, data.len() as u64);
    let (mut context, list, mut event) = (0u64, [block.as_mut_ptr()], [0i64; 4]);
    let limit = libc::timespec { tv_sec: 4, tv_nsec: 0 };
    // SAFETY: the block, its data and the place for the event outlive the calls.
    unsafe {
        if libc::syscall(libc::SYS_io_setup, 1, &raw mut context) != 0 {
            return -1002;
        }
        let submitted: c_long = libc::syscall(libc::SYS_io_submit, context, 1, list.as_ptr());
        let got = libc::syscall(libc::SYS_io_getevents, context, 1, 1, event.as_mut_ptr(), &raw const limit);
        libc::syscall(libc::SYS_io_destroy, context);
        if (submitted, got) == (1, 1) { event[2] as c_int } else { -1003 }
    }
}

pub fn group() -> Group {
    let mut group = Group::new("unseen");
    let ways: [(&str, &str, Does); 4] = [
        ("io_uring", "io-uring", by_ring),
        ("aio", "aio", by_aio),
        ("lio_listio", "aio", by_list),
        ("io_submit", "aio", by_submit),
    ];
    for (name, reason, does) in ways {
        let row = if name == "io_uring" { "7.6" } else { "7.7" };
        let receives = move |p: &mut Pair| {
            p.receives(30);
            p.send(25, 0);
            let fd = p.near;
            p.note(forked(|| does(fd, &mut [0; 12], false)));
            p.recv(40, 0);
            p.far_says("take", &[25]);
            exchange(p);
        };
        group.case(row, &format!("{name}/receives"), receives).carried = super::Carried::Tcp(reason);
        let sends = move |p: &mut Pair| {
            p.receives(15);
            let (fd, mut data) = (p.near, p.next(20));
            p.note(forked(|| does(fd, &mut data, true)));
            p.taken(Ret(20, 0));
            p.far_says("take", &[20]);
            p.recv(40, 0);
            exchange(p);
        };
        group.case(row, &format!("{name}/sends"), sends).carried = super::Carried::Tcp(reason);
    }
    group
}
