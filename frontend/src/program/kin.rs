//! Processes that may hold a connection as well: a fork has copied its descriptor while it was only counted.
//!
//! What the other process moves is not counted here; and were one of the two to put the connection onto a lane, the other,
//! which does not know of it, would go on at the kernel's socket. So it is opened only once the other process has gone,
//! has executed something that does not hold it, or has closed it, as a server does that forks for each connection. A
//! connection that was opened before the fork is another thing: both know its record.

use super::table::{self, Slot};
use crate::holding;
use rustix::fd::BorrowedFd;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Nobody else holds it.
pub const NOBODY: u32 = 0;
/// More than one other process may hold it.
const MANY: u32 = u32::MAX;
/// What is below this bit is a birth; without it, a process.
const BIRTH: u32 = 1 << 31;
/// Births that are remembered; who is asked for an earlier one is not told.
const BIRTHS: u32 = 512;

/// Which processes the forks of this one have made, in memory that they share with it until they have said so; 0 is one
/// that has not come so far.
static BORN: AtomicPtr<[AtomicU32; BIRTHS as usize]> = AtomicPtr::new(std::ptr::null_mut());
/// The birth that is under way.
static BIRTH_NOW: AtomicU32 = AtomicU32::new(0);
/// Who forks.
static PARENT: AtomicU32 = AtomicU32::new(0);

fn born() -> Option<&'static [AtomicU32; BIRTHS as usize]> {
    let known = BORN.load(Ordering::Acquire);
    if let Some(born) = mapped(known) {
        return Some(born);
    }
    let (flags, len) = (MapFlags::SHARED, size_of::<[AtomicU32; BIRTHS as usize]>());
    // SAFETY: a new mapping at a place of the kernel's choice.
    let memory =
        unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) };
    BORN.store(memory.ok()?.cast(), Ordering::Release);
    mapped(BORN.load(Ordering::Acquire))
}

fn mapped<'a>(pointer: *const [AtomicU32; BIRTHS as usize]) -> Option<&'a [AtomicU32; BIRTHS as usize]> {
    // SAFETY: null, or a mapping of that size, page-aligned, of zeroed atomics, which a process unmaps only as a newborn child.
    unsafe { pointer.as_ref() }
}

/// Descriptors that are counted, or opened without an answer so far.
fn counted() -> impl Iterator<Item = (i32, &'static Slot)> {
    table::all().filter(|(_, slot)| slot.phase.load(Ordering::Relaxed) < table::HELD)
}

/// Before a fork.
pub fn before() {
    let mut births = None;
    for (fd, slot) in counted() {
        let birth = *births.get_or_insert_with(birth);
        let kin = if is_alone(fd, slot) { birth } else { MANY };
        slot.kin.store(kin, Ordering::Release);
        slot.copied();
    }
}

/// Announces a child.
fn birth() -> u32 {
    let now = BIRTH_NOW.load(Ordering::Relaxed).wrapping_add(1) % BIRTHS;
    BIRTH_NOW.store(now, Ordering::Relaxed);
    PARENT.store(std::process::id(), Ordering::Relaxed);
    match born() {
        Some(born) => {
            born[now as usize].store(0, Ordering::Release);
            BIRTH | now
        }
        None => MANY,
    }
}

/// In the child, before it does anything else.
pub fn in_child() {
    let birth = BIRTH | BIRTH_NOW.load(Ordering::Relaxed);
    let parent = PARENT.load(Ordering::Relaxed);
    // Its own children are told of elsewhere.
    let memory = BORN.swap(std::ptr::null_mut(), Ordering::AcqRel);
    if let Some(born) = mapped(memory) {
        born[(birth & !BIRTH) as usize].store(std::process::id(), Ordering::Release);
        // SAFETY: mapped by `born`, and nobody refers to it any more.
        let _ = unsafe { munmap(memory.cast(), size_of_val(born)) };
    }
    for (_, slot) in counted() {
        if slot.kin.load(Ordering::Relaxed) == birth {
            slot.kin.store(parent, Ordering::Relaxed);
        }
        // What the parent has opened is the parent's.
        slot.again();
    }
}

/// Whether no other process holds the connection, as far as can be told.
pub fn is_alone(fd: i32, slot: &Slot) -> bool {
    let kin = match slot.kin.load(Ordering::Acquire) {
        NOBODY => return true,
        MANY => return false,
        birth if birth & BIRTH != 0 => {
            born().map_or(0, |born| born[(birth & !BIRTH) as usize].load(Ordering::Acquire))
        }
        pid => pid,
    };
    let alone = kin != 0 && !holds(kin, fd);
    if alone {
        slot.kin.store(NOBODY, Ordering::Release);
    }
    alone
}

/// Whether a process has a descriptor of what is `fd` here. If it may not be looked at, it has.
fn holds(pid: u32, fd: i32) -> bool {
    // SAFETY: only its name is asked for.
    let name = holding::name(unsafe { BorrowedFd::borrow_raw(fd) });
    name.is_none_or(|name| holding::count(pid, &name, || true) != Some(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::process::{Command, Stdio};

    /// A process that has the connection as its standard input, if `inherit`.
    fn other(connection: &TcpStream, inherit: bool) -> std::process::Child {
        let input = if inherit {
            connection.try_clone().unwrap().into()
        } else {
            std::os::fd::OwnedFd::from(std::fs::File::open("/dev/null").unwrap())
        };
        Command::new("sleep").arg("60").stdin(Stdio::from(input)).spawn().unwrap()
    }

    #[test]
    fn who_holds_a_connection_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let fd = near.as_raw_fd();
        for inherit in [true, false] {
            let mut child = other(&near, inherit);
            // A spawned process has the parent's descriptors until it has executed.
            while std::fs::read_link(format!("/proc/{}/exe", child.id()))
                .is_ok_and(|exe| !exe.ends_with("sleep"))
            {
                std::thread::yield_now();
            }
            assert_eq!(holds(child.id(), fd), inherit);
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(!holds(child.id(), fd), "it has gone");
        }
        assert!(holds(std::process::id(), fd));
    }

    /// A connection that one or two forks have copied.
    #[test]
    fn a_connection_is_alone_again_when_the_other_process_has_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let fd = near.as_raw_fd();
        let slot = table::slot(fd).unwrap();
        slot.follow(true);
        assert!(is_alone(fd, slot));
        let fork = |pid: u32| {
            before();
            let birth = slot.kin.load(Ordering::Relaxed);
            if birth != MANY {
                assert!(!is_alone(fd, slot), "not born yet");
                born().unwrap()[(birth & !BIRTH) as usize].store(pid, Ordering::Relaxed);
            }
        };
        let mut first = other(&near, true);
        fork(first.id());
        assert!(!is_alone(fd, slot));
        first.kill().unwrap();
        first.wait().unwrap();
        let mut second = other(&near, true);
        fork(second.id());
        assert!(!is_alone(fd, slot), "the second has it");
        fork(second.id());
        second.kill().unwrap();
        second.wait().unwrap();
        assert!(!is_alone(fd, slot), "nobody knows who else");
        slot.forget();
        slot.follow(true);
        assert!(is_alone(fd, slot), "another connection");
        slot.forget();
    }
}
