//! A guest's driver that writes anything into its rings and packets, against the device's queues and streams.
//!
//! The input is the guest's first pages, word for word, then a sequence of what driver, daemon and time do. Bounds must
//! hold, every socket end that was made must be closed, and nothing may panic.

#![no_main]

use std::collections::HashSet;
use std::fs::File;

use libfuzzer_sys::fuzz_target;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vsocket_backend::front::packet::{HEADER_LEN, HOST, Header, STREAM};
use vsocket_backend::front::streams::{Effect, Rx, Streams};
use vsocket_backend::front::vring::{Broken, Taken, Vring};

const CID: u64 = 3;
const PORT: u32 = 7650;
const LIMIT: usize = 8;
const SIZE: u16 = 8;
/// Each queue's table, available ring and used ring.
const AREAS: [[u64; 3]; 2] = [[0x0, 0x100, 0x200], [0x400, 0x500, 0x600]];
const MEMORY: usize = 0x8000;

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }
}

struct Device {
    memory: GuestMemoryMmap,
    vrings: [Vring; 2],
    streams: Streams,
    ends: HashSet<u64>,
    payload: Vec<u8>,
}

impl Device {
    fn obey(&mut self) {
        while let Some(effect) = self.streams.poll_effect() {
            match effect {
                Effect::Open { id, .. } if id % 7 == 0 => self.streams.handle_refused(id, "refused"),
                Effect::Open { id, .. } => {
                    assert!(self.ends.insert(id));
                    self.streams.handle_opened(id);
                }
                Effect::Close(id) => _ = self.ends.remove(&id),
                Effect::Write(id) | Effect::ShutWrite(id) | Effect::ShutRead(id) => assert!(id > 0),
            }
        }
        assert!(self.streams.len() <= LIMIT);
    }

    fn take(&mut self) -> Result<(), Broken> {
        while self.vrings[1].runs() && self.streams.wants_packets() {
            match self.vrings[1].take(&self.memory, &mut self.payload)? {
                None => return Ok(()),
                Some(Taken::Packet(header)) => self.streams.handle_packet(&header, &self.payload),
                Some(Taken::BadPayload(header, name)) => self.streams.handle_bad_packet(&header, name),
                Some(Taken::Bad(name)) => self.streams.drops.count(name),
            }
            self.obey();
        }
        Ok(())
    }

    fn bring(&mut self, how: u8) -> Result<(), Broken> {
        if !self.vrings[0].runs() {
            return Ok(());
        }
        let Some(Ok(slot)) = self.vrings[0].slot(&self.memory)? else { return Ok(()) };
        match self.streams.poll_rx(slot.room) {
            None => self.vrings[0].put_back(slot),
            Some(Rx::Packet(header)) => _ = self.vrings[0].fill(&self.memory, slot, &header, &[])?,
            Some(Rx::Read { id, max }) => match how % 5 {
                0 => (self.streams.handle_empty(id), self.vrings[0].put_back(slot)).0,
                1 => (self.streams.handle_end(id), self.vrings[0].put_back(slot)).0,
                2 => (self.streams.handle_fault(id, None), self.vrings[0].put_back(slot)).0,
                _ => {
                    let payload = vec![how; max.min(usize::from(how) + 1)];
                    let header = self.streams.handle_read(id, payload.len());
                    if !self.vrings[0].fill(&self.memory, slot, &header, &payload)? {
                        self.streams.handle_fault(id, Some("descriptor-address"));
                    }
                }
            },
        }
        self.obey();
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(at));
    }

    /// A well-formed packet in one descriptor, so that the streams are reached as well.
    fn packet(&mut self, n: u16, header: &Header, payload: u16) {
        let at = 0x1000 + 0x200 * u64::from(n % SIZE);
        let header = Header { len: payload.into(), ..*header };
        self.write(at, &header.emit());
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&at.to_le_bytes());
        descriptor[8..12].copy_from_slice(&(HEADER_LEN as u32 + u32::from(payload)).to_le_bytes());
        let [table, available, _] = AREAS[1];
        self.write(table + 16 * u64::from(n % SIZE), &descriptor);
        let index: u16 = self.memory.read_obj(GuestAddress(available + 2)).unwrap_or(0);
        self.write(available + 4 + 2 * u64::from(index % SIZE), &(n % SIZE).to_le_bytes());
        self.write(available + 2, &index.wrapping_add(1).to_le_bytes());
    }
}

fn vring(memory: &GuestMemoryMmap, areas: [u64; 3]) -> Vring {
    let mut vring = Vring::new();
    let [table, available, used] = areas.map(GuestAddress);
    let queue = vring.queue();
    queue.try_set_size(SIZE).expect("a power of two");
    queue.try_set_desc_table_address(table).expect("aligned");
    queue.try_set_avail_ring_address(available).expect("aligned");
    queue.try_set_used_ring_address(used).expect("aligned");
    vring.start(memory, File::open("/dev/null").expect("a null device"));
    vring.set_enabled(true);
    vring
}

fn run(data: &[u8]) -> Option<()> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let vrings = AREAS.map(|areas| vring(&memory, areas));
    let streams = Streams::new(CID, PORT, LIMIT);
    let mut device = Device { memory, vrings, streams, ends: HashSet::new(), payload: Vec::new() };
    let mut input = Input(data);
    let steps = (|| {
        loop {
            match input.byte()? % 16 {
                0..4 => {
                    let (at, bytes) = (input.word()?, [input.byte()?, input.byte()?, input.byte()?, input.byte()?]);
                    device.write(u64::from(at) % MEMORY as u64, &bytes);
                }
                4..8 => {
                    let (op, port, flags) = (input.byte()?, input.byte()?, input.byte()?);
                    let header = Header {
                        src_cid: CID,
                        dst_cid: HOST,
                        src_port: u32::from(port % 12),
                        dst_port: PORT,
                        kind: STREAM,
                        op: u16::from(op % 9),
                        flags: flags.into(),
                        buf_alloc: input.word()?.into(),
                        fwd_cnt: input.byte()?.into(),
                        ..Header::default()
                    };
                    let payload = input.word()? % 0x5000;
                    device.packet(op.into(), &header, payload);
                }
                8 | 9 => {
                    if device.take().is_err() {
                        device.vrings[1].break_down();
                        device.streams.handle_stop();
                    }
                }
                10 | 11 => {
                    let how = input.byte()?;
                    if device.bring(how).is_err() {
                        device.vrings[0].break_down();
                        device.streams.handle_stop();
                    }
                }
                12 => device.streams.handle_readable(input.byte()?.into()),
                13 => {
                    let id = input.byte()?.into();
                    let (a, b) = device.streams.pending(id);
                    let len = (a.len() + b.len()).min(input.word()?.into());
                    device.streams.handle_written(id, len);
                }
                14 => device.streams.handle_deaf(input.byte()?.into()),
                _ => match input.byte()? % 8 {
                    0 => device.streams.handle_daemon_gone(),
                    1 => device.streams.handle_guest_gone(),
                    n => device.vrings = AREAS.map(|areas| {
                        let mut vring = vring(&device.memory, areas);
                        vring.set_enabled(n != 2);
                        vring
                    }),
                },
            }
            device.obey();
        }
    })();
    device.streams.handle_stop();
    device.obey();
    assert!(device.ends.is_empty(), "ends that nobody closed");
    steps
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
