//! A side's way through a plan: its own steps when it is its turn, and the turn handed over.

use crate::actors::{Actors, Order};
use crate::calls::Scene;
use crate::end::{End, TABLE};
use crate::plan::{CHILD, Call, MAIN, Plan, Step, Wait};
use crate::sys;
use libc::c_int;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// What one side tells the other between turns.
pub struct Token {
    words: [u64; 7],
}

impl Token {
    fn send(&self, mut to: &UnixStream) -> io::Result<()> {
        let bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        to.write_all(&bytes)
    }

    fn receive(mut from: &UnixStream) -> io::Result<Self> {
        let mut bytes = [0; 56];
        from.read_exact(&mut bytes)?;
        let mut words = bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(b.try_into().unwrap_or_default()));
        Ok(Self { words: std::array::from_fn(|_| words.next().unwrap_or(0)) })
    }
}

/// A side in a plan.
pub struct Side<'a> {
    number: usize,
    end: &'static End,
    actors: Actors,
    control: &'a UnixStream,
    steps: Arc<Vec<Step>>,
    holds: bool,
    /// Each step is told as it begins, for what hangs.
    traces: bool,
    drain: &'a dyn Fn(bool),
    /// Each step that this side made, and what came of it.
    pub story: Vec<(usize, String)>,
}

impl<'a> Side<'a> {
    /// Side `number`, connected, with its way to the other.
    pub fn new(
        number: usize,
        end: &'static End,
        (plan, fd): (Plan, c_int),
        control: &'a UnixStream,
        drain: &'a dyn Fn(bool),
    ) -> Self {
        end.clear();
        end.held[MAIN].set(1u64);
        end.orphans.set(u64::from(plan.orphans));
        TABLE.lock().expect("nobody panics with it").slots[0] = fd;
        let steps = Arc::new(plan.steps);
        let scene = Scene { end, direction: number as u8 + 1 };
        let actors = Actors::new(scene, steps.clone());
        let traces = std::env::var_os("FUZZ_TRACE").is_some();
        Self { number, end, actors, control, steps, holds: number == 0, traces, drain, story: Vec::new() }
    }

    /// Goes through it.
    pub fn run(&mut self) -> io::Result<()> {
        for i in 0..self.steps.len() {
            let step = self.steps[i];
            match (step.side == self.number, step.call) {
                (true, call) => {
                    if self.traces {
                        eprintln!("{} {} {} {call:?}", step.at, self.number, step.actor);
                    }
                    let unsettled = self.take()?;
                    let said = match call {
                        Call::Meet { wait, .. } => self.meet(i, wait)?,
                        Call::Drain { on } => {
                            (self.drain)(on);
                            "done".into()
                        }
                        Call::Spawn { .. } | Call::End { .. } => self.actors.turn(call),
                        _ => self.actors.order(step.actor, Order::Step(i)),
                    };
                    self.story.push((step.at, format!("{said}{unsettled}")));
                }
                (false, Call::Meet { delay, sends, .. }) => self.answer(step.at, delay, sends)?,
                (false, _) => self.give(false)?,
            }
        }
        self.part()
    }

    /// Neither side ends what the other may still look at.
    fn part(&self) -> io::Result<()> {
        let mut control = self.control;
        control.write_all(&[0])?;
        control.read_exact(&mut [0])
    }

    /// Ends it.
    pub fn over(self) -> Vec<(usize, String)> {
        self.actors.over();
        self.story
    }

    /// Takes the turn, if it is the other's; what did not come that should have.
    fn take(&mut self) -> io::Result<String> {
        if self.holds {
            return Ok(String::new());
        }
        self.holds = true;
        self.heard().map(|(unsettled, _)| unsettled)
    }

    /// Hands the turn over, if it is this side's. `meet` says that a call waits here meanwhile.
    fn give(&mut self, meet: bool) -> io::Result<()> {
        if !self.holds {
            return Ok(());
        }
        self.holds = false;
        self.say(meet)
    }

    fn say(&mut self, meet: bool) -> io::Result<()> {
        if let Some(holder) = self.actors.holder() {
            self.actors.order(holder, Order::Flush);
        }
        let [a, b, c, d, e, f] = self.end.token();
        Token { words: [a, b, c, d, e, f, meet.into()] }.send(self.control)
    }

    fn heard(&mut self) -> io::Result<(String, bool)> {
        let [a, b, c, d, e, f, meet] = Token::receive(self.control)?.words;
        self.end.learn([a, b, c, d, e, f]);
        let holder = self.actors.holder();
        let unsettled = holder.map(|actor| self.actors.order(actor, Order::Settle)).unwrap_or_default();
        Ok((unsettled, meet != 0))
    }

    /// Waits for what the other side does now.
    fn meet(&mut self, i: usize, wait: Wait) -> io::Result<String> {
        let serial = TABLE.lock().expect("nobody panics with it").serial;
        let child = self.steps[i].actor >= CHILD && matches!(wait, Wait::Events);
        let meets = self.end.awaits(wait, serial) && !child;
        self.say(meets)?;
        let said =
            if meets { self.actors.order(self.steps[i].actor, Order::Step(i)) } else { "not now".into() };
        let (unsettled, _) = self.heard()?;
        Ok(format!("{said}{unsettled}"))
    }

    /// Does what the other side waits for.
    fn answer(&mut self, at: usize, delay: u64, sends: usize) -> io::Result<()> {
        self.give(false)?;
        let (unsettled, meets) = self.heard()?;
        let mut said = "not now".to_owned();
        if let (true, Some(holder)) = (meets, self.actors.holder()) {
            if delay > 0 {
                std::thread::sleep(Duration::from_micros(delay));
            }
            said = self.actors.order(holder, Order::Answer(sends));
        }
        self.story.push((at, format!("{said}{unsettled}")));
        self.say(false)
    }
}

/// Rounds of one byte that make a connection worth its lane; the last is 2.
pub fn round(fd: c_int, byte: u8) -> Result<(), String> {
    let sent = sys::send(fd, &[byte], 0);
    let mut back = [0];
    let got = sys::recv(fd, &mut back, libc::MSG_WAITALL);
    if sent.0 == 1 && got.0 == 1 && back[0] == byte {
        Ok(())
    } else {
        Err(format!("a round: {sent} {got} {back:?}"))
    }
}

/// The other end of the rounds.
pub fn rounds(fd: c_int) -> Result<(), String> {
    loop {
        let mut byte = [0];
        let got = sys::recv(fd, &mut byte, libc::MSG_WAITALL);
        if got.0 != 1 || sys::send(fd, &byte, 0).0 != 1 {
            return Err(format!("a round there: {got}"));
        }
        if byte[0] == 2 {
            return Ok(());
        }
    }
}
