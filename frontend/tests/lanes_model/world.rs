//! One state of the world: the product's two halves of a direction, and the environment around them.

use crate::anchor::Anchor;
use crate::receiver::ReceiverAt;
use crate::sender::SenderAt;
use vsocket_channel::lane::Stay;
use vsocket_frontend::lane::Violation;
use vsocket_frontend::lane::rx::RxState;
use vsocket_frontend::lane::tx::{Phase, TxState};

/// Most generations of a configuration.
pub const GENERATIONS: usize = 4;
/// Wire counters only count relative to each other: in every state the kernel's stand here.
pub const WIRE: u64 = 1000;

/// What carries the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    /// One shared ring.
    Direct,
    /// Two rings, with backends between.
    Fabric,
}

/// One rule left out, or turned round. Each must be found out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutation {
    /// The escape byte equals the first byte on the ring.
    SameEscape,
    /// The receiver delivers raw bytes that it has already.
    KeepDuplicates,
    /// A stay that begins below what was read raw is accepted.
    StaleStay,
    /// A stay that was announced in time counts although the read then went past it.
    NoCheckAfterRaw,
    /// recv takes what is there, not what FIONREAD counted before.
    Uncapped,
    /// Acknowledgements count after the seal.
    LateAcks,
    /// The receiver closes without looking for a stay after it has said so.
    NoSecondLook,
    /// The backend confirms without looking whether the receiver has closed.
    BlindConfirm,
    /// Who takes the sender's lock over does not ask the kernel.
    SenderUnrecovered,
    /// Who takes the receiver's lock over does not ask the kernel.
    ReceiverUnrecovered,
    /// Who takes the receiver's lock over leaves the rest of a judged frame on the anchor.
    FrameLeft,
    /// Ring bytes are published before they are recorded.
    PublishFirst,
    /// The sender's record is written field by field, and its writer dies between two.
    TornRecord,
    /// The ring's head is sampled before the anchor is peeked.
    HeadFirst,
    /// The frame is taken from the anchor before the verdict is stored.
    ConsumeFirst,
    /// The sender seals only what was confirmed.
    WaitForBackend,
    /// A sender's guest of which nothing is left ends a stay with a plain FIN.
    DeadGuestFin,
    /// A sender that only leaves says that it has shut.
    ShutUnshut,
    /// Equivalent, so it must *not* be found out: the stay is not looked for again after a raw read, as the look before the
    /// next one finds the same.
    NoLookAfterRaw,
}

impl Mutation {
    /// The rule matters when a process dies between two steps.
    fn is_about_deaths(self) -> bool {
        matches!(
            self,
            Self::FrameLeft
                | Self::SenderUnrecovered
                | Self::ReceiverUnrecovered
                | Self::TornRecord
                | Self::ConsumeFirst
        )
    }
}

/// Bounds, and which rule is broken.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub lane: Lane,
    /// What the application sends.
    pub data: &'static [u8],
    /// How many bytes of that.
    pub bytes: u64,
    /// The offsets at which a call may stop short; it may also move all there are.
    pub cuts: &'static [u64],
    /// Bytes a ring holds.
    pub ring: u64,
    /// Bytes the anchor holds.
    pub anchor: u64,
    /// How often a generation is prepared.
    pub generations: usize,
    /// Frames may be written in parts.
    pub parts: bool,
    /// Processes of the sender, of the receiver may die.
    pub sender_dies: bool,
    pub receiver_dies: bool,
    /// The anchor may be reset.
    pub aborts: bool,
    pub mutation: Option<Mutation>,
}

impl Config {
    pub fn mutated(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// Sizes of a call that can move up to `most` bytes from offset `at` on.
    pub fn sizes(&self, at: u64, most: u64) -> impl Iterator<Item = u64> {
        let short = self.cuts.iter().map(|cut| cut.saturating_sub(at)).find(|n| *n > 0);
        let short = short.filter(|n| *n < most);
        short.into_iter().chain((most > 0).then_some(most))
    }
}

/// An invariant does not hold.
#[derive(Debug)]
pub struct Broken(pub String);

impl From<Violation> for Broken {
    fn from(violation: Violation) -> Self {
        Self(format!("honest parties, yet: {violation}"))
    }
}

pub fn require(holds: bool, what: impl FnOnce() -> String) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(Broken(what())) }
}

/// The backends' state for one generation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Relay {
    /// Killed, or it has seen that the receiver closed.
    #[default]
    Gone,
    /// No segment was delivered.
    Fresh,
    /// The stay is stored at the receiver, `reader.sealed` not yet loaded.
    StayStored,
    /// Bytes flow.
    Open,
}

/// The memory of one generation, never used for another one (quarantine).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Generation {
    pub start: u8,
    pub escape: u8,
    /// Sender's direction memory; on a direct lane only `published` counts.
    pub published: bool,
    pub tx_head: u8,
    pub tx_tail: u8,
    pub confirmed: bool,
    pub relay: Relay,
    /// Receiver's direction memory; on a direct lane the shared one.
    pub announced: bool,
    pub head: u8,
    pub tail: u8,
    pub reader_sealed: bool,
    /// The stay had not been passed by raw reads when it was announced (for [`Mutation::NoCheckAfterRaw`]).
    pub in_time: bool,
}

impl Generation {
    /// The receiver finds (g, S, e) in its direction memory.
    pub fn announce(&mut self, raw: u64) {
        self.announced = true;
        self.head = self.start;
        self.tail = self.start;
        self.in_time = u64::from(self.start) >= raw;
    }

    /// What `Direction::stay` gives the receiver.
    pub fn stay(&self, generation: u32) -> Option<Stay> {
        self.announced.then(|| Stay { generation, start: self.start.into(), escape: self.escape })
    }
}

/// How the direction ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum End {
    No,
    /// The receiver has read to the end.
    Eof,
    /// The receiver's application got an error.
    Error,
    /// The receiver's application was gone, and its agent has drained the anchor.
    Drained,
}

/// Who makes a move: it decides what counts as a way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The endpoints, of themselves: libraries and agents, also when backends and peers do nothing.
    Duty,
    /// An application's call.
    Application,
    /// Backends, pairing, and every misfortune.
    Environment,
}

#[derive(Debug)]
pub struct Move {
    pub kind: Kind,
    pub what: &'static str,
    pub n: u64,
    pub to: Result<World, Broken>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct World {
    pub tx: TxState,
    pub rx: RxState,
    pub sender: SenderAt,
    pub receiver: ReceiverAt,
    pub anchor: Anchor,
    pub generations: [Generation; GENERATIONS],
    /// Generations prepared so far.
    pub prepared: u8,
    /// The generation for which the sender has READY, or 0.
    pub ready: u8,
    /// What the receiver's applications got.
    pub delivered: u8,
    /// What send calls that returned have accepted.
    pub accepted: u8,
    /// The sender's last descriptor is closed, or its application has died.
    pub closed: bool,
    pub sender_died: bool,
    pub receiver_died: bool,
    /// Nothing of the sender's guest is left: application, agent and keeper.
    pub guest_gone: bool,
    /// Nobody reads any more; the receiver's agent drains the anchor.
    pub unread: bool,
    pub end: End,
}

/// Collects the moves out of a state.
pub struct Moves<'a> {
    pub from: &'a World,
    pub out: Vec<Move>,
}

impl Moves<'_> {
    /// A move, if `change` does not find that it breaks something.
    pub fn add(
        &mut self,
        kind: Kind,
        what: &'static str,
        n: u64,
        change: impl FnOnce(&mut World) -> Result<(), Broken>,
    ) {
        let mut world = *self.from;
        let to = change(&mut world).map(|()| {
            world.normalise();
            world
        });
        self.out.push(Move { kind, what, n, to });
    }
}

impl World {
    pub fn new(_: &Config) -> Self {
        let mut world = Self {
            tx: TxState::new(0),
            rx: RxState::new(0),
            sender: SenderAt::Idle,
            receiver: ReceiverAt::Idle,
            anchor: Anchor::default(),
            generations: [Generation::default(); GENERATIONS],
            prepared: 0,
            ready: 0,
            delivered: 0,
            accepted: 0,
            closed: false,
            sender_died: false,
            receiver_died: false,
            guest_gone: false,
            unread: false,
            end: End::No,
        };
        world.normalise();
        world
    }

    pub fn generation(&mut self, generation: u32) -> &mut Generation {
        &mut self.generations[generation as usize - 1]
    }

    pub fn phase(&self) -> Phase {
        self.tx.phase().expect("a phase")
    }

    pub fn moves(&self, config: &Config) -> Vec<Move> {
        let mut moves = Moves { from: self, out: Vec::new() };
        if !self.ended() {
            crate::sender::moves(&mut moves, config);
            crate::receiver::moves(&mut moves, config);
            crate::fate::moves(&mut moves, config);
        }
        moves.out
    }

    pub fn ended(&self) -> bool {
        self.end != End::No
    }

    /// Every byte that was accepted has arrived; the applications need do nothing more for it.
    pub fn caught_up(&self) -> bool {
        let sender = self.sender == SenderAt::Idle && self.phase() != Phase::Draining;
        let arrived = if self.unread {
            self.anchor.is_empty() && self.phase() == Phase::Anchor
        } else {
            u64::from(self.delivered) == self.tx.off
        };
        self.ended() || (!self.anchor.reset && sender && arrived)
    }

    /// The end of the stream was read.
    pub fn eof(&mut self) -> Result<(), Broken> {
        let (delivered, off) = (self.delivered, self.tx.off);
        require(u64::from(delivered) == off && delivered >= self.accepted, || {
            format!("EOF at {delivered} of {off}")
        })?;
        self.end = End::Eof;
        Ok(())
    }

    /// What must hold in every state, besides what the moves require.
    pub fn check(&self, config: &Config) -> Result<(), Broken> {
        // Of a reset socket the kernel tells nothing, and nothing is asked. Of a rule about deaths the harm is to be shown,
        // not that a counter is wrong.
        if self.anchor.reset || config.mutation.is_some_and(Mutation::is_about_deaths) {
            return Ok(());
        }
        if self.sender == SenderAt::Idle {
            let (recorded, kernel) = (self.tx.wire, self.anchor.put);
            require(recorded == kernel, || format!("the sender records {recorded}, put {kernel}"))?;
            let (off, accepted) = (self.tx.off, self.accepted);
            require(off >= accepted.into(), || format!("{accepted} accepted, {off} recorded"))?;
        }
        if self.receiver == ReceiverAt::Idle && !self.unread {
            let (recorded, kernel) = (self.rx.wire, self.anchor.taken);
            require(recorded == kernel, || format!("the receiver records {recorded}, took {kernel}"))?;
            let (off, delivered) = (self.rx.off, self.delivered);
            require(off == u64::from(delivered), || format!("{delivered} delivered, {off} recorded"))?;
        }
        Ok(())
    }

    /// Makes states equal that differ only in statistics, in how many bytes ever passed, or in memory that nobody reads
    /// again.
    fn normalise(&mut self) {
        self.tx.on_ring = 0;
        self.rx.on_ring = 0;
        self.tx.wire = (self.tx.wire + WIRE).wrapping_sub(self.anchor.put);
        self.anchor.put = WIRE;
        self.rx.wire = (self.rx.wire + WIRE).wrapping_sub(self.anchor.taken);
        self.anchor.taken = WIRE;
        for g in 1..=u32::from(self.prepared) {
            let sender = self.sender_uses(g);
            let residue = self.rx.off < self.rx.kept || self.receiver != ReceiverAt::Idle;
            let receiver = g == self.rx.generation || residue && g + 1 == self.rx.min_generation;
            if !sender && !receiver {
                *self.generation(g) = Generation::default();
            }
        }
    }

    /// The sender may still look at the memory of this generation.
    pub fn sender_uses(&self, g: u32) -> bool {
        g == u32::from(self.ready) || g == self.tx.generation && self.phase() != Phase::Anchor
    }

    pub fn summary(&self) -> String {
        let Self { tx, rx, .. } = self;
        format!(
            "tx {:?} g{} {}/{} | {} | rx g{} {}/{} kept {}",
            self.phase(),
            tx.generation,
            tx.raw,
            tx.off,
            self.anchor,
            rx.generation,
            rx.raw,
            rx.off,
            rx.kept
        )
    }
}
