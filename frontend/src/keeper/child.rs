//! The agent as the keeper's child: this very program once more, with a socket to the keeper for its standard input.

#![forbid(unsafe_code)]

use crate::carrier::Carrier;
use crate::host::Host;
use crate::post::Post;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tracing::warn;

/// The argument, beside the keeper's own, that says that standard input is the keeper, and of which host.
const KEPT: &str = "--kept";
/// Pause before an agent that has died is started again; twice as long each time,
const BACKOFF: Duration = Duration::from_millis(100);
/// up to this,
const BACKOFF_MOST: Duration = Duration::from_secs(5);
/// until one has lived so long.
const PROVEN: Duration = Duration::from_secs(10);
/// A panic's status; a program that ends in order has another.
const PANIC: i32 = 101;

/// An agent.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// The socket to it.
    pub post: Post,
    since: Instant,
}

impl Agent {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// Out of descriptors or processes.
    pub fn start(host: &Host, now: Instant) -> io::Result<Self> {
        let (ours, theirs) = Carrier::pair()?;
        let mut args = std::env::args_os();
        let name = args.next().unwrap_or_else(|| "vsocket".into());
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(name)
            .args(args)
            .arg(KEPT)
            .arg(host.to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        let child = as_before(|| command.spawn())?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Self { child, pidfd, post: Post::new(ours), since: now })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it to end.
    pub fn signal(&self, signal: Signal) {
        if let Err(error) = kill_process(Pid::from_child(&self.child), signal) {
            warn!(%error, "cannot signal the agent");
        }
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Whether it has lived long enough to be a sound one.
    pub fn is_proven(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= PROVEN
    }
}

/// What the kernel adds to a process's badness when memory is short; -1000 is never chosen.
const BADNESS: &str = "/proc/self/oom_score_adj";

/// Keeps the kernel from choosing the keeper when memory is short: all that it has mapped counts as its own, and its end
/// would set free what the host writes to. What `start` starts is as the keeper was before.
fn as_before<T>(start: impl FnOnce() -> T) -> T {
    static BEFORE: OnceLock<String> = OnceLock::new();
    let before = BEFORE.get_or_init(|| std::fs::read_to_string(BADNESS).unwrap_or_default());
    // Without the right to it (in a container) it stays as it is.
    let _ = std::fs::write(BADNESS, before);
    let started = start();
    let _ = std::fs::write(BADNESS, "-1000");
    started
}

/// Its status, if an agent has ended in order: nothing that another one would do better.
pub fn in_order(status: ExitStatus) -> Option<u8> {
    let code = status.code().filter(|code| *code != PANIC && status.signal().is_none())?;
    u8::try_from(code).ok()
}

/// How long to wait before the next is started.
#[derive(Debug, Default)]
pub struct Backoff(u32);

impl Backoff {
    /// The pause after one that has died, `proven` or not.
    pub fn next(&mut self, proven: bool) -> Duration {
        self.0 = if proven { 0 } else { self.0.saturating_add(1) };
        (BACKOFF * (1 << self.0.saturating_sub(1).min(10))).min(BACKOFF_MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_until_one_is_proven() {
        let mut backoff = Backoff::default();
        let millis: Vec<u128> = (0..8).map(|_| backoff.next(false).as_millis()).collect();
        assert_eq!(millis, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.next(true), BACKOFF);
    }

    #[test]
    fn an_end_by_a_signal_or_a_panic_is_not_in_order() {
        let of = |raw: i32| in_order(ExitStatus::from_raw(raw));
        assert_eq!([of(0), of(1 << 8), of(9), of(PANIC << 8)], [Some(0), Some(1), None, None]);
    }
}
