//! The doorbells of programs in a virtual machine: four streams to the host for each. Programs wait for them and write to
//! them; the agent opens them, notices when the host ends one, and reads one down when the host says that it is full.

#![forbid(unsafe_code)]

use crate::host::Host;
use crate::memory::Ringers;
use crate::post::{Parcel, Post};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{RecvFlags, Shutdown};
use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use vsocket_channel::layout::BELLS;
use vsocket_channel::message::Message;

/// A program's own bells, and those of the far side: what goes out on the first stream rings all of them.
#[derive(Clone, Debug)]
pub struct Doorbells {
    /// Watched by the program.
    pub own: Arc<Vec<OwnedFd>>,
    /// Rung by it.
    pub far: Ringers,
}

#[derive(Debug)]
enum State {
    /// The host has not heard of all of them yet.
    Opening(Vec<Post>),
    Open(Doorbells),
}

/// The doorbells of all programs.
#[derive(Debug)]
pub struct Bells {
    /// Hears of ends, and of room while they are opened; never of a ring, which is not the agent's.
    set: OwnedFd,
    programs: HashMap<u64, State>,
}

impl Bells {
    /// None yet.
    ///
    /// # Errors
    ///
    /// Out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { set: epoll::create(epoll::CreateFlags::CLOEXEC)?, programs: HashMap::new() })
    }

    /// Begins to open a program's, if it has none.
    ///
    /// # Errors
    ///
    /// The host is not there.
    pub fn open(&mut self, host: &Host, token: u128, program: u64) -> io::Result<()> {
        if self.programs.contains_key(&program) {
            return Ok(());
        }
        let mut posts = Vec::new();
        for bell in 0..BELLS as u32 {
            let mut post = Post::over(host.connect(false)?);
            post.send(Message::Present { token, program, bell }, Parcel::new())?;
            let data = EventData::new_u64(name(program, bell));
            epoll::add(&self.set, &post, data, EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET)?;
            posts.push(post);
        }
        self.programs.insert(program, State::Opening(posts));
        self.settle(program)
    }

    /// A program's, once the host has been told of all of them.
    pub fn of(&self, program: u64) -> Option<Doorbells> {
        match self.programs.get(&program)? {
            State::Opening(_) => None,
            State::Open(bells) => Some(bells.clone()),
        }
    }

    /// Takes what has happened: the programs whose bells the host has ended.
    pub fn handle_ready(&mut self) -> Vec<u64> {
        let mut ended = Vec::new();
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut space = [MaybeUninit::uninit(); 64];
        let Ok((events, _)) = epoll::wait(&self.set, &mut space, Some(&zero)) else { return ended };
        let events: Vec<_> = events.iter().map(|e| (e.data.u64() / BELLS as u64, e.flags)).collect();
        for (program, flags) in events {
            let over = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
            if (over || self.settle(program).is_err()) && self.programs.contains_key(&program) {
                ended.push(program);
            }
        }
        ended.dedup();
        ended
    }

    /// If the host has been told of all of a program's bells, they are open.
    fn settle(&mut self, program: u64) -> io::Result<()> {
        let Some(State::Opening(posts)) = self.programs.get_mut(&program) else { return Ok(()) };
        for post in posts.iter_mut() {
            post.flush()?;
        }
        if posts.iter_mut().any(Post::waits) {
            return Ok(());
        }
        for (post, bell) in posts.iter().zip(0..) {
            let data = EventData::new_u64(name(program, bell));
            epoll::modify(&self.set, post, data, EventFlags::RDHUP | EventFlags::ET)?;
        }
        let own: Vec<OwnedFd> = posts.drain(..).map(Post::into_fd).collect();
        let dup = || rustix::io::fcntl_dupfd_cloexec(&own[0], 0);
        let far: Vec<OwnedFd> = (0..BELLS).map(|_| dup()).collect::<Result<_, _>>()?;
        let bells = Doorbells { own: Arc::new(own), far: Arc::new(far).into() };
        self.programs.insert(program, State::Open(bells));
        Ok(())
    }

    /// Ends a program's, whoever else holds them.
    pub fn close(&mut self, program: u64) {
        match self.programs.remove(&program) {
            Some(State::Opening(posts)) => posts.iter().for_each(|post| self.end(post.as_fd())),
            Some(State::Open(bells)) => bells.own.iter().for_each(|bell| self.end(bell.as_fd())),
            None => {}
        }
    }

    fn end(&self, bell: BorrowedFd<'_>) {
        // Programs hold it too, so its closing here would neither end it nor take it out of the set.
        let _ = epoll::delete(&self.set, bell);
        let _ = rustix::net::shutdown(bell, Shutdown::Both);
    }

    /// Ends everybody's.
    pub fn close_all(&mut self) {
        let programs: Vec<u64> = self.programs.keys().copied().collect();
        for program in programs {
            self.close(program);
        }
    }

    /// Reads a full bell down to one byte.
    pub fn read_down(&self, program: u64, bell: u32) {
        let Some(State::Open(bells)) = self.programs.get(&program) else { return };
        if let Some(bell) = bells.own.get(bell as usize) {
            read_down(bell);
        }
    }
}

impl AsFd for Bells {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.set.as_fd()
    }
}

fn name(program: u64, bell: u32) -> u64 {
    program * BELLS as u64 + u64::from(bell)
}

/// Leaves one byte: to who waits, an empty bell looks as if it had not been rung.
fn read_down(bell: &OwnedFd) {
    let mut scratch = [0; 16 << 10];
    while let Ok((there, _)) = rustix::net::recv(bell, &mut scratch, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        if there < 2 || rustix::net::recv(bell, &mut scratch[..there - 1], RecvFlags::DONTWAIT).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn a_full_bell_keeps_one_byte() {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (host, bell) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        read_down(&bell);
        for length in [1, 2, 8, 100, (16 << 10) + 1, 70_000] {
            assert_eq!(rustix::io::write(&host, &vec![1; length]).unwrap(), length);
            read_down(&bell);
            let mut all = vec![0; length];
            assert_eq!(rustix::io::read(&bell, &mut all[..]).unwrap(), 1, "of {length}");
        }
    }
}
