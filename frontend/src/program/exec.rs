//! Before a program is executed: the connections that it inherits go back to TCP. With or without this library, it
//! finds plain sockets. With it, they are its own to bring to a lane ([`found`](super::found)).
//!
//! Which they are is asked of the kernel, as this may be a child that shares its parent's memory (`vfork`) but not its
//! descriptors. The agent does the rest, over a connection of its own: nothing of this process's state is touched, and no
//! lock is taken. If the execution fails, the connections simply stay on TCP.

use super::{client, fork, table};
use crate::carrier::Carrier;
use crate::kernel;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::BorrowedFd;
use rustix::io::FdFlags;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vsocket_channel::message::Message;
use vsocket_channel::reason::Reason;

/// How long an execution waits; the agent gives up before that.
const MOST: Duration = Duration::from_secs(2);

/// What is to be done with descriptors before a spawned program begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// `posix_spawn_file_actions_addclose`.
    Close(i32),
    /// `posix_spawn_file_actions_adddup2`.
    Dup(i32, i32),
    /// `posix_spawn_file_actions_addclosefrom_np`.
    CloseFrom(i32),
}

/// This process, or a child of it that does nothing else, is about to execute a program, after these actions.
pub fn before(actions: &[Action]) {
    // A sandbox may kill whoever makes a socket for the agent.
    if !table::has_followed() || client::is_confined() {
        return;
    }
    let foreign = fork::is_foreign();
    let ours = |fd: &i32| foreign || table::followed(*fd).is_some();
    let open: BTreeMap<i32, bool> = descriptors().into_iter().filter(|(fd, _)| ours(fd)).collect();
    let mut inherited = inherited(open, actions);
    if !foreign {
        // What is not opened is in the kernel's socket, and is looked at again before it is.
        inherited.retain(|fd| {
            let slot = table::followed(*fd).filter(|slot| slot.conn_ptr().is_null());
            slot.inspect(|slot| slot.give_away()).is_none()
        });
    }
    inherited.retain(|fd| is_connection(*fd));
    if !inherited.is_empty() {
        hand_over(&inherited, Reason::Inherited);
    }
}

/// This process's descriptors, and whether they are closed by an execution.
fn descriptors() -> Vec<(i32, bool)> {
    let names = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let numbers: Vec<i32> = numbers.collect();
    let closes = |fd: i32| {
        // SAFETY: only asked about; a number that is not open gives EBADF.
        let flags = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).ok()?;
        Some((fd, flags.contains(FdFlags::CLOEXEC)))
    };
    numbers.into_iter().filter_map(closes).collect()
}

/// The descriptors of this process that the new program has under any number.
fn inherited(open: BTreeMap<i32, bool>, actions: &[Action]) -> Vec<i32> {
    // Which of ours a number of the new program's names, and whether it is closed by the execution.
    let mut named: BTreeMap<i32, (i32, bool)> =
        open.into_iter().map(|(fd, closes)| (fd, (fd, closes))).collect();
    for action in actions {
        match *action {
            Action::Close(fd) => {
                named.remove(&fd);
            }
            Action::CloseFrom(first) => named.retain(|fd, _| *fd < first),
            Action::Dup(from, to) => match named.get(&from).copied() {
                Some((origin, _)) => {
                    named.insert(to, (origin, false));
                }
                None => {
                    named.remove(&to);
                }
            },
        }
    }
    let mut kept: Vec<i32> =
        named.into_values().filter(|(_, closes)| !closes).map(|(origin, _)| origin).collect();
    kept.sort_unstable();
    kept.dedup();
    kept
}

fn is_connection(fd: i32) -> bool {
    // SAFETY: only asked about.
    kernel::tuple(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok()
}

/// Has the agent bring these connections to TCP whole, and waits until it has. Without an agent they are as they are; but no
/// later one is to bring them to a lane.
pub(super) fn hand_over(fds: &[i32], reason: Reason) {
    if ask(fds, reason).is_some() {
        return;
    }
    // A child that shares its parent's memory may have other numbers.
    let concerned = |fd: i32| fork::is_foreign() || fds.contains(&fd);
    for conn in table::all().filter(|(fd, _)| concerned(*fd)).filter_map(|(_, slot)| slot.conn()) {
        conn.record().leave.fetch_max(u32::MAX, Ordering::AcqRel);
    }
}

fn ask(fds: &[i32], reason: Reason) -> Option<()> {
    let agent = Carrier::connect(client::agent_path()).map(Carrier::lifted).ok()?;
    let until = Instant::now() + MOST;
    let (mut sent, mut answered) = (0, 0);
    while answered < fds.len() {
        while let Some(fd) = fds.get(sent) {
            // SAFETY: a descriptor of this process, found open just now; if another thread closes it meanwhile, the message is
            // refused, or names what has come in its place, which is no worse off on TCP.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            match agent.send(&Message::Parted { handle: sent as u64, reason }, &[fd]) {
                Ok(()) => sent += 1,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => return None,
            }
        }
        match agent.recv() {
            Ok(Some(_)) => answered += 1,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                let room = if sent < fds.len() { PollFlags::OUT } else { PollFlags::empty() };
                let left =
                    Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
                let _ = rustix::event::poll(&mut [PollFd::new(&agent, PollFlags::IN | room)], Some(&left));
            }
            Ok(None) | Err(_) => return None,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_spawned_program_inherits() {
        let open = || BTreeMap::from([(3, false), (4, true), (5, false), (900, true)]);
        assert_eq!(inherited(open(), &[]), [3, 5]);
        assert_eq!(inherited(open(), &[Action::Close(3)]), [5]);
        assert_eq!(inherited(open(), &[Action::Dup(4, 0), Action::CloseFrom(3)]), [4]);
        assert_eq!(inherited(open(), &[Action::Dup(4, 4)]), [3, 4, 5]);
        assert_eq!(
            inherited(open(), &[Action::Dup(900, 1), Action::Dup(1, 2), Action::Close(1)]),
            [3, 5, 900]
        );
        assert_eq!(inherited(open(), &[Action::Dup(7, 3)]), [5], "something else stands there");
    }

    #[test]
    fn the_kernel_knows_which_are_closed() {
        let (a, b) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        rustix::io::fcntl_setfd(&b, FdFlags::empty()).unwrap();
        let open: BTreeMap<i32, bool> = descriptors().into_iter().collect();
        let raw = |fd| rustix::fd::AsRawFd::as_raw_fd(fd);
        assert_eq!((open.get(&raw(&a)), open.get(&raw(&b))), (Some(&true), Some(&false)));
    }
}
