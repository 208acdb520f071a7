//! Connections that a program has found: inherited by its execution, or received with a message. They were brought back to TCP for
//! whoever else may hold them, and come to a lane again when nobody does. Who does is looked up in `/proc`, as far as this agent may
//! look: what it may not see, it takes for held, unless that is a process with more privileges than its own, as the guest's first may
//! be. A descriptor that is under way in a message is seen nowhere.

use super::Agent;
use crate::holding;
use crate::record::Past;
use rustix::fd::OwnedFd;
use rustix::net::sockopt::socket_cookie;
use std::fs;
use std::time::Instant;
use vsocket_channel::reason::Reason;

/// After a look, so many times as long as it took pass before the next: where many processes hold many descriptors, it is dear.
const REST: u32 = 50;

impl Agent {
    /// A program asks for a connection that it has found: what its stays have left behind, as far as it is known.
    ///
    /// # Errors
    ///
    /// Why it stays on TCP; with `Busy`, `TupleTaken` and `HeldByOthers` for now.
    pub(super) fn reclaim(&mut self, from: u64, fd: &OwnedFd) -> Result<Option<Past>, Reason> {
        let cookie = socket_cookie(fd).map_err(|_| Reason::NotEstablished)?;
        let (reason, past) = self.registry.given.get(cookie).unzip();
        match reason {
            Some(unseen @ (Reason::IoUring | Reason::Aio)) => return Err(unseen),
            _ if self.registry.cookies.contains_key(&cookie) => return Err(Reason::TupleTaken),
            _ if self.looks_from.is_some_and(|from| self.now < from) => return Err(Reason::Busy),
            _ => {}
        }
        let Some(holder) = self.registry.holders.get(&from) else { return Err(Reason::Ending) };
        let began = Instant::now();
        let alone = u32::try_from(holder.pid).is_ok_and(|pid| is_held_only_by(pid, fd));
        self.looks_from = Some(self.now + began.elapsed() * REST);
        if alone { Ok(past.flatten()) } else { Err(Reason::HeldByOthers) }
    }
}

/// Whether the process with this number has the socket, and no other but this one.
fn is_held_only_by(pid: u32, socket: &OwnedFd) -> bool {
    let Some(name) = holding::name(socket) else { return false };
    let Ok(processes) = fs::read_dir("/proc") else { return false };
    let numbers = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut its = false;
    for number in numbers.filter(|number| *number != std::process::id()) {
        match holding::holds(number, &name) {
            Some(true) if number == pid => its = true,
            Some(false) => {}
            None if is_above(number) => {}
            _ => return false,
        }
    }
    its
}

/// Whether a process has capabilities that this one has not: no program that we serve, nor a child of one.
fn is_above(pid: u32) -> bool {
    let permitted = |pid: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    permitted(&pid.to_string()).zip(permitted("self")).is_some_and(|(its, ours)| its & !ours != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    /// A process that has the connection as its standard input.
    fn other(connection: &TcpStream) -> Child {
        let input = OwnedFd::from(connection.try_clone().unwrap());
        Command::new("sleep").arg("60").stdin(Stdio::from(input)).spawn().unwrap()
    }

    /// Other tests spawn processes, which have our descriptors until they have executed.
    fn comes_true(what: impl Fn() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(20);
        while !what() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        what()
    }

    #[test]
    fn who_alone_holds_a_connection_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ours = OwnedFd::from(near.try_clone().unwrap());
        let ends = |mut child: Child| {
            child.kill().unwrap();
            child.wait().unwrap();
        };
        let first = other(&near);
        let pid = first.id();
        assert!(comes_true(|| is_held_only_by(pid, &ours)));
        assert!(!is_held_only_by(1, &ours), "the first process has it");
        let second = other(&near);
        assert!(!is_held_only_by(pid, &ours), "the second has it as well");
        ends(second);
        assert!(comes_true(|| is_held_only_by(pid, &ours)));
        ends(first);
        assert!(!is_held_only_by(pid, &ours), "it has gone");
    }
}
