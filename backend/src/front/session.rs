//! QEMU's session with the device: features, the guest's memory, the two queues. Answers requests, and notes what they
//! mean for the streams ([`Event`]).
//!
//! What is offered is what a stream device needs and nothing more: no multiqueue, no indirect descriptors, no log, no
//! requests of ours to QEMU. A request that is wrong ends the session. QEMU stops the queues (`GET_VRING_BASE`) and starts
//! them with the same base when it pauses the guest; with another base, or none, when the guest has reset the device.
//! Which of the two it will be is not known when they stop, so the daemon leaves the guest's memory alone before QEMU is
//! answered.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::epoll;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::QueueT;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};
use vsocket_channel::message::Region;

use super::link::Link;
use super::vring::Vring;

/// The queue of packets to the guest.
pub const RX: usize = 0;
/// The queue of packets from the guest. (The third, of events, QEMU keeps to itself.)
pub const TX: usize = 1;

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

/// What a request meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The guest's memory is another.
    Memory,
    /// The guest has set the device up anew.
    Rebooted,
    /// Both queues are set up: the guest runs.
    Running,
}

/// A part of the guest's memory, as QEMU knows it.
#[derive(Debug, Clone, Copy)]
struct Mapping {
    qemu: u64,
    size: u64,
    guest: u64,
}

/// The device as QEMU has set it up.
#[derive(Debug)]
pub struct Session {
    cid: u64,
    epoll: Arc<OwnedFd>,
    link: Rc<RefCell<Link>>,
    acked: u64,
    memory: GuestMemoryMmap,
    mappings: Vec<Mapping>,
    vrings: [Vring; 2],
    /// The base each queue was last stopped at, and whether it went on from there.
    stopped: [Option<u16>; 2],
    at_zero: [bool; 2],
    /// It is known that the guest has rebooted since the queues were last stopped.
    rebooted: bool,
    events: VecDeque<Event>,
}

impl Session {
    /// For the guest with this CID; kicks are watched in `epoll`, with the queue's number plus `KICK`.
    pub fn new(cid: u64, epoll: Arc<OwnedFd>, link: Rc<RefCell<Link>>) -> Self {
        Self {
            cid,
            epoll,
            link,
            acked: 0,
            memory: GuestMemoryMmap::default(),
            mappings: Vec::new(),
            vrings: [Vring::new(), Vring::new()],
            stopped: [None; 2],
            at_zero: [false; 2],
            rebooted: false,
            events: VecDeque::new(),
        }
    }

    /// What the requests meant, in their order.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// A queue, and the memory it is in.
    pub fn vring(&mut self, index: usize) -> (&mut Vring, &GuestMemoryMmap) {
        (&mut self.vrings[index], &self.memory)
    }

    /// The regions of the guest's memory, with the files they are parts of.
    pub fn regions(&self) -> impl Iterator<Item = (Region, &File)> {
        let count = self.memory.num_regions() as u32;
        self.memory.iter().zip(0..).filter_map(move |(region, index)| {
            let file = region.file_offset()?;
            let (address, size, offset) = (region.start_addr().0, region.len(), file.start());
            Some((Region { index, count, address, size, offset }, file.file()))
        })
    }

    fn at(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// Where an address of QEMU's is for the guest.
    fn guest_address(&self, qemu: u64) -> Result<GuestAddress> {
        let inside = |m: &&Mapping| qemu.checked_sub(m.qemu).is_some_and(|at| at < m.size);
        let found = self.mappings.iter().find(inside).ok_or(Error::InvalidParam)?;
        Ok(GuestAddress(found.guest + (qemu - found.qemu)))
    }

    fn unwatch(&self, index: usize) {
        if let Some(kick) = self.vrings[index].kick() {
            // QEMU has it as well, so closing ours would not be enough.
            let _ = epoll::delete(&self.epoll, kick);
        }
    }

    /// Whether the guest has set up the device anew is told by where its queues begin.
    fn note_base(&mut self, index: usize, base: u16) {
        let goes_on = self.stopped[index].take() == Some(base);
        self.at_zero[index] = base == 0;
        // Two queues that stopped at zero by chance cannot be told from a reboot; then it was one.
        if (!goes_on || self.at_zero == [true; 2]) && !std::mem::replace(&mut self.rebooted, true) {
            self.events.push_back(Event::Rebooted);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        (0..self.vrings.len()).for_each(|index| self.unwatch(index));
    }
}

/// Where queue `index` is kicked, in the event loop.
pub const KICK: u64 = 2;

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

/// What was never offered.
fn never<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        never()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(VERSION_1 | EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked = features;
        // Who does not know of it cannot enable queues one by one.
        let all = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        for vring in &mut self.vrings {
            vring.queue().set_event_idx(features & EVENT_IDX != 0);
            if all {
                vring.set_enabled(true);
            }
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG)
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let (mut mapped, mut mappings) = (Vec::new(), Vec::new());
        for (region, file) in regions.iter().zip(files) {
            let size = usize::try_from(region.memory_size).map_err(failed)?;
            // A mapping longer than its file kills who touches it. QEMU never shortens the file afterwards.
            let about = file.metadata().map_err(failed)?;
            if about.is_file() && about.len() < region.mmap_offset.saturating_add(region.memory_size) {
                return Err(Error::InvalidParam);
            }
            let mapping =
                MmapRegion::from_file(FileOffset::new(file, region.mmap_offset), size).map_err(failed)?;
            let guest = GuestAddress(region.guest_phys_addr);
            mapped.push(GuestRegionMmap::new(mapping, guest).ok_or(Error::InvalidParam)?);
            mappings.push(Mapping {
                qemu: region.user_addr,
                size: region.memory_size,
                guest: region.guest_phys_addr,
            });
        }
        self.memory = GuestMemoryMmap::from_regions(mapped).map_err(failed)?;
        self.mappings = mappings;
        // A queue that runs may lie where there is no memory any more.
        for vring in &mut self.vrings {
            if vring.queue().ready() && !vring.queue().is_valid(&self.memory) {
                vring.break_down();
            }
        }
        self.events.push_back(Event::Memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        self.at(index)?.queue().try_set_size(size).map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let [descriptors, used, available] = [descriptors, used, available].map(|at| self.guest_address(at));
        let (descriptors, used, available) = (descriptors?, used?, available?);
        let vring = self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)?;
        let queue = vring.queue();
        queue.try_set_desc_table_address(descriptors).map_err(failed)?;
        queue.try_set_avail_ring_address(available).map_err(failed)?;
        queue.try_set_used_ring_address(used).map_err(failed)?;
        // What was given back before is in the ring.
        let given_back =
            queue.used_idx(&self.memory, std::sync::atomic::Ordering::Relaxed).map_err(failed)?;
        queue.set_next_used(given_back.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.at(index)?.queue().set_next_avail(base);
        self.note_base(index as usize, base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.at(index)?;
        self.unwatch(index as usize);
        // What is answered below lets QEMU go on, to a reset perhaps.
        self.link.borrow_mut().pause();
        let base = self.vrings[index as usize].stop(&self.memory);
        self.stopped[index as usize] = Some(base);
        (self.at_zero[index as usize], self.rebooted) = (false, false);
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.at(index.into())?;
        self.unwatch(index.into());
        // Without one the queue would have to be polled.
        let kick = fd.ok_or(Error::InvalidParam)?;
        let token = epoll::EventData::new_u64(KICK + u64::from(index));
        epoll::add(&self.epoll, &kick, token, epoll::EventFlags::IN)
            .map_err(|e| Error::ReqHandlerError(e.into()))?;
        self.vrings[usize::from(index)].start(&self.memory, kick);
        if self.vrings.iter_mut().all(|vring| vring.queue().ready()) {
            self.events.push_back(Event::Running);
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.at(index.into())?.set_call(fd);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _: Option<File>) -> Result<()> {
        self.at(index.into()).map(|_| ())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.at(index)?.set_enabled(enable);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let config = self.cid.to_le_bytes();
        let end = offset.checked_add(size).ok_or(Error::InvalidParam)?;
        config.get(offset as usize..end as usize).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        never()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        never()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        never()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        never()
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        never()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        never()
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        never()
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        never()
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        never()
    }

    fn check_device_state(&mut self) -> Result<()> {
        never()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        never()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        never()
    }
}

#[cfg(test)]
mod tests;
