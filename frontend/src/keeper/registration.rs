//! What a keeper and its host have agreed on, sans-IO: messages go in, what is to be done comes out. `M` is a slab's memory,
//! which is let go by being dropped; that happens in two places here, and nowhere else.
//!
//! | state | event | then | memory |
//! |---|---|---|---|
//! | no stream | it is connected | asking: `Register` goes out | |
//! | asking | `Registered` | registered | all of earlier registrations is let go |
//! | registered | `SlabWanted` | made, told to the agent, then to the host | kept |
//! | registered | `SlabRelease` | told to the agent | this slab's is let go |
//! | any | the stream ends | no stream | **kept**: who is at its other end may still write |

#![forbid(unsafe_code)]

use std::collections::HashMap;
use vsocket_channel::layout::Geometry;
use vsocket_channel::message::Message;

/// What a message makes necessary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// Keep the new token, and tell the agent.
    Registered,
    /// Make memory, and [`Registration::keep`] it.
    Make {
        /// Which slab.
        slab: u64,
        /// The program that will map it.
        program: u64,
        /// Its sizes.
        geometry: Geometry,
    },
    /// Tell the agent that this slab is gone.
    Released(u64),
    /// Nothing.
    Nothing,
}

/// A message that makes no sense now: the stream is of no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Nonsense;

/// A registration, and the slabs that the host may write to.
#[derive(Debug)]
pub struct Registration<M> {
    token: u128,
    /// The backend's boot, while there is a registration.
    boot: Option<u64>,
    slabs: HashMap<u64, M>,
}

impl<M> Registration<M> {
    /// None yet; `token` is that of an earlier one, or 0.
    pub fn new(token: u128) -> Self {
        Self { token, boot: None, slabs: HashMap::new() }
    }

    /// What is said first on a new stream.
    pub fn hello(&self, pid: u32) -> Message {
        Message::Register { token: self.token, pid }
    }

    /// What an agent is told first, if there is a registration.
    pub fn current(&self) -> Option<Message> {
        self.boot.map(|boot| Message::Registered { token: self.token, boot })
    }

    /// The token, as it was last given.
    pub fn token(&self) -> u128 {
        self.token
    }

    /// How many slabs the host may write to.
    pub fn slabs(&self) -> usize {
        self.slabs.len()
    }

    /// The host says something.
    ///
    /// # Errors
    ///
    /// [`Nonsense`].
    pub fn handle(&mut self, message: Message) -> Result<Act, Nonsense> {
        match (message, self.boot) {
            (Message::Registered { token, boot }, None) => {
                self.slabs.clear();
                (self.token, self.boot) = (token, Some(boot));
                Ok(Act::Registered)
            }
            (Message::SlabWanted { slab, program, geometry }, Some(_)) if !self.slabs.contains_key(&slab) => {
                Ok(Act::Make { slab, program, geometry })
            }
            // One that was refused may be released before the host has read that.
            (Message::SlabRelease { slab }, Some(_)) => {
                Ok(self.slabs.remove(&slab).map_or(Act::Nothing, |_| Act::Released(slab)))
            }
            _ => Err(Nonsense),
        }
    }

    /// From here on the host may write to this memory.
    pub fn keep(&mut self, slab: u64, memory: M) {
        self.slabs.insert(slab, memory);
    }

    /// The stream has ended. Whether there was a registration.
    pub fn handle_ended(&mut self) -> bool {
        self.boot.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    const REGISTERED: Message = Message::Registered { token: 9, boot: 1 };

    fn wanted(slab: u64) -> Message {
        Message::SlabWanted { slab, program: 1, geometry: Geometry::new(1, 4096).unwrap() }
    }

    #[test]
    fn memory_is_let_go_when_the_host_says_so_and_not_before() {
        let memory = Rc::new(());
        let mut with = Registration::new(0);
        assert_eq!(with.handle(wanted(1)), Err(Nonsense), "not registered");
        assert_eq!(with.handle(REGISTERED), Ok(Act::Registered));
        assert_eq!(with.handle(REGISTERED), Err(Nonsense), "twice");
        for slab in 1..4 {
            assert!(matches!(with.handle(wanted(slab)), Ok(Act::Make { .. })));
            with.keep(slab, memory.clone());
        }
        assert_eq!(with.handle(wanted(1)), Err(Nonsense), "a number in use");
        assert_eq!(with.handle(Message::SlabRelease { slab: 2 }), Ok(Act::Released(2)));
        assert_eq!(with.handle(Message::SlabRelease { slab: 2 }), Ok(Act::Nothing));
        assert_eq!(Rc::strong_count(&memory), 3);
        assert!(with.handle_ended());
        assert_eq!((with.handle(Message::SlabRelease { slab: 1 }), with.slabs()), (Err(Nonsense), 2));
        assert!(!with.handle_ended());
        assert_eq!(Rc::strong_count(&memory), 3, "the stream's end frees nothing");
        assert_eq!(with.hello(5), Message::Register { token: 9, pid: 5 });
        assert_eq!((with.current(), with.handle(REGISTERED)), (None, Ok(Act::Registered)));
        assert_eq!(Rc::strong_count(&memory), 1);
        assert_eq!(with.current(), Some(REGISTERED));
    }
}
