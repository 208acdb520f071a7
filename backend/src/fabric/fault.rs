//! A fabric with bad days: wraps any other, and does by a seed what a real one does by chance.
//!
//! It never breaks the contract, it only uses all of it: queues that are full without reason, work that leaves late,
//! queue pairs that die. What stands on a fabric and survives this has read the contract.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use super::{
    Access, DomainId, Endpoint, Error, Event, Fabric, Facts, Kind, LocalRange, MemoryKey, PostError, QpId,
    Region, RemoteAddress, Secret, Signal, WorkId,
};

/// How often, in 1024ths of the occasions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Plan {
    /// A post finds the queue full.
    pub full: u16,
    /// A flush comes only with the next poll.
    pub late: u16,
    /// A post finds that the queue pair has just died.
    pub cut: u16,
}

/// See the module.
pub struct Faulty<F> {
    inner: F,
    plan: Plan,
    state: u64,
    room: Vec<QpId>,
    held: bool,
}

impl<F: Fabric> Faulty<F> {
    /// Wraps a fabric. The same seed and the same calls give the same faults.
    pub fn new(inner: F, plan: Plan, seed: u64) -> Self {
        Self { inner, plan, state: seed, room: Vec::new(), held: false }
    }

    /// Whether it happens this time (splitmix64).
    fn happens(&mut self, chance: u16) -> bool {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) & 1023) < u64::from(chance)
    }

    fn obstruct(&mut self, qp: QpId) -> Result<(), PostError> {
        if self.happens(self.plan.cut) {
            self.inner.close(qp);
            return Err(PostError::NotConnected);
        }
        if self.happens(self.plan.full) {
            if !self.room.contains(&qp) {
                self.room.push(qp);
            }
            return Err(PostError::Full);
        }
        Ok(())
    }
}

impl<F: Fabric> AsFd for Faulty<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl<F: Fabric> Fabric for Faulty<F> {
    fn kind(&self) -> Kind {
        self.inner.kind()
    }

    fn facts(&self) -> Facts {
        self.inner.facts()
    }

    fn open_domain(&mut self) -> DomainId {
        self.inner.open_domain()
    }

    fn close_domain(&mut self, domain: DomainId) {
        self.inner.close_domain(domain);
    }

    fn register(&mut self, domain: DomainId, region: Region, access: Access) -> Result<MemoryKey, Error> {
        self.inner.register(domain, region, access)
    }

    fn deregister(&mut self, key: MemoryKey) -> Result<(), Error> {
        self.inner.deregister(key)
    }

    fn expect(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error> {
        self.inner.expect(domain, vni, secret, now)
    }

    fn dial(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        offer: &Endpoint,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error> {
        self.inner.dial(domain, vni, secret, offer, now)
    }

    fn accept(&mut self, qp: QpId, answer: &Endpoint) -> Result<(), Error> {
        self.inner.accept(qp, answer)
    }

    fn close(&mut self, qp: QpId) {
        self.inner.close(qp);
    }

    fn post_send(
        &mut self,
        qp: QpId,
        work: WorkId,
        gather: &[&[u8]],
        signal: Signal,
    ) -> Result<(), PostError> {
        self.obstruct(qp)?;
        self.inner.post_send(qp, work, gather, signal)
    }

    fn post_write(
        &mut self,
        qp: QpId,
        work: WorkId,
        local: LocalRange,
        remote: RemoteAddress,
        signal: Signal,
    ) -> Result<(), PostError> {
        self.obstruct(qp)?;
        self.inner.post_write(qp, work, local, remote, signal)
    }

    fn flush(&mut self) {
        if self.happens(self.plan.late) {
            self.held = true;
        } else {
            self.inner.flush();
        }
    }

    fn poll(&mut self) -> Option<Event<'_>> {
        if std::mem::take(&mut self.held) {
            self.inner.flush();
        }
        let inner = self.inner.poll();
        if let Some(Event::Disconnected { qp, .. } | Event::Room { qp }) = &inner {
            self.room.retain(|other| other != qp);
        }
        inner.or_else(|| self.room.pop().map(|qp| Event::Room { qp }))
    }

    fn rest(&mut self) {
        self.inner.rest();
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.inner.next_deadline()
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.inner.handle_timeout(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::{Disconnect, loopback};

    /// Sends numbers until `count` have arrived or the queue pair is cut; gives what arrived and why it ended.
    fn run(plan: Plan, seed: u64, count: u64) -> (u64, Option<Disconnect>) {
        let (a, mut b) = loopback::pair().unwrap();
        let mut a = Faulty::new(a, plan, seed);
        let (here, there) = (a.open_domain(), b.open_domain());
        let now = Instant::now();
        let (_, offer) = b.expect(there, 1, [1; 32], now).unwrap();
        let (qp, _) = a.dial(here, 1, [1; 32], &offer, now).unwrap();
        let (mut next, mut arrived, mut room, mut end) = (0_u64, 0, true, None);
        while arrived < count && end.is_none() {
            while room && next < count {
                match a.post_send(qp, WorkId(next), &[&next.to_be_bytes()], Signal::No) {
                    Ok(()) => next += 1,
                    Err(PostError::Full) => room = false,
                    Err(PostError::NotConnected) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            a.flush();
            while let Some(event) = a.poll() {
                match event {
                    Event::Room { .. } => room = true,
                    Event::Disconnected { reason, .. } => end = Some(reason),
                    _ => {}
                }
            }
            while let Some(event) = b.poll() {
                if let Event::Received { payload, .. } = event {
                    assert_eq!(payload, arrived.to_be_bytes());
                    arrived += 1;
                }
            }
        }
        (arrived, end)
    }

    #[test]
    fn delays_lose_nothing() {
        for seed in 0..20 {
            assert_eq!(run(Plan { full: 300, late: 500, cut: 0 }, seed, 500), (500, None), "seed {seed}");
        }
    }

    #[test]
    fn a_cut_is_an_end_and_repeats_with_its_seed() {
        let plan = Plan { full: 100, late: 100, cut: 10 };
        for seed in 0..20 {
            let first = run(plan, seed, 10_000);
            assert_eq!(first.1, Some(Disconnect::Closed), "seed {seed}");
            assert_eq!(run(plan, seed, 10_000), first, "seed {seed}");
        }
    }
}
