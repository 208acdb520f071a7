//! Connections that a program has found: inherited by its execution, or received with a message. They were brought back to TCP for
//! whoever else may hold them, and come to a lane again when nobody does: when there is one descriptor of them in all. `/proc` tells,
//! as far as this agent may look: what it may not see, it takes for held, but for the first process of all. A descriptor that is under
//! way in a message is seen nowhere.

use super::Agent;
use crate::holding;
use crate::record::Past;
use rustix::fd::OwnedFd;
use rustix::net::sockopt::socket_cookie;
use std::fs;
use std::time::{Duration, Instant};
use vsocket_channel::reason::Reason;

/// A look ends here, and what was looked for stays on TCP: nothing else is done meanwhile.
const MOST: Duration = Duration::from_millis(20);
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
        // Of a process in a namespace that is not seen from here, its descriptors are not seen either.
        let alone = holder.pid != 0 && is_held_once(fd);
        self.looks_from = Some(self.now + began.elapsed() * REST);
        if alone { Ok(past.flatten()) } else { Err(Reason::HeldByOthers) }
    }
}

/// Whether there is one descriptor of the socket, beside those of this process.
fn is_held_once(socket: &OwnedFd) -> bool {
    let Some(name) = holding::name(socket) else { return false };
    // Where other users' processes are hidden, so is the first.
    let (Ok(processes), true) = (fs::read_dir("/proc"), fs::exists("/proc/1").unwrap_or(false)) else {
        return false;
    };
    let began = Instant::now();
    let mut links = 0;
    for entry in processes {
        let Ok(entry) = entry else { return false };
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if number == std::process::id() {
            continue;
        }
        match holding::count(number, &name, || began.elapsed() < MOST) {
            Some(more) => links += more,
            // It may have more privileges than any other, and runs no program of ours.
            None if number == 1 && began.elapsed() < MOST => {}
            None => return false,
        }
    }
    links == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};

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
        // This process is not counted: as an agent, it has what it is asked about.
        assert!(comes_true(|| !is_held_once(&ours)), "by nobody else");
        let first = other(&near);
        assert!(comes_true(|| is_held_once(&ours)));
        let second = other(&near);
        assert!(comes_true(|| !is_held_once(&ours)), "the second has it as well");
        ends(second);
        assert!(comes_true(|| is_held_once(&ours)));
        ends(first);
        let twice = Command::new("sleep")
            .arg("60")
            .stdin(OwnedFd::from(near.try_clone().unwrap()))
            .stdout(OwnedFd::from(near.try_clone().unwrap()))
            .spawn()
            .unwrap();
        assert!(comes_true(|| !is_held_once(&ours)), "by one, under two numbers");
        ends(twice);
    }
}
