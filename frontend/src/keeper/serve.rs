//! The keeper's loop: four descriptors, two things that are due.

#![forbid(unsafe_code)]

use super::{Error, Keeper, system};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::time::Instant;
use tracing::{info, warn};

/// What of it is ready.
#[derive(Default)]
struct Ready {
    signal: bool,
    host: bool,
    agent: bool,
    agent_ended: bool,
}

impl Keeper {
    pub(super) fn serve(&mut self) -> Result<u8, Error> {
        loop {
            self.now = Instant::now();
            if let Some(code) = self.ends() {
                return Ok(code);
            }
            if self.link.is_none() && self.connect_at <= self.now {
                self.connect();
            }
            if self.agent.is_none() && self.start_at <= self.now && !self.stopping && self.over.is_none() {
                self.start_agent();
            }
            let ready = self.wait()?;
            self.now = Instant::now();
            if ready.signal && self.signalled() {
                self.stop();
            }
            if ready.agent_ended {
                self.handle_agent_ended();
            }
            if ready.host {
                self.handle_host_ready();
            }
            if ready.agent {
                self.handle_agent_ready();
            }
        }
    }

    /// The status to end with, if nothing is left to be done: the host writes to no memory of ours.
    fn ends(&self) -> Option<u8> {
        let (code, until) = self.over?;
        let slabs = self.registration.slabs();
        if slabs > 0 && self.now < until {
            return None;
        }
        if slabs > 0 {
            warn!(slabs, "the host has not let go of them, and is not waited for any longer");
        }
        info!("ends");
        Some(code)
    }

    fn wait(&mut self) -> Result<Ready, Error> {
        let connect = self.link.is_none().then_some(self.connect_at);
        let start = (self.agent.is_none() && !self.stopping && self.over.is_none()).then_some(self.start_at);
        let due = [connect, start, self.over.map(|(_, until)| until)].into_iter().flatten().min();
        let limit = due.map(|at| {
            let left = at.saturating_duration_since(self.now);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        let interest = |waits| if waits { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let host = self.link.as_mut().map_or(PollFlags::empty(), |post| interest(post.waits()));
        // It says nothing; that it has ended is told by its pidfd.
        let agent_waits = self.agent.as_mut().is_some_and(|agent| agent.post.waits());
        let mut set = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if let Some(agent) = &self.agent {
            set.push(PollFd::new(&agent.pidfd, PollFlags::IN));
            if agent_waits {
                set.push(PollFd::new(&agent.post, PollFlags::OUT));
            }
        }
        let agents = set.len();
        if let Some(link) = &self.link {
            set.push(PollFd::new(link, host));
        }
        match poll(&mut set, limit.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(system("wait for events")(error.into())),
        }
        let ready = |at: usize| set.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            signal: ready(0),
            agent_ended: agents > 1 && ready(1),
            agent: agents > 2 && ready(2),
            host: ready(agents),
        })
    }

    /// Takes a signal; false when there is none any more.
    fn signalled(&self) -> bool {
        rustix::io::read(&self.signals, &mut [0; 128]).is_ok()
    }

    fn handle_agent_ready(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        // A broken one has died, which its pidfd says.
        let _ = agent.post.flush();
    }
}
