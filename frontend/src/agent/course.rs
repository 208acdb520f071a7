//! The course of one connection between program, agent and backend, sans-IO: events go in, the one thing that each makes
//! necessary comes out, and time is an argument.
//!
//! | stage | event | then | act |
//! |---|---|---|---|
//! | idle | due, and a backend answers | opened | `Open` |
//! | idle, opened | backend asks to prepare | preparing | forward (by the caller) |
//! | preparing | program has prepared | prepared | `TellPrepared` |
//! | preparing, withdrawn meanwhile | program has prepared | leaving | `Leave` |
//! | preparing | program refuses | idle, due later | `TellRefused` |
//! | prepared | backend commits | committed | `Ready` |
//! | prepared, committed | backend withdraws or goes away | leaving | `Leave` |
//! | prepared, committed, leaving | neither direction uses the generation | idle, due later | `TellLeft` |
//! | preparing | an executed program inherits it | idle, for good | `TellRefused` |
//! | prepared, committed | an executed program inherits it | leaving, for good | `Part` |
//!
//! A direct lane goes on without its backend: then its generation belongs to a **session** that is over, and nobody is
//! told that it was left.

use std::time::{Duration, Instant};
use vsocket_channel::message::Lane;
use vsocket_channel::reason::Reason;

/// A stay this long shows that the lane works: failures before it are forgotten.
const PROVEN: Duration = Duration::from_secs(10);
/// First pause after a failure that has a pause.
const PAUSE: Duration = Duration::from_millis(100);

/// A program that was busy is certainly asked again after this.
const BUSY: Duration = Duration::from_secs(1);

/// Where a connection stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// The backend does not know of it, or waits for it to be opened again.
    Idle,
    /// The backend may ask to prepare, any time.
    Opened,
    /// The program was asked to prepare.
    Preparing {
        /// The generation.
        generation: u32,
        /// Why it must be left as soon as the program answers.
        withdrawn: Option<Reason>,
    },
    /// The backend knows that it is prepared.
    Prepared {
        /// The generation.
        generation: u32,
    },
    /// The sender may switch, or has.
    Committed {
        /// The generation.
        generation: u32,
        /// Since when.
        since: Instant,
    },
    /// To be left, as soon as both directions have.
    Leaving {
        /// The generation.
        generation: u32,
    },
}

impl Stage {
    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Opened => "opened",
            Self::Preparing { .. } => "preparing",
            Self::Prepared { .. } => "prepared",
            Self::Committed { .. } => "committed",
            Self::Leaving { .. } => "leaving",
        }
    }
}

/// What an event makes necessary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// Tell the backend `Open`.
    Open {
        /// The smallest generation that was not used yet.
        min_generation: u32,
    },
    /// Tell the backend `Prepared`.
    TellPrepared(u32),
    /// Tell the backend `Refused`.
    TellRefused(u32, Reason),
    /// Let the sender switch.
    Ready(u32),
    /// Leave this generation.
    Leave(u32),
    /// Tell the backend `Left`.
    TellLeft(u32),
    /// Tell the backend that this generation is to be left by both ends, because the connection goes back whole.
    Part(u32, Reason),
}

/// The course of one connection.
#[derive(Debug)]
pub struct Course {
    stage: Stage,
    lane: Lane,
    reason: Option<Reason>,
    due: Option<Instant>,
    spent: bool,
    failures: u32,
    last_generation: u32,
    /// Generations that it has not seen would be of stays that nobody has told it of.
    strict: bool,
    /// The backend's session that knows of the generation; 0 is none.
    session: u64,
}

impl Course {
    /// A connection that is to be opened at once.
    pub fn new(now: Instant) -> Self {
        Self {
            stage: Stage::Idle,
            lane: Lane::Tcp,
            reason: None,
            due: Some(now),
            spent: false,
            failures: 0,
            last_generation: 0,
            strict: false,
            session: 0,
        }
    }

    /// A connection that an agent before had opened, up to this generation: to be opened again at once.
    pub fn resumed(last_generation: u32, now: Instant) -> Self {
        // One more than that is asked for; of the largest the backend says that it cannot be.
        Self { last_generation: last_generation.min(u32::MAX - 1), ..Self::new(now) }
    }

    /// A connection of which nobody knows whether it has been on a lane. Its peer knows, whose next generation then is not the first:
    /// the offsets of the two ends would not agree, and it stays on TCP.
    pub fn of_unknown_past(last_generation: u32, now: Instant) -> Self {
        Self { strict: true, ..Self::resumed(last_generation, now) }
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The lane of the generation that is under way, or of the last one.
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// Why it is on TCP, as far as anybody has said; nothing while it is committed.
    pub fn reason(&self) -> Option<Reason> {
        self.reason
    }

    /// When it wants [`Course::open`] to be called.
    pub fn due(&self) -> Option<Instant> {
        self.due.filter(|_| self.stage == Stage::Idle && !self.spent)
    }

    /// The generation that is under way.
    pub fn generation(&self) -> Option<u32> {
        match self.stage {
            Stage::Idle | Stage::Opened => None,
            Stage::Preparing { generation, .. }
            | Stage::Prepared { generation }
            | Stage::Committed { generation, .. }
            | Stage::Leaving { generation } => Some(generation),
        }
    }

    /// The generation that the program has prepared.
    pub fn prepared_generation(&self) -> Option<u32> {
        self.generation().filter(|_| !matches!(self.stage, Stage::Preparing { .. }))
    }

    /// Opens it, if it is time and the backend of this session (0: there is none) can be asked.
    pub fn open(&mut self, session: u64, now: Instant) -> Option<Act> {
        if self.due().is_none_or(|due| due > now) {
            return None;
        }
        if session == 0 {
            self.reason.get_or_insert(Reason::NoBackend);
            return None;
        }
        self.stage = Stage::Opened;
        self.session = session;
        self.reason = Some(Reason::Opening);
        Some(Act::Open { min_generation: self.last_generation + 1 })
    }

    /// The backend says why not; what it may forget is opened again later.
    pub fn handle_declined(&mut self, reason: Reason, now: Instant) {
        if !matches!(self.stage, Stage::Idle | Stage::Opened) {
            return;
        }
        self.reason = Some(reason);
        if matches!(reason, Reason::Quota | Reason::TupleTaken) && self.stage == Stage::Opened {
            self.stage = Stage::Idle;
            self.rest(Duration::from_secs(30), now);
        }
    }

    /// The backend asks to prepare; whether the program is to be asked.
    ///
    /// # Errors
    ///
    /// Why it is refused at once.
    pub fn handle_prepare(&mut self, generation: u32, lane: Lane, session: u64) -> Result<(), Reason> {
        if !matches!(self.stage, Stage::Idle | Stage::Opened) {
            return Err(Reason::Busy);
        }
        if self.spent {
            return Err(self.reason.unwrap_or(Reason::Ending));
        }
        if generation <= self.last_generation {
            return Err(Reason::Superseded);
        }
        if self.strict && generation > self.last_generation + 1 {
            (self.spent, self.reason) = (true, Some(Reason::Untrackable));
            return Err(Reason::Untrackable);
        }
        self.stage = Stage::Preparing { generation, withdrawn: None };
        (self.lane, self.session, self.last_generation) = (lane, session, generation);
        Ok(())
    }

    /// The program has prepared. `None`: it was not asked to.
    pub fn handle_prepared(&mut self, generation: u32) -> Option<Act> {
        match self.stage {
            Stage::Preparing { generation: asked, withdrawn } if asked == generation => {
                if withdrawn.is_some() {
                    self.stage = Stage::Leaving { generation };
                    return Some(Act::Leave(generation));
                }
                self.stage = Stage::Prepared { generation };
                Some(Act::TellPrepared(generation))
            }
            _ => None,
        }
    }

    /// The program cannot. `None`: it was not asked to.
    pub fn handle_refused(&mut self, generation: u32, reason: Reason, now: Instant) -> Option<Act> {
        match self.stage {
            Stage::Preparing { generation: asked, .. } if asked == generation => {}
            _ => return None,
        }
        self.stage = Stage::Idle;
        self.reason = Some(reason);
        match reason {
            Reason::Untrackable | Reason::NotEstablished | Reason::Ending | Reason::Unsupported => {
                self.spent = true;
            }
            // The backend asks again by itself, for a while; this is for when it has given up.
            Reason::Busy => self.due = Some(now + BUSY),
            _ => self.rest(Duration::from_secs(5), now),
        }
        Some(Act::TellRefused(generation, reason))
    }

    /// The backend commits.
    pub fn handle_commit(&mut self, generation: u32, now: Instant) -> Option<Act> {
        match self.stage {
            Stage::Prepared { generation: prepared } if prepared == generation => {
                self.stage = Stage::Committed { generation, since: now };
                self.reason = None;
                Some(Act::Ready(generation))
            }
            _ => None,
        }
    }

    /// The backend withdraws a generation, or (`None`) whatever there is.
    pub fn handle_withdraw(&mut self, generation: Option<u32>, reason: Reason, now: Instant) -> Option<Act> {
        if self.generation().is_none() || generation.is_some_and(|g| Some(g) != self.generation()) {
            if generation.is_none() && self.stage == Stage::Opened {
                self.reason = Some(reason);
            }
            return None;
        }
        match &mut self.stage {
            Stage::Preparing { withdrawn, .. } => {
                withdrawn.get_or_insert(reason);
                self.reason = Some(reason);
                None
            }
            Stage::Prepared { generation } | Stage::Committed { generation, .. } => {
                let generation = *generation;
                self.forget_failures(now);
                self.stage = Stage::Leaving { generation };
                self.reason = Some(reason);
                Some(Act::Leave(generation))
            }
            _ => None,
        }
    }

    /// The backend is gone, or (`reachable`) does not answer: what needs it is left.
    pub fn handle_lost(&mut self, reachable: bool, now: Instant) -> Option<Act> {
        let reason = if reachable { Reason::NotAnswering } else { Reason::BackendGone };
        match self.stage {
            Stage::Committed { .. } if self.lane == Lane::Direct => None,
            // One that does not answer still knows what was opened.
            _ if reachable && self.lane != Lane::Fabric => None,
            Stage::Idle | Stage::Opened => {
                if !reachable {
                    self.stage = Stage::Idle;
                    self.due.get_or_insert(now);
                    self.reason = Some(reason);
                }
                None
            }
            _ => self.handle_withdraw(None, reason, now),
        }
    }

    /// Neither direction uses the generation any more. The act is due only if the backend of `session` knows of it.
    pub fn handle_left(&mut self, session: u64, now: Instant) -> Option<Act> {
        let generation = self.prepared_generation()?;
        self.forget_failures(now);
        self.stage = Stage::Idle;
        let reason = *self.reason.get_or_insert(Reason::PeerLeft);
        self.rest(patience(reason), now);
        (self.session == session && session != 0).then_some(Act::TellLeft(generation))
    }

    /// Others are to find all of it in the kernel's socket: it is never opened again.
    pub fn part(&mut self, reason: Reason, now: Instant) -> Option<Act> {
        self.spent = true;
        self.reason = Some(reason);
        match self.stage {
            Stage::Idle | Stage::Opened | Stage::Leaving { .. } => None,
            Stage::Preparing { generation, .. } => {
                self.stage = Stage::Idle;
                Some(Act::TellRefused(generation, reason))
            }
            Stage::Prepared { generation } | Stage::Committed { generation, .. } => {
                self.forget_failures(now);
                self.stage = Stage::Leaving { generation };
                Some(Act::Part(generation, reason))
            }
        }
    }

    /// It ends: nothing is opened any more. What the backend of `session` is still to be told of its generation.
    pub fn end(&mut self, session: u64) -> Option<Act> {
        let stage = std::mem::replace(&mut self.stage, Stage::Idle);
        self.spent = true;
        if self.session != session || session == 0 {
            return None;
        }
        match stage {
            Stage::Idle | Stage::Opened => None,
            Stage::Preparing { generation, .. } => Some(Act::TellRefused(generation, Reason::Ending)),
            Stage::Prepared { generation }
            | Stage::Committed { generation, .. }
            | Stage::Leaving { generation } => Some(Act::TellLeft(generation)),
        }
    }

    /// Whether the backend of this session has heard of it.
    pub fn known_to(&self, session: u64) -> bool {
        session != 0 && self.session == session
    }

    fn forget_failures(&mut self, now: Instant) {
        if let Stage::Committed { since, .. } = self.stage {
            if now.duration_since(since) >= PROVEN {
                self.failures = 0;
            }
        }
    }

    /// The first two failures cost no pause, each later one twice the pause before.
    fn rest(&mut self, most: Duration, now: Instant) {
        self.failures = (self.failures + 1).min(20);
        let pause = match self.failures {
            0..=2 => Duration::ZERO,
            n => (PAUSE * (1 << (n - 3))).min(most),
        };
        self.due = Some(now + pause);
    }
}

/// The longest pause after this: what comes back by itself is tried soon, what fails on its own account is not.
fn patience(reason: Reason) -> Duration {
    match reason {
        Reason::BackendGone
        | Reason::NoBackend
        | Reason::PeerBackendGone
        | Reason::PeerLeft
        | Reason::Drained
        | Reason::GuestPaused
        | Reason::Busy
        | Reason::NotAnswering => Duration::from_millis(200),
        _ => Duration::from_secs(5),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed(now: Instant, lane: Lane) -> Course {
        let mut course = Course::new(now);
        assert_eq!(course.open(1, now), Some(Act::Open { min_generation: 1 }));
        course.handle_prepare(3, lane, 1).unwrap();
        assert_eq!(course.handle_prepared(3), Some(Act::TellPrepared(3)));
        assert_eq!(course.handle_commit(3, now), Some(Act::Ready(3)));
        assert_eq!(course.reason(), None);
        course
    }

    #[test]
    fn what_an_agent_before_has_used_is_not_used_again() {
        let now = Instant::now();
        let mut course = Course::resumed(7, now);
        assert_eq!(course.open(1, now), Some(Act::Open { min_generation: 8 }));
        assert_eq!(course.handle_prepare(7, Lane::Direct, 1), Err(Reason::Superseded));
        assert_eq!(course.handle_prepare(8, Lane::Direct, 1), Ok(()));
        let mut last = Course::resumed(u32::MAX, now);
        assert_eq!(last.open(1, now), Some(Act::Open { min_generation: u32::MAX }));
    }

    #[test]
    fn one_of_an_unknown_past_stays_on_tcp_if_it_has_one() {
        let now = Instant::now();
        let mut course = Course::of_unknown_past(0, now);
        assert_eq!(course.open(1, now), Some(Act::Open { min_generation: 1 }));
        assert_eq!(course.handle_prepare(1, Lane::Direct, 1), Ok(()));
        course.handle_refused(1, Reason::Busy, now);
        assert_eq!(
            course.handle_prepare(3, Lane::Direct, 1),
            Err(Reason::Untrackable),
            "whose was the second?"
        );
        assert_eq!((course.due(), course.reason()), (None, Some(Reason::Untrackable)));
        assert_eq!(course.handle_prepare(2, Lane::Direct, 1), Err(Reason::Untrackable));
    }

    #[test]
    fn it_is_opened_when_a_backend_comes() {
        let now = Instant::now();
        let mut course = Course::new(now);
        assert_eq!(course.open(0, now), None);
        assert_eq!(course.reason(), Some(Reason::NoBackend));
        assert_eq!(course.open(1, now), Some(Act::Open { min_generation: 1 }));
        assert_eq!(course.open(1, now), None);
        course.handle_declined(Reason::PeerNotOpen, now);
        assert_eq!((course.reason(), course.due()), (Some(Reason::PeerNotOpen), None));
    }

    #[test]
    fn it_goes_round_with_a_new_generation_each_time() {
        let now = Instant::now();
        let mut course = committed(now, Lane::Direct);
        assert_eq!(course.handle_withdraw(Some(2), Reason::Drained, now), None, "another generation");
        assert_eq!(course.handle_withdraw(Some(3), Reason::Drained, now), Some(Act::Leave(3)));
        assert_eq!(course.handle_withdraw(Some(3), Reason::Drained, now), None, "once");
        assert_eq!(course.handle_left(1, now), Some(Act::TellLeft(3)));
        assert_eq!(course.handle_left(1, now), None, "once");
        assert_eq!(course.open(1, now), Some(Act::Open { min_generation: 4 }));
        assert_eq!(course.handle_prepare(3, Lane::Direct, 1), Err(Reason::Superseded));
        assert_eq!(course.handle_prepare(4, Lane::Direct, 1), Ok(()));
    }

    #[test]
    fn what_is_withdrawn_while_the_program_prepares_is_left_when_it_answers() {
        let now = Instant::now();
        let mut course = Course::new(now);
        course.open(1, now);
        course.handle_prepare(1, Lane::Fabric, 1).unwrap();
        assert_eq!(course.handle_prepare(2, Lane::Fabric, 1), Err(Reason::Busy));
        assert_eq!(course.handle_withdraw(Some(1), Reason::PeerLeft, now), None);
        assert_eq!(course.handle_prepared(1), Some(Act::Leave(1)));
        assert_eq!(course.handle_commit(1, now), None, "too late");
        assert_eq!(course.handle_left(1, now), Some(Act::TellLeft(1)));
    }

    #[test]
    fn a_direct_lane_goes_on_without_its_backend() {
        let now = Instant::now();
        let mut course = committed(now, Lane::Direct);
        assert_eq!(course.handle_lost(false, now), None);
        assert_eq!(course.open(2, now), None, "it is on a lane");
        assert_eq!(course.handle_left(2, now), None, "the new backend knows nothing of it");
        assert_eq!(course.open(2, now), Some(Act::Open { min_generation: 4 }));
    }

    #[test]
    fn a_fabric_lane_falls_back_and_returns() {
        let now = Instant::now();
        let mut course = committed(now, Lane::Fabric);
        assert_eq!(course.handle_lost(false, now), Some(Act::Leave(3)));
        assert_eq!(course.handle_left(0, now), None);
        assert_eq!(course.reason(), Some(Reason::BackendGone));
        assert_eq!(course.open(0, now), None);
        assert_eq!(course.open(2, now), Some(Act::Open { min_generation: 4 }));
        assert!(course.known_to(2) && !course.known_to(1));
    }

    #[test]
    fn a_silent_backend_costs_the_fabric_lanes_only() {
        let now = Instant::now();
        assert_eq!(committed(now, Lane::Direct).handle_lost(true, now), None);
        assert_eq!(committed(now, Lane::Fabric).handle_lost(true, now), Some(Act::Leave(3)));
    }

    #[test]
    fn an_untrackable_connection_is_never_opened_again() {
        let now = Instant::now();
        let mut course = Course::new(now);
        course.open(1, now);
        course.handle_prepare(1, Lane::Direct, 1).unwrap();
        assert_eq!(
            course.handle_refused(1, Reason::Untrackable, now),
            Some(Act::TellRefused(1, Reason::Untrackable))
        );
        assert_eq!(course.due(), None);
        assert_eq!(course.handle_prepare(2, Lane::Direct, 1), Err(Reason::Untrackable));
    }

    #[test]
    fn a_lane_that_keeps_failing_backs_off_and_a_good_stay_forgives() {
        let mut now = Instant::now();
        let mut course = Course::new(now);
        let mut pauses = Vec::new();
        for generation in 1..=10 {
            course.open(1, now).unwrap();
            course.handle_prepare(generation, Lane::Fabric, 1).unwrap();
            course.handle_prepared(generation);
            course.handle_commit(generation, now);
            if generation == 10 {
                now += PROVEN;
            }
            course.handle_withdraw(Some(generation), Reason::FabricDown, now);
            course.handle_left(1, now);
            pauses.push((course.due().unwrap() - now).as_millis());
            now = course.due().unwrap();
        }
        assert_eq!(pauses, [0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 0]);
    }

    #[test]
    fn a_busy_program_is_asked_again_without_being_blamed() {
        let now = Instant::now();
        let mut course = Course::new(now);
        course.open(1, now);
        for generation in 1..20 {
            assert_eq!(course.handle_prepare(generation, Lane::Direct, 1), Ok(()), "without an open");
            course.handle_refused(generation, Reason::Busy, now);
            assert_eq!(course.due(), Some(now + BUSY));
        }
    }

    #[test]
    fn what_a_backend_forgets_is_opened_again() {
        let now = Instant::now();
        let mut course = Course::new(now);
        course.open(1, now);
        course.handle_declined(Reason::Quota, now);
        assert!(course.due().is_some());
        assert_eq!(course.end(1), None);
        assert_eq!(course.due(), None);
    }

    #[test]
    fn what_is_inherited_leaves_its_lane_for_good() {
        let now = Instant::now();
        let mut course = committed(now, Lane::Direct);
        assert_eq!(course.part(Reason::Passed, now), Some(Act::Part(3, Reason::Passed)));
        assert_eq!(course.part(Reason::Passed, now), None, "once");
        assert_eq!(course.handle_left(1, now), Some(Act::TellLeft(3)));
        assert_eq!((course.due(), course.reason()), (None, Some(Reason::Passed)));
        let mut course = Course::new(now);
        course.open(1, now);
        course.handle_prepare(1, Lane::Direct, 1).unwrap();
        assert_eq!(course.part(Reason::Inherited, now), Some(Act::TellRefused(1, Reason::Inherited)));
        assert_eq!(course.handle_prepared(1), None);
        assert_eq!(course.handle_prepare(2, Lane::Direct, 1), Err(Reason::Inherited));
    }

    #[test]
    fn the_end_says_what_the_backend_waits_for() {
        let now = Instant::now();
        assert_eq!(committed(now, Lane::Direct).end(1), Some(Act::TellLeft(3)));
        assert_eq!(committed(now, Lane::Direct).end(2), None);
        let mut course = Course::new(now);
        course.open(1, now);
        course.handle_prepare(1, Lane::Direct, 1).unwrap();
        assert_eq!(course.end(1), Some(Act::TellRefused(1, Reason::Ending)));
    }
}
