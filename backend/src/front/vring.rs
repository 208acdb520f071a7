//! One virtqueue of the device, in the memory of a guest that may write anything at any time.
//!
//! The queue's indices are ours; what lies in guest memory is fetched once, checked, and the copy is used. A chain that is
//! no packet is given back unused and named. A queue whose indices contradict themselves is broken, and is not looked at
//! again before the driver sets it up anew.

#![forbid(unsafe_code)]

use std::fs::File;

use rustix::io::Errno;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::packet::{HEADER_LEN, Header, MAX_PAYLOAD};

/// The longest queue a driver may ask for.
pub const MAX_SIZE: u16 = 1024;
/// Descriptors of a chain: a header, and 64 KiB in pages that need not be aligned, with room to spare.
const MAX_DESCRIPTORS: usize = 64;

/// The driver's indices or addresses cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

/// What a chain from the guest held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// A packet; its payload is in the buffer.
    Packet(Header),
    /// A header, and no such payload.
    BadPayload(Header, &'static str),
    /// Nothing that has a meaning.
    Bad(&'static str),
}

/// A buffer of the guest for one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    head: u16,
    /// Bytes of payload it has room for.
    pub room: usize,
}

/// A virtqueue.
#[derive(Debug)]
pub struct Vring {
    queue: Queue,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    broken: bool,
    /// Used buffers the guest has not been told of.
    untold: bool,
    /// Parts of the chain at hand.
    parts: Vec<(GuestAddress, usize)>,
}

impl Vring {
    /// One that is not set up.
    pub fn new() -> Self {
        let queue = Queue::new(MAX_SIZE).expect("a power of two");
        let parts = Vec::with_capacity(MAX_DESCRIPTORS);
        Self { queue, kick: None, call: None, enabled: false, broken: false, untold: false, parts }
    }

    /// Whether buffers may be taken from it and given back.
    pub fn runs(&self) -> bool {
        self.queue.ready() && self.enabled && !self.broken
    }

    /// The driver's indices or addresses are wrong.
    pub fn break_down(&mut self) {
        self.broken = true;
    }

    /// The queue itself, to be set up.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Starts it, if its three areas are in the guest's memory.
    pub fn start(&mut self, memory: &GuestMemoryMmap, kick: File) {
        self.queue.set_ready(true);
        self.broken = !self.queue.is_valid(memory);
        self.kick = Some(kick);
    }

    /// Stops it: where the driver's next buffer is. What we gave back is told before.
    pub fn stop(&mut self, memory: &GuestMemoryMmap) -> u16 {
        self.tell(memory);
        self.queue.set_ready(false);
        (self.kick, self.call) = (None, None);
        self.queue.next_avail()
    }

    /// What the driver rings.
    pub fn kick(&self) -> Option<&File> {
        self.kick.as_ref()
    }

    /// What we ring.
    pub fn set_call(&mut self, call: Option<File>) {
        self.call = call;
    }

    /// Rings may be disabled though they are set up.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// The next packet from the guest; its buffer is given back.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn take(&mut self, memory: &GuestMemoryMmap, payload: &mut Vec<u8>) -> Result<Option<Taken>, Broken> {
        let Some((head, whole)) = self.next(memory, false)? else { return Ok(None) };
        let taken = if whole { self.read(memory, payload) } else { Taken::Bad("descriptor-chain") };
        self.give_back(memory, head, 0)?;
        Ok(Some(taken))
    }

    /// The next buffer for a packet to the guest, in which payload has room. One that is none is given back, and named.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn slot(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Result<Slot, &'static str>>, Broken> {
        let Some((head, whole)) = self.next(memory, true)? else { return Ok(None) };
        let len: usize = self.parts.iter().map(|(_, len)| len).sum();
        let there = |&(at, len): &(GuestAddress, usize)| memory.check_range(at, len, Permissions::Write);
        let fault = match () {
            () if !whole => "descriptor-chain",
            () if len <= HEADER_LEN => "descriptor-short",
            () if !self.parts.iter().all(there) => "descriptor-address",
            () => return Ok(Some(Ok(Slot { head, room: len - HEADER_LEN }))),
        };
        self.give_back(memory, head, 0)?;
        Ok(Some(Err(fault)))
    }

    /// The buffer was not needed after all.
    pub fn put_back(&mut self, _: Slot) {
        self.queue.go_to_previous_position();
    }

    /// Puts a packet into the buffer that [`slot`](Self::slot) has just returned, and gives it back. False if the guest's
    /// memory did not take it.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn fill(
        &mut self,
        memory: &GuestMemoryMmap,
        slot: Slot,
        header: &Header,
        payload: &[u8],
    ) -> Result<bool, Broken> {
        let header = header.emit();
        let done =
            self.write(memory, 0, &header).is_some() && self.write(memory, HEADER_LEN, payload).is_some();
        let len = if done { HEADER_LEN + payload.len() } else { 0 };
        self.give_back(memory, slot.head, len as u32)?;
        Ok(done)
    }

    /// Tells the guest what was given back, if it wants to know.
    pub fn tell(&mut self, memory: &GuestMemoryMmap) {
        if std::mem::take(&mut self.untold)
            && self.queue.needs_notification(memory).unwrap_or(true)
            && let Some(call) = &self.call
        {
            // A counter that is full wakes as well.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }

    /// Asks to be rung; true if there is something already.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn arm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Broken> {
        self.queue.enable_notification(memory).map_err(|_| Broken)
    }

    /// Asks not to be rung.
    ///
    /// # Errors
    ///
    /// [`Broken`].
    pub fn disarm(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        self.queue.disable_notification(memory).map_err(|_| Broken)
    }

    /// Takes a kick.
    pub fn heard(&self) {
        if let Some(kick) = &self.kick {
            match rustix::io::read(kick, &mut [0; 8]) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => tracing::debug!(%error, "kick"),
            }
        }
    }

    /// The next chain's head, and whether its parts are all there and of the right direction.
    fn next(&mut self, memory: &GuestMemoryMmap, writable: bool) -> Result<Option<(u16, bool)>, Broken> {
        self.parts.clear();
        let chain = self.queue.iter(memory).map_err(|_| Broken)?.next();
        let Some(chain) = chain else { return Ok(None) };
        let head = chain.head_index();
        let (mut whole, mut ended) = (true, false);
        for part in chain.take(MAX_DESCRIPTORS + 1) {
            whole &= part.is_write_only() == writable && self.parts.len() < MAX_DESCRIPTORS;
            ended = !part.has_next();
            self.parts.push((part.addr(), part.len() as usize));
        }
        Ok(Some((head, whole && ended)))
    }

    fn read(&self, memory: &GuestMemoryMmap, payload: &mut Vec<u8>) -> Taken {
        let mut bytes = [0; HEADER_LEN];
        if self.copy(memory, 0, &mut bytes).is_none() {
            return Taken::Bad("descriptor-header");
        }
        let header = Header::parse(&bytes);
        if header.len as usize > MAX_PAYLOAD {
            return Taken::BadPayload(header, "packet-length");
        }
        payload.resize(header.len as usize, 0);
        match self.copy(memory, HEADER_LEN, payload) {
            Some(()) => Taken::Packet(header),
            None => Taken::BadPayload(header, "descriptor-payload"),
        }
    }

    /// Copies out of the chain at hand; `None` if it is shorter, or not in the guest's memory.
    fn copy(&self, memory: &GuestMemoryMmap, from: usize, to: &mut [u8]) -> Option<()> {
        let mut done = 0;
        for (at, len) in Pieces::new(&self.parts, from, to.len()) {
            memory.read_slice(&mut to[done..done + len], at?).ok()?;
            done += len;
        }
        (done == to.len()).then_some(())
    }

    fn write(&self, memory: &GuestMemoryMmap, to: usize, from: &[u8]) -> Option<()> {
        let mut done = 0;
        for (at, len) in Pieces::new(&self.parts, to, from.len()) {
            memory.write_slice(&from[done..done + len], at?).ok()?;
            done += len;
        }
        (done == from.len()).then_some(())
    }

    fn give_back(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), Broken> {
        self.untold = true;
        self.queue.add_used(memory, head, len).map_err(|_| Broken)
    }
}

impl Default for Vring {
    fn default() -> Self {
        Self::new()
    }
}

/// Where a range of a chain's bytes lies: addresses (`None` when they wrap round) and lengths.
struct Pieces<'a> {
    parts: std::slice::Iter<'a, (GuestAddress, usize)>,
    skip: usize,
    left: usize,
}

impl<'a> Pieces<'a> {
    fn new(parts: &'a [(GuestAddress, usize)], from: usize, len: usize) -> Self {
        Self { parts: parts.iter(), skip: from, left: len }
    }
}

impl Iterator for Pieces<'_> {
    type Item = (Option<GuestAddress>, usize);

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let &(at, len) = self.parts.next()?;
            if len <= self.skip {
                self.skip -= len;
                continue;
            }
            let skip = std::mem::take(&mut self.skip);
            let len = (len - skip).min(self.left);
            self.left -= len;
            return Some((at.checked_add(skip as u64), len));
        }
        None
    }
}

#[cfg(test)]
mod tests;
