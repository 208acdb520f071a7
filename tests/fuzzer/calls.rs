//! A step, done: each call, with what it answered.

use crate::end::{End, TABLE, Table, Word};
use crate::moving::{RECEIVE, SEND};
use crate::plan::{CHILD, Call, MAIN, Wait};
use crate::sys::{self, Ret, ret};
use libc::{c_int, epoll_event, fd_set, pollfd};
use std::time::{Duration, Instant};

/// One side's view while it acts.
pub struct Scene {
    /// Its end.
    pub end: &'static End,
    /// Direction of what it sends, for [`sys::pattern`]; it receives the other.
    pub direction: u8,
}

/// Longest wait for something that has to come.
const SOON: Duration = Duration::from_millis(1500);

/// Looks until it holds. First without sleeping: most of it takes microseconds.
pub fn soon(mut holds: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    loop {
        if holds() {
            return true;
        }
        match begun.elapsed() {
            spent if spent > SOON => return false,
            spent if spent > Duration::from_micros(200) => std::thread::sleep(Duration::from_micros(50)),
            _ => std::thread::yield_now(),
        }
    }
}

/// Bytes, each of which is known.
fn check(direction: u8, from: u64, data: &[u8]) -> &'static str {
    let right = data.iter().zip(from..).all(|(byte, at)| *byte == sys::byte(direction, at));
    if right { "right" } else { "WRONG BYTES" }
}

impl Scene {
    /// Does it, if it can be done; what it answered. `actor` is who does it.
    pub fn act(&self, actor: usize, call: Call) -> String {
        let process = if actor < CHILD { MAIN } else { actor };
        let mut table = TABLE.lock().expect("nobody panics with it");
        let slot = match call {
            Call::Send { slot, .. }
            | Call::Receive { slot, .. }
            | Call::Meet { slot, .. }
            | Call::Look { slot, .. }
            | Call::Unread { slot }
            | Call::Error { slot }
            | Call::Peer { slot }
            | Call::Shutdown { slot, .. }
            | Call::Close { slot }
            | Call::Reset { slot }
            | Call::Duplicate { slot, .. }
            | Call::Mode { slot, .. }
            | Call::Timeout { slot, .. }
            | Call::Linger { slot, .. }
            | Call::Cork { slot }
            | Call::Control { slot, .. } => slot,
            Call::Events { .. } if process != MAIN => return "not there".into(),
            Call::Set | Call::Events { .. } => return self.set(&mut table, call),
            Call::Spawn { .. } | Call::End { .. } | Call::Drain { .. } => return "nothing".into(),
        };
        let fd = table.slots[slot];
        if fd < 0 {
            return "no descriptor".into();
        }
        match call {
            Call::Send { how, n, flags, .. } => self.send(fd, how, n, flags),
            Call::Receive { how, n, flags, .. } => self.receive(fd, how, n, flags, false),
            Call::Meet { wait, n, .. } => self.wait(&table, fd, wait, n),
            Call::Look { how, events, .. } => look(fd, how, events, 0),
            Call::Unread { .. } => {
                let mut n = 0;
                format!("{} {n}", sys::ioctl(fd, libc::FIONREAD, &mut n))
            }
            Call::Error { .. } => {
                let (got, value) = sys::option(fd, libc::SOL_SOCKET, libc::SO_ERROR, 4);
                format!("{got} {value:?}")
            }
            Call::Peer { .. } => {
                let name = sys::name(fd, true);
                if name.contains(':') { "an address".into() } else { name }
            }
            Call::Shutdown { how, .. } => self.shutdown(fd, how),
            Call::Close { .. } => self.close(&mut table, process, slot, false),
            Call::Reset { .. } => self.close(&mut table, process, slot, true),
            Call::Duplicate { how, to, .. } => self.duplicate(&mut table, process, (how, slot, to)),
            Call::Control { op, events, .. } => self.control(&table, process, (fd, op, events)),
            other => self.option(fd, other),
        }
    }

    /// Does what the other side waits for, on a descriptor of the connection.
    pub fn answer(&self, fd: Option<c_int>, call: Call) -> String {
        match (fd, call) {
            (Some(fd), Call::Send { how, n, flags, .. }) => self.send(fd, how, n, flags),
            (Some(fd), _) => self.shutdown(fd, libc::SHUT_WR),
            _ => "no descriptor".into(),
        }
    }

    fn send(&self, fd: c_int, how: usize, n: usize, flags: c_int) -> String {
        let (name, takes_flags, send) = SEND[how];
        let mut n = n.min(self.end.room());
        if self.end.finds_nobody() {
            if !self.end.orphans.is() {
                return format!("{name} finds nobody");
            }
            // More than a page goes in pieces, and the reset may come between them.
            n = n.min(4096);
        }
        let data = sys::pattern(self.direction, self.end.sent.get(), n);
        let flags = if takes_flags { flags | libc::MSG_NOSIGNAL } else { 0 };
        let got = send(fd, &data, flags);
        if got.0 > 0 {
            self.end.sent.add(got.0 as usize);
            if flags & libc::MSG_MORE != 0 {
                self.end.corked.set(1u64);
            }
            if self.end.finds_nobody() {
                self.flush(fd);
                self.end.broken.set(1u64);
            }
        }
        format!("{name} {n} {flags:#x} = {got}{}", self.settle(fd))
    }

    /// `comes` says that something will come to be received.
    fn receive(&self, fd: c_int, how: usize, n: usize, flags: c_int, comes: bool) -> String {
        let (name, takes_flags, receive) = RECEIVE[how];
        let end = self.end;
        let mut flags = if takes_flags { flags } else { 0 };
        let all = flags & libc::MSG_WAITALL != 0;
        if name != "splice" && !comes && !end.receives(n, all) && flags & libc::MSG_DONTWAIT == 0 {
            if !takes_flags {
                return format!("{name} {n} would wait");
            }
            flags |= libc::MSG_DONTWAIT;
        }
        if name == "splice" && end.unread() == 0 && !end.has_ended() && !end.nonblocking.is() {
            return format!("{name} {n} would wait");
        }
        // splice goes on until it has as much as it may.
        let waits = name == "splice" && !end.has_ended() && !end.nonblocking.is() && !end.timeout.is();
        let n = if waits { n.min(end.unread() as usize) } else { n };
        let mut room = vec![0; n];
        let (got, stored) = receive(fd, &mut room, flags);
        let data = &room[..got.0.clamp(0, n as isize) as usize];
        let right = match flags & libc::MSG_TRUNC {
            0 => check(3 - self.direction, end.got.get(), data),
            _ => "unseen",
        };
        if flags & libc::MSG_PEEK == 0 {
            end.got.add(data.len());
        }
        format!("{name} {n} {flags:#x} = {got} {right} {stored}")
    }

    fn wait(&self, table: &Table, fd: c_int, wait: Wait, n: usize) -> String {
        match wait {
            Wait::Receive(how) => self.receive(fd, how, n, 0, true),
            Wait::Look(how) => look(fd, how, libc::POLLIN, 4000),
            Wait::Events => events(table.set, 0, 1, 4000),
        }
    }

    fn shutdown(&self, fd: c_int, how: c_int) -> String {
        let got = sys::shutdown(fd, how);
        if got.0 == 0 {
            if how != libc::SHUT_WR {
                self.end.deaf.set(1u64);
            }
            if how != libc::SHUT_RD {
                self.end.shut.set(1u64);
            }
        }
        format!("{got}{}", self.settle(fd))
    }

    fn close(&self, table: &mut Table, process: usize, slot: usize, abortive: bool) -> String {
        let end = self.end;
        if end.watched.is() && end.holders() > 1 || !end.may_close(1, abortive) {
            return "not now".into();
        }
        if abortive {
            sys::set_linger(table.slots[slot], 1, 0);
            end.abortive.set(1u64);
        }
        let got = sys::close(table.slots[slot]);
        table.slots[slot] = -1;
        end.went(process, 1);
        got.to_string()
    }

    fn duplicate(&self, table: &mut Table, process: usize, (how, from, to): (usize, usize, usize)) -> String {
        let (fd, was) = (table.slots[from], table.slots[to]);
        if from == to || was < 0 && how == 3 {
            return "nothing".into();
        }
        let number = if was >= 0 { was } else { Table::number(to) };
        // SAFETY: numbers; the one that is replaced is the table's.
        let got = ret(unsafe {
            match how {
                0 if was < 0 => libc::dup(fd),
                1 if was < 0 => libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100),
                2 => libc::dup2(fd, number),
                _ => libc::dup3(fd, number, libc::O_CLOEXEC),
            }
        });
        if got.0 >= 0 {
            table.slots[to] = got.0 as c_int;
            if was < 0 {
                self.end.held[process].add(1);
            }
        }
        // Which number, is the kernel's, and depends on what the library holds open.
        format!("{}", if got.0 >= 0 { Ret(0, 0) } else { got })
    }

    fn option(&self, fd: c_int, call: Call) -> String {
        let end = self.end;
        let (got, word, on): (Ret, &Word, bool) = match call {
            Call::Mode { how: 0, nonblocking, .. } => {
                sys::set_nonblocking(fd, nonblocking);
                (sys::fcntl(fd, libc::F_GETFL, 0), &end.nonblocking, nonblocking)
            }
            Call::Mode { nonblocking, .. } => {
                let mut value = nonblocking.into();
                (sys::ioctl(fd, libc::FIONBIO, &mut value), &end.nonblocking, nonblocking)
            }
            Call::Timeout { on, .. } => {
                let time = if on { 2 } else { 0 };
                (sys::set_timeout(fd, libc::SO_RCVTIMEO, time), &end.timeout, on)
            }
            Call::Linger { on, .. } => (sys::set_linger(fd, on.into(), 2), &end.abortive, false),
            _ => (sys::set_option(fd, libc::IPPROTO_TCP, libc::TCP_CORK, 1), &end.corked, true),
        };
        if got.0 >= 0 {
            word.set(u64::from(on));
        }
        got.to_string()
    }

    fn control(&self, table: &Table, process: usize, (fd, op, events): (c_int, c_int, u32)) -> String {
        if table.set < 0 || self.end.held[MAIN].get() > 1 || process != MAIN {
            return "not now".into();
        }
        self.end.watched.set(1u64);
        let mut event = epoll_event { events, u64: 7 };
        // SAFETY: the event outlives the call.
        let got = ret(unsafe { libc::epoll_ctl(table.set, op, fd, &raw mut event) });
        if got.0 == 0 && table.serial == self.end.sets.get() {
            self.end.interest.set(if op == libc::EPOLL_CTL_DEL { 0 } else { u64::from(events) });
        }
        got.to_string()
    }

    fn set(&self, table: &mut Table, call: Call) -> String {
        if let Call::Events { how, room } = call {
            return if table.set < 0 { "no set".into() } else { events(table.set, how, room, 0) };
        }
        if table.set >= 0 {
            sys::close(table.set);
        }
        // SAFETY: numbers.
        table.set = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        self.end.sets.add(1);
        self.end.interest.set(0u64);
        table.serial = self.end.sets.get();
        u8::from(table.set >= 0).to_string()
    }

    /// Sends what waits for more.
    pub fn flush(&self, fd: c_int) {
        if self.end.corked.is() {
            sys::set_option(fd, libc::IPPROTO_TCP, libc::TCP_CORK, 0);
            sys::set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
            self.end.corked.set(0u64);
        }
    }

    /// Waits until all is here that has to come; what has not.
    pub fn settle(&self, fd: c_int) -> String {
        let end = self.end;
        // One that is shut both ways says so before a reset has come.
        let ended =
            || sys::poll(fd, 0, 0).1 & (libc::POLLERR | libc::POLLHUP) != 0 && state(fd) == Some(CLOSE);
        if end.broken.is() {
            return if soon(ended) { String::new() } else { " ! no reset has come".into() };
        }
        if !soon(|| sys::unread(fd) as u64 == end.unread()) {
            return format!(" ! {} unread of {}", sys::unread(fd), end.unread());
        }
        // Who has shut it for reading is told so before the end has come.
        let over =
            || sys::poll(fd, libc::POLLRDHUP, 0).1 != 0 && state(fd).is_some_and(|s| AFTER_FIN.contains(&s));
        if end.peer_shut.is() && !soon(over) {
            return " ! no end has come".into();
        }
        if end.shut.is() && !soon(|| state(fd).is_some_and(|s| acknowledged(s, end.peer_shut.is()))) {
            return format!(" ! state {:?}", state(fd));
        }
        String::new()
    }
}

/// States of the kernel's: the last, and those after the peer's FIN.
const CLOSE: u8 = 7;
const AFTER_FIN: [u8; 5] = [6, CLOSE, 8, 9, 11];

/// The kernel's state of the connection.
fn state(fd: c_int) -> Option<u8> {
    let (_, info) = sys::option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 1);
    info.first().copied()
}

/// Whether the FIN that was sent has been acknowledged, and the other come if it is known to.
fn acknowledged(state: u8, both: bool) -> bool {
    const FIN_WAIT1: u8 = 4;
    const LAST_ACK: u8 = 9;
    const CLOSING: u8 = 11;
    if both { state == CLOSE } else { ![FIN_WAIT1, LAST_ACK, CLOSING].contains(&state) }
}

/// poll, ppoll, select or pselect.
fn look(fd: c_int, how: usize, events: i16, milliseconds: c_int) -> String {
    let limit = libc::timespec {
        tv_sec: (milliseconds / 1000).into(),
        tv_nsec: (milliseconds % 1000 * 1_000_000).into(),
    };
    let mut one = pollfd { fd, events, revents: 0 };
    // SAFETY, for all: sets and times of our own that outlive the calls; the number is below FD_SETSIZE.
    let mut sets: [fd_set; 3] = unsafe { std::mem::zeroed() };
    let wanted = [libc::POLLIN, libc::POLLOUT, libc::POLLPRI];
    for (set, event) in sets.iter_mut().zip(wanted) {
        if events & event != 0 {
            unsafe { libc::FD_SET(fd, set) };
        }
    }
    let [r, w, e] = &mut sets;
    let got = ret(unsafe {
        match how {
            0 => libc::poll(&raw mut one, 1, milliseconds),
            1 => libc::ppoll(&raw mut one, 1, &raw const limit, std::ptr::null()),
            2 => {
                let mut limit = libc::timeval { tv_sec: limit.tv_sec, tv_usec: limit.tv_nsec / 1000 };
                libc::select(fd + 1, r, w, e, &raw mut limit)
            }
            _ => libc::pselect(fd + 1, r, w, e, &raw const limit, std::ptr::null()),
        }
    });
    let name = ["poll", "ppoll", "select", "pselect"][how];
    if how < 2 {
        return format!("{name} {events:#x} = {got} {:#x}", one.revents);
    }
    let said = sets.each_ref().map(|set| u8::from(unsafe { libc::FD_ISSET(fd, set) }));
    format!("{name} {events:#x} = {got} {said:?}")
}

fn events(set: c_int, how: usize, room: usize, milliseconds: c_int) -> String {
    let mut list = [epoll_event { events: 0, u64: 0 }; 4];
    // SAFETY: the list outlives the call, and has as much room.
    let got = ret(unsafe {
        let most = room as c_int;
        match how {
            0 => libc::epoll_wait(set, list.as_mut_ptr(), most, milliseconds),
            _ => libc::epoll_pwait(set, list.as_mut_ptr(), most, milliseconds, std::ptr::null()),
        }
    });
    let said: Vec<String> = list[..got.0.max(0) as usize]
        .iter()
        .map(|event| {
            let epoll_event { events, u64: data } = *event;
            format!("{data}:{events:#x}")
        })
        .collect();
    format!("{got} {said:?}")
}
