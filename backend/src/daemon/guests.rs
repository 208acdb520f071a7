//! Agents: who may attach, what they say, and how they go.

#![forbid(unsafe_code)]

use mio::Interest;
use vsocket_channel::message::Message;

use super::{Daemon, Source};
use crate::carrier::{Carrier, Fds, Gone};
use crate::pairing::EndId;
use crate::vport::Agent;

/// Messages of one agent that one turn takes, so that no guest keeps the others waiting.
const BUDGET: usize = 64;

impl Daemon {
    pub(super) fn agent_arrives(&mut self, vport: u32) {
        // One that has just gone must not keep its successor out.
        self.agent_ready(vport);
        loop {
            match self.vports[vport as usize].accept() {
                Ok(None) => return,
                Ok(Some(carrier)) => self.attach(vport, carrier),
                Err(error) => {
                    tracing::warn!(%error, vport, "cannot accept an agent");
                    return;
                }
            }
        }
    }

    pub(super) fn attach(&mut self, vport: u32, carrier: Carrier) {
        if self.vports[vport as usize].agent.is_some() {
            self.metrics.drops.count("second-agent");
            return;
        }
        let interest = Interest::READABLE | Interest::WRITABLE;
        match self.watch(carrier.raw_fd(), Source::Agent(vport), interest) {
            Ok(()) => self.vports[vport as usize].agent = Some(Agent { carrier, pid: None }),
            Err(error) => tracing::warn!(%error, vport, "cannot watch an agent"),
        }
    }

    /// Takes what an agent has said, and sends what waits for it.
    pub(super) fn agent_ready(&mut self, vport: u32) {
        for _ in 0..BUDGET {
            let Some(agent) = &mut self.vports[vport as usize].agent else { return };
            let received = agent.carrier.flush().and_then(|()| agent.carrier.receive());
            let result = match received {
                Ok(None) => return,
                Ok(Some(message)) => self.agent_says(vport, message),
                Err(gone) => Err(gone),
            };
            if let Err(gone) = result {
                return self.detach(vport, &gone);
            }
        }
        self.more.push(Source::Agent(vport));
    }

    pub(super) fn agent_says(&mut self, vport: u32, message: Message) -> Result<(), Gone> {
        let Some(agent) = &mut self.vports[vport as usize].agent else { return Ok(()) };
        let end = |conn| EndId { vport, conn };
        if agent.pid.is_none() != matches!(message, Message::Hello { .. }) {
            return self.unexpected();
        }
        match message {
            Message::Hello { pid } => {
                agent.pid = Some(pid);
                // A virtual machine's front has the pidfd, and stands for it.
                let beside: Fds =
                    agent.carrier.passes_descriptors().then(|| self.pidfd.clone()).into_iter().collect();
                tracing::info!(vport, pid, "agent attached");
                let vni = self.vports[vport as usize].config.vni;
                let welcome = Message::Welcome { vni, boot: self.boot };
                return self.vports[vport as usize].tell(&welcome, beside);
            }
            Message::Open { conn, program, tuple, min_generation } => {
                self.pairing.handle_open(end(conn), program, tuple, min_generation);
            }
            Message::Prepared { conn, generation } => self.pairing.handle_prepared(end(conn), generation),
            Message::Refused { conn, generation, reason } => {
                self.pairing.handle_refused(end(conn), generation, reason, std::time::Instant::now());
            }
            Message::Withdraw { conn, generation, reason } => {
                self.pairing.handle_leaving(end(conn), generation, reason);
            }
            Message::Left { conn, generation } => self.pairing.handle_left(end(conn), generation),
            Message::Close { conn } => self.pairing.handle_close(end(conn)),
            Message::Ended { program } => self.pool.retire_program((vport, program)),
            Message::Ping { n } => {
                return self.vports[vport as usize].tell(&Message::Pong { n }, vec![]);
            }
            _ => return self.unexpected(),
        }
        Ok(())
    }

    /// A message that this end of the protocol never gets.
    fn unexpected(&mut self) -> Result<(), Gone> {
        self.metrics.drops.count("message-unexpected");
        Err(Gone::Closed)
    }

    pub(super) fn detach(&mut self, vport: u32, gone: &Gone) {
        let Some(agent) = self.vports[vport as usize].agent.take() else { return };
        self.unwatch(agent.carrier.raw_fd());
        if let Some(name) = gone.name() {
            self.metrics.drops.count(name);
        }
        tracing::info!(vport, pid = agent.pid, reason = %gone, "agent detached");
        self.pairing.handle_detached(vport);
        self.pool.retire(vport);
        #[cfg(feature = "vm")]
        self.end_programs(vport);
    }
}
