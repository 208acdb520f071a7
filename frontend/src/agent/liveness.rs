//! Does the backend still answer? Asked only while bytes on fabric lanes are unacknowledged. Sans-IO.
//!
//! | state | event | then |
//! |---|---|---|
//! | asleep | a program rang the watchdog | awake: look in 100 ms |
//! | awake | looked, something is unacknowledged | a ping is outstanding; look in 100 ms |
//! | awake | looked, nothing is | asleep, after the programs were told and one more look |
//! | awake | no pong for 500 ms | silent: fabric lanes are left, and none is opened |
//! | silent | every 200 ms | one more ping |
//! | silent | a pong | awake; connections are opened again |
//! | awake or silent | the backend goes | awake: a program that rang once will not ring again before it is told |

use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_millis(100);
const BOUND: Duration = Duration::from_millis(500);
const RETRY: Duration = Duration::from_millis(200);
/// Pings that may be under way to a backend that is silent.
const MOST_PINGS: u32 = 16;

/// What is to be done now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Task {
    /// Look whether anything is unacknowledged, and tell [`Liveness::handle_look`].
    Look,
    /// Send this ping.
    Ping(u64),
    /// The backend does not answer: leave the fabric lanes.
    Silent,
}

/// What is known of the backend.
#[derive(Debug, Default)]
pub struct Liveness {
    look_at: Option<Instant>,
    asked: Option<Instant>,
    silent: Option<Instant>,
    under_way: u32,
    last: u64,
}

impl Liveness {
    /// The backend does not answer.
    pub fn is_silent(&self) -> bool {
        self.silent.is_some()
    }

    /// A program has put bytes on a fabric lane.
    pub fn handle_wake(&mut self, now: Instant) {
        if self.silent.is_none() {
            self.look_at.get_or_insert(now + LOOK);
        }
    }

    /// Whether anything is unacknowledged.
    pub fn handle_look(&mut self, unacknowledged: bool, now: Instant) -> Option<Task> {
        if self.silent.is_some() || !unacknowledged {
            // A ping that is still out is forgotten: nothing depends on its answer.
            (self.look_at, self.asked) = (None, None);
            return None;
        }
        self.look_at = Some(now + LOOK);
        if self.asked.is_some() {
            return None;
        }
        self.asked = Some(now);
        Some(self.ping())
    }

    /// The backend has answered. Whether it had been silent.
    pub fn handle_pong(&mut self, now: Instant) -> bool {
        self.asked = None;
        self.under_way = 0;
        let was_silent = self.silent.take().is_some();
        if was_silent {
            // The programs were never told that the watch sleeps, so it is awake.
            self.look_at = Some(now + LOOK);
        }
        was_silent
    }

    /// The backend is another one, or none. A watch that was not asleep stays awake: the programs will not wake it.
    pub fn reset(&mut self, now: Instant) {
        let awake = self.look_at.is_some() || self.asked.is_some() || self.silent.is_some();
        *self = Self { last: self.last, look_at: awake.then_some(now + LOOK), ..Self::default() };
    }

    /// When [`Liveness::poll`] has something.
    pub fn next_deadline(&self) -> Option<Instant> {
        let bound = self.asked.map(|at| at + BOUND);
        let look = [self.look_at, bound].into_iter().flatten().min();
        self.silent.or(look)
    }

    /// The next thing that is due.
    pub fn poll(&mut self, now: Instant) -> Option<Task> {
        if let Some(at) = self.silent {
            if at > now {
                return None;
            }
            self.silent = Some(now + RETRY);
            return (self.under_way < MOST_PINGS).then(|| self.ping());
        }
        if self.asked.is_some_and(|at| at + BOUND <= now) {
            (self.look_at, self.asked) = (None, None);
            self.silent = Some(now);
            return Some(Task::Silent);
        }
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_at = None;
            return Some(Task::Look);
        }
        None
    }

    fn ping(&mut self) -> Task {
        self.last += 1;
        self.under_way += 1;
        Task::Ping(self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn nothing_is_due_while_asleep() {
        let mut live = Liveness::default();
        assert_eq!(live.next_deadline(), None);
        let t = Instant::now();
        live.handle_wake(t);
        live.handle_wake(at(t, 50));
        assert_eq!(live.next_deadline(), Some(at(t, 100)));
        assert_eq!(live.poll(at(t, 99)), None);
        assert_eq!(live.poll(at(t, 100)), Some(Task::Look));
        assert_eq!(live.handle_look(false, at(t, 100)), None);
        assert_eq!(live.next_deadline(), None);
    }

    #[test]
    fn one_ping_is_outstanding_and_an_answer_suffices() {
        let mut live = Liveness::default();
        let t = Instant::now();
        assert_eq!(live.handle_look(true, t), Some(Task::Ping(1)));
        assert_eq!(live.handle_look(true, at(t, 100)), None);
        assert!(!live.handle_pong(at(t, 100)));
        assert_eq!(live.poll(at(t, 600)), Some(Task::Look));
        assert_eq!(live.handle_look(true, at(t, 600)), Some(Task::Ping(2)));
    }

    #[test]
    fn silence_is_noticed_and_so_is_its_end() {
        let mut live = Liveness::default();
        let t = Instant::now();
        live.handle_look(true, t);
        assert_eq!(live.poll(at(t, 499)), Some(Task::Look));
        live.handle_look(true, at(t, 499));
        assert_eq!(live.poll(at(t, 500)), Some(Task::Silent));
        assert!(live.is_silent());
        live.handle_wake(at(t, 500));
        assert_eq!(live.poll(at(t, 500)), Some(Task::Ping(2)));
        assert_eq!(live.poll(at(t, 500)), None);
        assert_eq!(live.next_deadline(), Some(at(t, 700)));
        assert_eq!(live.poll(at(t, 700)), Some(Task::Ping(3)));
        assert!(live.handle_pong(at(t, 700)));
        assert!(!live.is_silent());
        // Who rang before was not told that the watch sleeps, and will not ring again: it is awake.
        assert_eq!(live.next_deadline(), Some(at(t, 800)));
    }

    #[test]
    fn pings_to_a_stopped_backend_do_not_pile_up() {
        let mut live = Liveness::default();
        let t = Instant::now();
        live.handle_look(true, t);
        let mut pings = 1;
        for i in 0..1000 {
            pings += u32::from(matches!(live.poll(at(t, 500 + 200 * i)), Some(Task::Ping(_))));
        }
        assert_eq!(pings, MOST_PINGS);
    }

    #[test]
    fn another_backend_starts_afresh() {
        let mut live = Liveness::default();
        let t = Instant::now();
        live.handle_look(true, t);
        live.poll(at(t, 500));
        live.reset(at(t, 500));
        assert!(!live.is_silent());
        assert_eq!(live.next_deadline(), Some(at(t, 600)));
        let mut asleep = Liveness::default();
        asleep.reset(t);
        assert_eq!(asleep.next_deadline(), None);
    }
}
