//! Virtual machines: their fronts, and who calls from inside them.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use mio::Interest;
use vsocket_channel::message::{Malformed, Message};

use super::{Daemon, Source};
use crate::carrier::{Carrier, Gone};
use crate::machine::{Front, Machine};

/// Messages of one front that one turn takes.
const BUDGET: usize = 64;

impl Daemon {
    pub(super) fn machine(&mut self, vport: u32) -> Option<&mut Machine> {
        self.vports[vport as usize].machine.as_mut()
    }

    pub(super) fn front(&mut self, vport: u32) -> Option<&mut Front> {
        self.machine(vport)?.front.as_mut()
    }

    pub(super) fn front_arrives(&mut self, vport: u32) {
        // One that has just gone must not keep its successor out.
        self.front_ready(vport);
        loop {
            match self.vports[vport as usize].accept() {
                Ok(None) => return,
                Ok(Some(carrier)) => self.attach_front(vport, carrier),
                Err(error) => return tracing::warn!(%error, vport, "cannot accept a front"),
            }
        }
    }

    fn attach_front(&mut self, vport: u32, carrier: Carrier) {
        if self.front(vport).is_some() {
            return self.metrics.drops.count("second-front");
        }
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self.watch(carrier.raw_fd(), Source::Front(vport), interest) {
            return tracing::warn!(%error, vport, "cannot watch a front");
        }
        if let Some(machine) = self.machine(vport) {
            machine.front = Some(Front { carrier, pid: None });
        }
    }

    pub(super) fn front_ready(&mut self, vport: u32) {
        for _ in 0..BUDGET {
            let Some(front) = self.front(vport) else { return };
            let received = front.carrier.flush().and_then(|()| front.carrier.receive_with());
            let result = match received {
                Ok(None) => return,
                Ok(Some((message, fd))) => self.front_says(vport, &message, fd),
                Err(gone) => Err(gone),
            };
            if let Err(gone) = result {
                return self.detach_front(vport, &gone);
            }
        }
        self.more.push(Source::Front(vport));
    }

    fn front_says(&mut self, vport: u32, message: &Message, fd: Option<OwnedFd>) -> Result<(), Gone> {
        let known = self.front(vport).is_some_and(|front| front.pid.is_some());
        let config = self.vports[vport as usize].config.machine.clone();
        let (Some(machine), Some(config)) = (self.machine(vport), config) else { return Ok(()) };
        match *message {
            Message::FrontHello { pid, cid } if !known => {
                if cid != u64::from(config.cid) {
                    self.metrics.drops.count("front-cid");
                    return Err(Gone::Closed);
                }
                return self.welcome_front(vport, pid);
            }
            Message::FrontRegion { table, region } if known => {
                if machine.keeper.is_some() {
                    self.end_registration(vport, "the guest's memory is another");
                }
                let Some(machine) = self.machine(vport) else { return Ok(()) };
                if let Err(name) = machine.take_region(table, region, fd) {
                    tracing::warn!(
                        vport,
                        name,
                        "cannot use the guest's memory: want memory-backend-memfd, share=on"
                    );
                    self.metrics.drops.count(name);
                }
            }
            Message::FrontStream { guest_port, host_port, .. } if known => {
                if let Some(stream) = fd.filter(|_| host_port == config.port) {
                    self.caller_arrives(vport, guest_port, stream);
                } else {
                    self.metrics.drops.count("caller-port");
                }
            }
            Message::FrontToken { token } if known && token != 0 => machine.token = Some(token),
            Message::FrontReset {} if known => {
                machine.handle_reset();
                self.end_registration(vport, "the guest has booted");
                self.pairing.handle_pause(vport, false);
            }
            Message::FrontPaused {} if known => {
                (machine.paused, machine.quiet_due) = (true, true);
                self.quieting.push(vport);
                self.pairing.handle_pause(vport, true);
            }
            Message::FrontResumed {} if known => {
                (machine.paused, machine.quiet_due) = (false, false);
                self.pairing.handle_pause(vport, false);
                self.take_slabs(vport, None);
            }
            Message::FrontGone {} if known => {
                machine.handle_gone();
                self.end_registration(vport, "the guest is gone");
                self.pairing.handle_pause(vport, false);
            }
            _ => {
                self.metrics.drops.count("message-unexpected");
                return Err(Gone::Malformed(Malformed::Kind(0)));
            }
        }
        Ok(())
    }

    /// Answers the fronts of guests that stand still, once nothing of their memory is touched.
    pub(super) fn answer_quiet(&mut self) {
        for vport in std::mem::take(&mut self.quieting) {
            if self.machine(vport).is_none_or(|machine| !machine.quiet_due) {
                continue;
            }
            if !self.pairing.is_quiet(vport) {
                self.quieting.push(vport);
                continue;
            }
            let Some(machine) = self.machine(vport) else { continue };
            machine.quiet_due = false;
            let Some(front) = &mut machine.front else { continue };
            if let Err(gone) = front.carrier.send(&Message::FrontQuiet {}, vec![]) {
                self.detach_front(vport, &gone);
            }
        }
    }

    fn welcome_front(&mut self, vport: u32, pid: u32) -> Result<(), Gone> {
        tracing::info!(vport, pid, "front attached");
        let (welcome, pidfd) = (Message::FrontWelcome { boot: self.boot }, self.pidfd.clone());
        let Some(front) = self.front(vport) else { return Ok(()) };
        front.pid = Some(pid);
        front.carrier.send(&welcome, vec![pidfd])
    }

    /// Its streams, if it is not dead, are still there; the memory, the token, and whether the guest stands still, it will
    /// tell again.
    pub(super) fn detach_front(&mut self, vport: u32, gone: &Gone) {
        let Some(machine) = self.machine(vport) else { return };
        let Some(front) = machine.front.take() else { return };
        machine.handle_gone();
        self.unwatch(front.carrier.raw_fd());
        self.end_registration(vport, "the front is gone");
        self.pairing.handle_pause(vport, false);
        if let Some(name) = gone.name() {
            self.metrics.drops.count(name);
        }
        tracing::info!(vport, pid = front.pid, reason = %gone, "front detached");
    }

    // ------------------------------------------------------------ callers

    fn caller_arrives(&mut self, vport: u32, guest_port: u32, stream: OwnedFd) {
        let Some(machine) = self.machine(vport) else { return };
        let slot = match machine.admit(stream, guest_port) {
            Ok(slot) => slot,
            Err(name) => return self.metrics.drops.count(name),
        };
        let fd = machine.caller(slot).map(|caller| caller.carrier.raw_fd());
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Some(Err(error)) = fd.map(|fd| self.watch(fd, Source::Caller(vport, slot), interest)) {
            tracing::warn!(%error, vport, "cannot watch a caller");
            self.machine(vport).and_then(|machine| machine.take_caller(slot));
        }
    }

    /// The first message says what a caller is for.
    pub(super) fn caller_ready(&mut self, vport: u32, slot: u32) {
        let Some(caller) = self.machine(vport).and_then(|machine| machine.caller(slot)) else { return };
        let received = match caller.carrier.receive() {
            Ok(None) => return,
            other => other,
        };
        let Some(caller) = self.machine(vport).and_then(|machine| machine.take_caller(slot)) else { return };
        self.unwatch(caller.carrier.raw_fd());
        let refusal = match received {
            Ok(Some(Message::Register { token, pid })) => {
                return self.register(vport, caller, token, pid);
            }
            Ok(Some(Message::Present { token, program, bell })) => {
                return self.present(vport, caller, token, program, bell);
            }
            Ok(_) => Some("message-unexpected"),
            Err(gone) => gone.name(),
        };
        if let Some(name) = refusal {
            self.metrics.drops.count(name);
        }
    }
}
