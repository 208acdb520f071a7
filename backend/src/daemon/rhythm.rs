//! When the daemon polls on, when it asks the kernel, and when it sleeps.
//!
//! Time alone would not do. Where many share a processor, a pass that offered it to the others ends when they have had
//! their turn: 50 µs are over before the far side has run once, and every message would find its receiver on the way to
//! sleep, or asleep. So both must have gone by, the time and a number of passes, up to a time after which a sleeper,
//! whom the scheduler prefers when it wakes, is better off.
//!
//! The processors of a **virtual machine** do not take turns: one that polls keeps its processor until the scheduler takes
//! it away, milliseconds later, and a bell to or from it takes a hundred times as long as one of ours. While such ones are
//! looked at, who would offer the processor naps instead, and does so for longer before it sleeps.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Polling goes on for so long without work.
const SPIN: Duration = Duration::from_micros(50);
/// And for so many passes.
const SPIN_PASSES: u32 = 4;
/// But not for longer than that.
const SPIN_MOST: Duration = Duration::from_millis(2);

/// The same beside a virtual machine, where a nap costs next to nothing.
const SPIN_MACHINE: Duration = Duration::from_millis(5);
/// A nap is so many times as long as a look costs, in processor time: looking in vain takes a ninth of a processor, however
/// slow the machine, and the rest is left to the machines, which share it with us. Where a look and the way into and out of
/// a nap cost 30 µs, two emulated machines of two hosts on two processors got 1.3 to 2.5 k redis requests/s (10 connections)
/// with naps of 50 µs, 3.1 to 3.3 with 150, 2.1 to 6.3 with 200, 3.0 to 4.9 with 300, 3.1 to 3.6 with 400, and 1.2 to 1.8 by
/// TCP, on a machine that others used as well.
const NAP_LOOKS: u32 = 8;
/// But not shorter, as the kernel's way into a nap and out of it is no shorter.
const NAP_LEAST: Duration = Duration::from_micros(20);
/// Nor longer: it is what a message may have to wait.
const NAP_MOST: Duration = Duration::from_micros(250);

/// While polling, the kernel is asked this often.
const ASK: Duration = Duration::from_micros(50);
/// But not more often than every so many passes.
const ASK_PASSES: u32 = 16;
/// And at least this often.
const ASK_MOST: Duration = Duration::from_millis(1);

/// See the module.
#[derive(Debug)]
pub(super) struct Rhythm {
    worked_at: Instant,
    asked_at: Instant,
    idle: u32,
    unasked: u32,
    /// What a look costs, smoothed.
    look: Duration,
    /// Processor time at the last nap, if no work came after it.
    spent: Option<Duration>,
}

impl Rhythm {
    pub fn new(now: Instant) -> Self {
        Self { worked_at: now, asked_at: now, idle: 0, unasked: 0, look: Duration::ZERO, spent: None }
    }

    /// A pass has ended.
    pub fn passed(&mut self, now: Instant, worked: bool) {
        self.unasked = self.unasked.saturating_add(1);
        self.idle = self.idle.saturating_add(1);
        if worked {
            (self.worked_at, self.idle, self.spent) = (now, 0, None);
        }
    }

    /// How long the nap is that begins now; `spent`: processor time so far.
    pub fn nap(&mut self, spent: Duration) -> Duration {
        if let Some(before) = self.spent.replace(spent) {
            let cost = spent.saturating_sub(before).min(NAP_MOST);
            self.look = (self.look * 7 + cost) / 8;
        }
        (self.look * NAP_LOOKS).clamp(NAP_LEAST, NAP_MOST)
    }

    /// The kernel was asked; `slept`: and kept us.
    pub fn asked(&mut self, now: Instant, slept: bool) {
        (self.asked_at, self.unasked) = (now, 0);
        if slept {
            (self.worked_at, self.idle) = (now, 0);
        }
    }

    /// Whether there was work so recently that the next is waited for awake. `machines`: beside virtual machines.
    pub fn spins(&self, now: Instant, machines: bool) -> bool {
        let since = now.saturating_duration_since(self.worked_at);
        let spin = if machines { SPIN_MACHINE } else { SPIN };
        since < spin || (self.idle < SPIN_PASSES && since < SPIN_MOST)
    }

    /// Whether the kernel is to be asked again.
    pub fn asks(&self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.asked_at);
        (since >= ASK && self.unasked >= ASK_PASSES) || since >= ASK_MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICRO: Duration = Duration::from_micros(1);

    #[test]
    fn spins_for_a_time_and_some_passes() {
        let begun = Instant::now();
        let mut rhythm = Rhythm::new(begun);
        (1..100).for_each(|n| rhythm.passed(begun + MICRO / 2 * n, false));
        let spins = |rhythm: &Rhythm, now| rhythm.spins(now, false);
        assert!(spins(&rhythm, begun + SPIN - MICRO) && !spins(&rhythm, begun + SPIN), "alone: by time");
        rhythm.passed(begun + SPIN, true);
        assert!(spins(&rhythm, begun + SPIN * 2), "among others: by passes");
        let now = begun + SPIN * 2;
        (0..SPIN_PASSES).for_each(|_| rhythm.passed(now, false));
        assert!(!spins(&rhythm, now));
        rhythm.asked(now, true);
        assert!(spins(&rhythm, now), "who was woken looks around");
        assert!(!spins(&rhythm, now + SPIN_MOST), "beside one who never yields");
    }

    #[test]
    fn spins_longer_beside_machines() {
        let begun = Instant::now();
        let mut rhythm = Rhythm::new(begun);
        (0..100).for_each(|_| rhythm.passed(begun, false));
        assert!(
            rhythm.spins(begun + SPIN_MACHINE - MICRO, true) && !rhythm.spins(begun + SPIN_MACHINE, true)
        );
    }

    #[test]
    fn naps_for_as_long_as_looking_costs() {
        let mut rhythm = Rhythm::new(Instant::now());
        let mut spent = Duration::ZERO;
        let mut settle = |rhythm: &mut Rhythm, cost| {
            (0..64).fold(Duration::ZERO, |_, _| {
                spent += cost;
                rhythm.nap(spent)
            })
        };
        let nap = settle(&mut rhythm, MICRO * 10);
        assert!((MICRO * 75..=MICRO * 80).contains(&nap), "{nap:?}");
        assert_eq!(settle(&mut rhythm, MICRO), NAP_LEAST);
        assert_eq!(settle(&mut rhythm, MICRO * 1000), NAP_MOST);
        // What work costs is not what looking costs.
        let before = settle(&mut rhythm, MICRO * 10);
        rhythm.passed(Instant::now(), true);
        assert_eq!(rhythm.nap(spent + MICRO * 1000), before);
    }

    #[test]
    fn asks_now_and_then() {
        let begun = Instant::now();
        let mut rhythm = Rhythm::new(begun);
        (0..ASK_PASSES).for_each(|_| rhythm.passed(begun, true));
        assert!(!rhythm.asks(begun + ASK - MICRO) && rhythm.asks(begun + ASK));
        rhythm.asked(begun + ASK, false);
        assert!(!rhythm.asks(begun + ASK * 2), "few passes");
        assert!(rhythm.asks(begun + ASK + ASK_MOST));
    }
}
