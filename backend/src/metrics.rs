//! Counters: plain numbers beside the code that counts.

#![forbid(unsafe_code)]

use vsocket_channel::reason::Reason;

/// How often each of a few names was counted.
#[derive(Debug, Default, Clone)]
pub struct Named(Vec<(&'static str, u64)>);

impl Named {
    /// Counts one more of this name.
    pub fn count(&mut self, name: &'static str) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, n)) => *n += 1,
            None => self.0.push((name, 1)),
        }
    }

    /// How many of this name there were.
    pub fn of(&self, name: &str) -> u64 {
        self.0.iter().find(|(known, _)| *known == name).map_or(0, |(_, n)| *n)
    }

    /// All names that were counted.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.0.iter().copied()
    }
}

/// What a vport's flows have carried, seen from the guest.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes taken from the guest and acknowledged by the peer.
    pub tx_bytes: u64,
    /// Segments with payload sent for the guest.
    pub tx_segments: u64,
    /// Bytes put into the guest's rings.
    pub rx_bytes: u64,
    /// Segments with payload received for the guest.
    pub rx_segments: u64,
}

impl Traffic {
    /// Adds another's numbers.
    pub fn add(&mut self, other: Self) {
        self.tx_bytes += other.tx_bytes;
        self.tx_segments += other.tx_segments;
        self.rx_bytes += other.rx_bytes;
        self.rx_segments += other.rx_segments;
    }
}

/// The daemon's totals.
#[derive(Debug, Default)]
pub struct Metrics {
    declines: [u64; Reason::ALL.len()],
    withdrawals: [u64; Reason::ALL.len()],
    /// Messages, segments and connections that were refused, by name.
    pub drops: Named,
}

impl Metrics {
    /// An agent was told that a connection stays on TCP.
    pub fn declined(&mut self, reason: Reason) {
        count(&mut self.declines, reason);
    }

    /// An agent was told to leave a lane.
    pub fn withdrawn(&mut self, reason: Reason) {
        count(&mut self.withdrawals, reason);
    }

    /// Declines by reason, those that happened.
    pub fn declines(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        named(&self.declines)
    }

    /// Withdrawals by reason, those that happened.
    pub fn withdrawals(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        named(&self.withdrawals)
    }
}

fn count(counters: &mut [u64; Reason::ALL.len()], reason: Reason) {
    if let Some(at) = Reason::ALL.iter().position(|r| *r == reason) {
        counters[at] += 1;
    }
}

fn named(counters: &[u64; Reason::ALL.len()]) -> impl Iterator<Item = (&'static str, u64)> + '_ {
    Reason::ALL.iter().zip(counters).filter(|(_, n)| **n > 0).map(|(reason, n)| (reason.name(), *n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happened_is_shown() {
        let mut metrics = Metrics::default();
        metrics.declined(Reason::Quota);
        metrics.declined(Reason::Quota);
        metrics.drops.count("x");
        assert_eq!(metrics.declines().collect::<Vec<_>>(), [("quota", 2)]);
        assert_eq!(metrics.withdrawals().count(), 0);
        assert_eq!((metrics.drops.of("x"), metrics.drops.of("y")), (1, 0));
    }
}
