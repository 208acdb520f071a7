use proptest::prelude::*;

use super::super::packet::{STREAM, op};
use super::*;

/// Where a driver of ours puts things.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x10_000;
const SIZE: u16 = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Driver {
    memory: GuestMemoryMmap,
    vring: Vring,
    available: u16,
}

impl Driver {
    fn new() -> Self {
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_000), (GuestAddress(0x100_000), 0x1000)]);
        let memory = memory.unwrap();
        let mut vring = Vring::new();
        let queue = vring.queue();
        queue.try_set_size(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        vring.start(&memory, File::open("/dev/null").unwrap());
        vring.set_enabled(true);
        assert!(vring.runs());
        Self { memory, vring, available: 0 }
    }

    fn descriptor(&self, n: u16, at: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [at.to_le_bytes(), [0; 8]].concat();
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(TABLE + 16 * u64::from(n))).unwrap();
    }

    /// A chain of these parts, made available.
    fn offer(&mut self, parts: &[(u64, u32, u16)]) {
        for (n, &(at, len, flags)) in parts.iter().enumerate() {
            let more = if n + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(n as u16, at, len, flags | more, n as u16 + 1);
        }
        self.head(0);
    }

    fn head(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    fn take(&mut self) -> (Option<Taken>, Vec<u8>) {
        let mut payload = Vec::new();
        (self.vring.take(&self.memory, &mut payload).unwrap(), payload)
    }

    fn used(&self) -> (u16, u32) {
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let last = USED + 4 + 8 * u64::from(index.wrapping_sub(1) % SIZE);
        (index, self.memory.read_obj(GuestAddress(last + 4)).unwrap())
    }
}

fn data(len: u32) -> Header {
    Header { src_cid: 3, dst_cid: 2, len, kind: STREAM, op: op::RW, ..Header::default() }
}

#[test]
fn a_packet_may_be_cut_anywhere() {
    for parts in [
        vec![(DATA, 44 + 100, 0)],
        vec![(DATA, 44, 0), (DATA + 44, 100, 0)],
        vec![(DATA, 10, 0), (DATA + 10, 0, 0), (DATA + 10, 60, 0), (DATA + 70, 4000, 0)],
    ] {
        let mut driver = Driver::new();
        driver.memory.write_slice(&data(100).emit(), GuestAddress(DATA)).unwrap();
        driver.memory.write_slice(&[7; 100], GuestAddress(DATA + 44)).unwrap();
        driver.offer(&parts);
        assert_eq!(driver.take(), (Some(Taken::Packet(data(100))), vec![7; 100]));
        assert_eq!((driver.used(), driver.take().0), ((1, 0), None));
    }
}

#[test]
fn what_is_no_packet_is_given_back_and_named() {
    let bad = |name| Taken::Bad(name);
    let table = [
        (vec![(DATA, 43, 0)], bad("descriptor-header")),
        (vec![(DATA, 44, WRITE)], bad("descriptor-chain")),
        (vec![(DATA, 44, 0), (DATA, 100, WRITE)], bad("descriptor-chain")),
        (vec![(DATA, 44, NEXT)], bad("descriptor-chain")),
        (vec![(0x40_000, 44, 0)], bad("descriptor-header")),
        (vec![(0x3f_fff, 44, 0)], bad("descriptor-header")),
        (vec![(u64::MAX - 3, 44, 0)], bad("descriptor-header")),
        (vec![(DATA, 44, 0), (0x40_000, 100, 0)], Taken::BadPayload(data(100), "descriptor-payload")),
        (vec![(DATA, 44, 0), (u64::MAX - 50, 100, 0)], Taken::BadPayload(data(100), "descriptor-payload")),
        (vec![(DATA, 44, 0), (DATA, 99, 0)], Taken::BadPayload(data(100), "descriptor-payload")),
        (vec![(DATA, 44, INDIRECT)], bad("descriptor-chain")),
    ];
    for (parts, want) in table {
        let mut driver = Driver::new();
        driver.memory.write_slice(&data(100).emit(), GuestAddress(DATA)).unwrap();
        driver.descriptor(1, 0, 0, NEXT, 9999);
        driver.offer(&parts);
        assert_eq!((driver.take().0, driver.used().0), (Some(want), 1), "{parts:x?}");
    }
    let mut driver = Driver::new();
    let long = data(MAX_PAYLOAD as u32 + 1);
    driver.memory.write_slice(&long.emit(), GuestAddress(DATA)).unwrap();
    driver.offer(&[(DATA, 0x20_000, 0)]);
    assert_eq!(driver.take().0, Some(Taken::BadPayload(long, "packet-length")));
    // A chain that bites its tail, and one of more parts than there are.
    driver.descriptor(0, DATA, 1, NEXT, 0);
    driver.head(0);
    assert_eq!(driver.take().0, Some(Taken::Bad("descriptor-chain")));
}

#[test]
fn indices_that_cannot_be_break_the_queue() {
    let mut driver = Driver::new();
    driver.available = SIZE;
    driver.head(0);
    assert_eq!(driver.vring.take(&driver.memory, &mut Vec::new()), Err(Broken));
    let mut driver = Driver::new();
    driver.head(SIZE);
    assert_eq!(driver.vring.take(&driver.memory, &mut Vec::new()), Err(Broken));
    driver.vring.break_down();
    assert!(!driver.vring.runs());
    let mut vring = Vring::new();
    vring.queue().try_set_used_ring_address(GuestAddress(0x40_000)).unwrap();
    vring.set_enabled(true);
    vring.start(&driver.memory, File::open("/dev/null").unwrap());
    assert!(!vring.runs(), "no such memory");
}

#[test]
fn packets_are_put_into_whatever_parts_there_are() {
    let mut driver = Driver::new();
    driver.offer(&[(DATA, 20, WRITE), (DATA + 0x100, 30, WRITE), (DATA + 0x200, 100, WRITE)]);
    let slot = driver.vring.slot(&driver.memory).unwrap().unwrap().unwrap();
    assert_eq!(slot.room, 106);
    driver.vring.put_back(slot);
    let slot = driver.vring.slot(&driver.memory).unwrap().unwrap().unwrap();
    assert!(driver.vring.fill(&driver.memory, slot, &data(9), &[5; 9]).unwrap());
    assert_eq!(driver.used(), (1, 53));
    let mut all = [0; 53];
    let memory = &driver.memory;
    memory.read_slice(&mut all[..20], GuestAddress(DATA)).unwrap();
    memory.read_slice(&mut all[20..50], GuestAddress(DATA + 0x100)).unwrap();
    memory.read_slice(&mut all[50..], GuestAddress(DATA + 0x200)).unwrap();
    assert_eq!((&all[..44], &all[44..]), (&data(9).emit()[..], &[5; 9][..]));
    for (parts, name) in [
        (vec![(DATA, 44, WRITE)], "descriptor-short"),
        (vec![(DATA, 400, 0)], "descriptor-chain"),
        (vec![(0x3f_ff0, 400, WRITE)], "descriptor-address"),
        (vec![(u64::MAX - 4, 400, WRITE)], "descriptor-address"),
    ] {
        driver.offer(&parts);
        assert_eq!(driver.vring.slot(&driver.memory).unwrap(), Some(Err(name)));
    }
}

proptest! {
    /// Whatever lies in the guest's memory: an answer, and nothing written outside the used ring.
    #[test]
    fn no_memory_of_a_guest_does_harm(
        descriptors in prop::collection::vec((prop_oneof![0x0u64..0x50_000, any::<u64>()], prop_oneof![0u32..70_000, any::<u32>()], 0u16..8, 0u16..12), 8),
        heads in prop::collection::vec(0u16..10, 1..8),
        skip in 0u16..12,
        writable: bool,
    ) {
        let mut driver = Driver::new();
        for (n, &(at, len, flags, next)) in descriptors.iter().enumerate() {
            driver.descriptor(n as u16, at, len, flags, next);
        }
        heads.iter().for_each(|head| driver.head(*head));
        if skip > 8 {
            driver.available = driver.available.wrapping_add(skip);
            driver.head(0);
        }
        let mut payload = Vec::new();
        for _ in 0..=heads.len() {
            if writable {
                match driver.vring.slot(&driver.memory) {
                    Ok(None) | Err(Broken) => break,
                    Ok(Some(Ok(slot))) => {
                        // Exactly what the driver allowed: it may have allowed its own rings.
                        let fill = driver.vring.fill(&driver.memory, slot, &data(1), &vec![1; slot.room.min(MAX_PAYLOAD)]);
                        prop_assert_ne!(fill, Ok(false));
                    }
                    Ok(Some(Err(_))) => {}
                }
            } else {
                match driver.vring.take(&driver.memory, &mut payload) {
                    Ok(None) | Err(Broken) => break,
                    Ok(Some(Taken::Packet(header))) => prop_assert_eq!(payload.len(), header.len as usize),
                    Ok(Some(_)) => {}
                }
            }
        }
    }
}
