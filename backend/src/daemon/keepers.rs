//! What the guests of virtual machines lend: who registers it, and what becomes of each slab.

#![forbid(unsafe_code)]

use std::sync::Weak;

use mio::Interest;
use rustix::io::Errno;
use vsocket_channel::message::{Message, Runs};
use vsocket_channel::reason::Reason;

use super::{Daemon, Source};
use crate::carrier::Gone;
use crate::machine::{Caller, Keeper};
use crate::slab::{Doorbell, Memory};

/// Messages of one keeper, and reads of one doorbell, that one turn takes.
const BUDGET: usize = 64;
const EDGES: Interest = Interest::READABLE.add(Interest::WRITABLE);

impl Daemon {
    // ------------------------------------------------------------ registration

    /// A caller wants to register.
    pub(super) fn register(&mut self, vport: u32, caller: Caller, token: u128, pid: u32) {
        let mut fresh = [0; 16];
        if let Err(error) = getrandom::fill(&mut fresh) {
            return tracing::warn!(%error, vport, "no random numbers for a registration");
        }
        let Some(machine) = self.machine(vport) else { return };
        let fresh = u128::from_le_bytes(fresh).max(1);
        let token = match machine.handle_register(caller.privileged, token, fresh) {
            Ok(token) => token,
            Err(name) => return self.metrics.drops.count(name),
        };
        // He knows the token, so he stands for the one before.
        self.end_registration(vport, "somebody registers anew");
        if let Err(error) = self.watch(caller.carrier.raw_fd(), Source::Keeper(vport), EDGES) {
            return tracing::warn!(%error, vport, "cannot watch a keeper");
        }
        let Some(machine) = self.machine(vport) else { return };
        machine.keeper = Some(Keeper { carrier: caller.carrier, pid, answered: false });
        if let Some(Err(gone)) =
            self.front(vport).map(|front| front.carrier.send(&Message::FrontToken { token }, vec![]))
        {
            return self.detach_front(vport, &gone);
        }
        self.answer_keeper(vport);
        self.keeper_ready(vport);
    }

    /// Tells a keeper that it has registered, once nothing of what was lent before is touched any more.
    fn answer_keeper(&mut self, vport: u32) {
        if self.pool.lent(vport) > 0 || self.lingering.iter().any(|(of, ..)| *of == vport) {
            return;
        }
        let boot = self.boot;
        let Some(machine) = self.machine(vport) else { return };
        let (Some(token), Some(keeper)) = (machine.token, &mut machine.keeper) else { return };
        if std::mem::replace(&mut keeper.answered, true) {
            return;
        }
        tracing::info!(vport, pid = keeper.pid, "keeper registered");
        let result = keeper.carrier.send(&Message::Registered { token, boot }, vec![]);
        self.pool.open_lender(vport);
        self.pairing.handle_memory_of(vport);
        self.or_lose_keeper(vport, result);
    }

    /// Ends what a keeper has registered, and with it the agent's session: lanes leave the guest's memory.
    pub(super) fn end_registration(&mut self, vport: u32, why: &str) {
        let Some(machine) = self.machine(vport) else { return };
        let Some(keeper) = machine.keeper.take() else { return };
        tracing::info!(vport, pid = keeper.pid, why, "registration ends");
        self.unwatch(keeper.carrier.raw_fd());
        drop(keeper);
        self.detach(vport, &Gone::Closed);
        self.end_programs(vport);
        self.pool.close_lender(vport);
    }

    fn or_lose_keeper(&mut self, vport: u32, result: Result<(), Gone>) {
        let Err(gone) = result else { return };
        if let Some(name) = gone.name() {
            self.metrics.drops.count(name);
        }
        self.end_registration(vport, &gone.to_string());
    }

    /// Takes what a keeper has said.
    pub(super) fn keeper_ready(&mut self, vport: u32) {
        for _ in 0..BUDGET {
            let Some(keeper) = self.machine(vport).and_then(|machine| machine.keeper.as_mut()) else {
                return;
            };
            let result = match keeper.carrier.flush().and_then(|()| keeper.carrier.receive()) {
                Ok(None) => return,
                Ok(Some(message)) => self.keeper_says(vport, message),
                Err(gone) => Err(gone),
            };
            self.or_lose_keeper(vport, result);
        }
        self.more.push(Source::Keeper(vport));
    }

    fn keeper_says(&mut self, vport: u32, message: Message) -> Result<(), Gone> {
        match message {
            Message::SlabPages { slab, first, runs } => self.take_pages(vport, slab, first, &runs),
            Message::SlabRefused { slab, reason } => {
                tracing::info!(vport, slab, reason = reason.name(), "the guest has no memory for a slab");
                self.refuse_slab(vport, slab);
                Ok(())
            }
            _ => {
                self.metrics.drops.count("message-unexpected");
                Err(Gone::Closed)
            }
        }
    }

    fn tell_keeper(&mut self, vport: u32, message: &Message) -> Result<(), Gone> {
        let keeper = self.machine(vport).and_then(|machine| machine.keeper.as_mut());
        let Some(keeper) = keeper.filter(|keeper| keeper.answered) else { return Ok(()) };
        keeper.carrier.send(message, vec![])
    }

    // ------------------------------------------------------------ slabs

    /// The pool wants a slab.
    pub(super) fn want_slab(&mut self, vport: u32, slab: u64) {
        let Some(want) = self.pool.want(vport, slab) else { return };
        let (geometry, (_, program)) = (want.geometry, want.program());
        if let Some(machine) = self.machine(vport) {
            machine.lending.ask(slab, program, geometry);
        }
        let result = self.tell_keeper(vport, &Message::SlabWanted { slab, program, geometry });
        self.or_lose_keeper(vport, result);
    }

    fn take_pages(&mut self, vport: u32, slab: u64, first: u32, runs: &Runs) -> Result<(), Gone> {
        let Some(machine) = self.machine(vport) else { return Ok(()) };
        match machine.lending.take_pages(machine.memory.as_ref(), slab, first, runs) {
            Ok(()) => {
                self.take_slabs(vport, None);
                Ok(())
            }
            // The program has ended meanwhile: it is the keeper's again.
            Err("pages-unknown") if first > 0 => Ok(()),
            Err(name) => {
                self.metrics.drops.count(name);
                self.refuse_slab(vport, slab);
                self.tell_keeper(vport, &Message::SlabRelease { slab })
            }
        }
    }

    /// Takes the slabs that are whole, of one program or of all. Nothing of a guest that stands still.
    pub(super) fn take_slabs(&mut self, vport: u32, program: Option<u64>) {
        let Some(machine) = self.machine(vport).filter(|machine| !machine.paused) else { return };
        for slab in machine.lending.whole(program) {
            let Some(want) = self.pool.want(vport, slab) else { continue };
            let Some(machine) = self.machine(vport) else { return };
            match machine.lending.map(slab) {
                Ok(None) => {}
                Ok(Some((memory, bells))) => {
                    self.pool.lend(vport, slab, memory, bells);
                    self.pairing.handle_memory(want.program());
                }
                Err(error) => {
                    tracing::warn!(%error, vport, "cannot map a guest's pages; see vm.max_map_count");
                    self.refuse_slab(vport, slab);
                    let result = self.tell_keeper(vport, &Message::SlabRelease { slab });
                    self.or_lose_keeper(vport, result);
                }
            }
        }
    }

    fn refuse_slab(&mut self, vport: u32, slab: u64) {
        if let Some(machine) = self.machine(vport) {
            machine.lending.forget(slab);
        }
        if let Some(program) = self.pool.handle_refused(vport, slab) {
            self.pairing.handle_memory(program);
        }
    }

    /// Gives back the slabs whose mapping is gone, so that nobody here touches them.
    pub(super) fn return_slabs(&mut self) {
        let gone = |(_, _, memory): &mut (_, _, Weak<Memory>)| memory.strong_count() == 0;
        let gone: Vec<_> = self.lingering.extract_if(.., gone).collect();
        for (vport, slab, _) in gone {
            let result = self.tell_keeper(vport, &Message::SlabRelease { slab });
            self.or_lose_keeper(vport, result);
            self.answer_keeper(vport);
        }
    }

    // ------------------------------------------------------------ agents and bells

    /// A caller says that he is the agent, or one of its doorbells.
    pub(super) fn present(&mut self, vport: u32, caller: Caller, token: u128, program: u64, bell: u32) {
        let Some(machine) = self.machine(vport) else { return };
        if !machine.knows(token) {
            return self.metrics.drops.count("present-token");
        }
        if program == 0 {
            // One that has just gone must not keep its successor out.
            self.agent_ready(vport);
            let most = self.vports[vport as usize].config.max_connections;
            self.attach(vport, caller.carrier.for_connections(most));
            return self.agent_ready(vport);
        }
        let bell_of = Doorbell::stream(caller.carrier.into_socket(), self.bells_full.clone());
        let fd = bell_of.raw_fd();
        let Some(machine) = self.machine(vport) else { return };
        match machine.lending.take_bell(program, bell, bell_of) {
            Err(name) => return self.metrics.drops.count(name),
            Ok(None) => {}
            Ok(Some(slot)) => {
                if let Err(error) = self.watch(fd, Source::GuestBell(vport, slot), Interest::READABLE) {
                    tracing::warn!(%error, vport, "cannot watch a doorbell");
                }
                self.guest_rings(vport, slot);
            }
        }
        self.take_slabs(vport, Some(program));
    }

    /// A program rings, or has ended.
    pub(super) fn guest_rings(&mut self, vport: u32, slot: u32) {
        let Some(machine) = self.machine(vport) else { return };
        let Some((program, bell)) = machine.lending.ringer(slot) else { return };
        let mut rings = [0; 4096];
        let mut more = 0;
        let ended = loop {
            match rustix::io::read(bell, &mut rings) {
                Ok(0) => break true,
                Ok(_) if more == BUDGET => break false,
                Ok(_) | Err(Errno::INTR) => more += 1,
                Err(Errno::AGAIN) => break false,
                Err(_) => break true,
            }
        };
        if ended {
            return self.end_program(vport, program);
        }
        if more == BUDGET {
            self.more.push(Source::GuestBell(vport, slot));
        }
        for slab in self.pool.slabs_of((vport, program)) {
            self.bell_rung(slab);
        }
    }

    fn end_program(&mut self, vport: u32, program: u64) {
        let Some(machine) = self.machine(vport) else { return };
        let (bell, coming) = machine.lending.end_program(program);
        if let Some(bell) = bell {
            self.unwatch(bell.raw_fd());
        }
        for slab in coming {
            let result = self.tell_keeper(vport, &Message::SlabRelease { slab });
            self.or_lose_keeper(vport, result);
        }
        self.pairing.handle_program_gone((vport, program), Reason::PeerLeft);
        self.pool.retire_program((vport, program));
    }

    /// The agent has gone, and its programs with their doorbells and slabs. The next one counts them anew.
    pub(super) fn end_programs(&mut self, vport: u32) {
        let Some(machine) = self.machine(vport) else { return };
        for program in machine.lending.programs() {
            self.end_program(vport, program);
        }
        let Some(machine) = self.machine(vport) else { return };
        for slab in machine.lending.forget_slabs() {
            self.pool.forget_want(vport, slab);
            let result = self.tell_keeper(vport, &Message::SlabRelease { slab });
            self.or_lose_keeper(vport, result);
        }
    }

    /// Tells agents of doorbells that are to be read empty.
    pub(super) fn empty_bells(&mut self) {
        for vport in 0..self.vports.len() as u32 {
            let full = self.machine(vport).map(|machine| machine.lending.full()).unwrap_or_default();
            for (program, bell) in full {
                if let Err(gone) =
                    self.vports[vport as usize].tell(&Message::BellFull { program, bell }, vec![])
                {
                    self.detach(vport, &gone);
                }
            }
        }
    }
}
