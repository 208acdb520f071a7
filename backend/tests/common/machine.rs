//! A virtual machine that is played: its front, and in it a keeper that lends memory and an agent with one program.
#![allow(dead_code)] // each test file uses its part

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vsocket_backend::carrier::{Carrier, Gone, reach};
use vsocket_backend::config::{Machine, Vport};
use vsocket_backend::slab::{Memory, Piece, View};
use vsocket_channel::layout::BELLS;
use vsocket_channel::message::{Message, Region, Runs, Tuple};

use crate::common::{Dir, Prepared, vport};

pub const CID: u32 = 9;
pub const PORT: u32 = 7650;
/// Bytes of its memory, in two halves that are apart for the guest.
pub const RAM: u64 = 16 << 20;
const HIGH: u64 = 1 << 32;
const PAGE: u64 = 4096;

pub fn machine_vport(dir: &Dir, name: &str, vni: u32, address: &str) -> Vport {
    let machine = Machine { cid: CID, front: dir.0.join("qemu"), port: PORT, max_streams: 8 };
    Vport { machine: Some(machine), ..vport(dir, name, vni, address) }
}

pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

pub fn hear(carrier: &mut Carrier) -> Message {
    until("nothing is said", || {
        carrier.flush().unwrap();
        carrier.receive().unwrap()
    })
}

pub fn is_hung_up_on(carrier: &mut Carrier) {
    until("it is heard", || matches!(carrier.receive(), Err(Gone::Closed)).then_some(()));
}

/// A front that is welcome.
pub fn front(path: &Path) -> Carrier {
    let mut front = reach(path).unwrap();
    front.send(&Message::FrontHello { pid: 77, cid: CID.into() }, vec![]).unwrap();
    let (welcome, pidfd) = until("no welcome", || front.receive_with().unwrap());
    assert!(matches!(welcome, Message::FrontWelcome { .. }) && pidfd.is_some());
    front
}

/// A stream from this port of the guest.
pub fn call(front: &mut Carrier, guest_port: u32, host_port: u32) -> Carrier {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let message = Message::FrontStream { id: 1, guest_port, host_port };
    front.send(&message, vec![Arc::new(far)]).unwrap();
    Carrier::stream(near)
}

/// A guest that has registered.
pub struct Guest {
    pub front: Carrier,
    pub ram: Arc<OwnedFd>,
    pub keeper: Carrier,
    pub agent: Carrier,
    pub token: u128,
    pub bells: Vec<OwnedFd>,
    /// Slabs that it lends, with their pages.
    pub slabs: Vec<(u64, Vec<u64>)>,
    next_page: u64,
}

impl Guest {
    /// Registers with a daemon that it has not met.
    pub fn new(path: &Path) -> Self {
        let ram = Arc::new(memfd(RAM, SealFlags::SHRINK));
        Self::with(path, ram, 0, None)
    }

    /// Registers with this token; `kept` is what the front has of an earlier daemon.
    pub fn with(path: &Path, ram: Arc<OwnedFd>, token: u128, kept: Option<u128>) -> Self {
        let mut front = front(path);
        if let Some(token) = kept {
            front.send(&Message::FrontToken { token }, vec![]).unwrap();
        }
        tell_memory(&mut front, 1, &ram);
        let (keeper, token) = register(&mut front, 1023, token);
        let agent = present_agent(&mut front, token);
        let bells = present_bells(&mut front, token);
        Self { front, ram, keeper, agent, token, bells, slabs: Vec::new(), next_page: 1 }
    }

    /// The keeper is asked for a slab, and lends pages that lie in no good order.
    pub fn lend(&mut self) -> u64 {
        let Message::SlabWanted { slab, program: 1, geometry } = hear(&mut self.keeper) else { panic!() };
        let count = geometry.slab_len() as u64 / PAGE;
        // Every third page is left out, and the order is from the last to the first but for pairs.
        let mut pages: Vec<u64> = (0..count / 2 + 1).flat_map(|n| [n * 3, n * 3 + 1]).collect();
        pages.truncate(count as usize);
        pages.chunks_mut(2).for_each(<[u64]>::reverse);
        pages.reverse();
        pages.iter_mut().for_each(|page| *page += self.next_page);
        self.next_page += count * 2;
        let half = RAM / 2 / PAGE;
        pages.iter_mut().filter(|page| **page >= half).for_each(|page| *page = *page - half + HIGH / PAGE);
        self.tell_pages(slab, &pages);
        self.slabs.push((slab, pages));
        slab
    }

    pub fn tell_pages(&mut self, slab: u64, pages: &[u64]) {
        let mut told = 0;
        while told < pages.len() {
            let (runs, taken) = Runs::of(&pages[told..]).unwrap();
            self.keeper.send(&Message::SlabPages { slab, first: told as u32, runs }, vec![]).unwrap();
            told += taken;
        }
    }

    pub fn open(&mut self, conn: u64, local: &str, remote: &str, min_generation: u32) {
        let tuple = Tuple::new(local.parse().unwrap(), remote.parse().unwrap());
        let message = Message::Open { conn, program: 1, tuple, min_generation };
        self.agent.send(&message, vec![]).unwrap();
    }

    /// Hears a `Prepare`, maps the slab that it names, and answers. Declines on the way are skipped.
    pub fn prepare(&mut self) -> Prepared {
        let message = until("no prepare", || match hear(&mut self.agent) {
            Message::Declined { .. } => None,
            other => Some(other),
        });
        let Message::Prepare { conn, generation, segment } = message else { panic!("{message:?}") };
        let (_, pages) = self.slabs.iter().find(|(slab, _)| *slab == segment.slab).unwrap();
        let offset = |page: u64| match page * PAGE {
            address if address >= HIGH => address - HIGH + RAM / 2,
            address => address,
        };
        let piece = |page: &u64| Piece { file: self.ram.as_fd(), offset: offset(*page), len: PAGE as usize };
        let pieces: Vec<_> = pages.iter().map(piece).collect();
        let memory = Arc::new(Memory::gather(&pieces, segment.geometry).unwrap());
        let view = View::new(&memory, segment.index).unwrap();
        let own = self.bells.iter().map(|bell| bell.try_clone().unwrap()).collect();
        let far = vec![self.bells[0].try_clone().unwrap()];
        self.agent.send(&Message::Prepared { conn, generation }, vec![]).unwrap();
        Prepared { conn, generation, segment, view, own, far }
    }

    pub fn commit(&mut self, prepared: &Prepared) {
        let Prepared { conn, generation, .. } = *prepared;
        assert_eq!(hear(&mut self.agent), Message::Commit { conn, generation });
    }

    pub fn left(&mut self, prepared: &Prepared) {
        let Prepared { conn, generation, .. } = *prepared;
        self.agent.send(&Message::Left { conn, generation }, vec![]).unwrap();
    }
}

/// Tells the two halves of the memory.
pub fn tell_memory(front: &mut Carrier, table: u64, ram: &Arc<OwnedFd>) {
    let size = RAM / 2;
    for index in 0..2u32 {
        let (address, offset) = (u64::from(index) * HIGH, u64::from(index) * size);
        let region = Region { index, count: 2, address, size, offset };
        front.send(&Message::FrontRegion { table, region }, vec![ram.clone()]).unwrap();
    }
}

/// Registers a keeper: its stream, and its token.
pub fn register(front: &mut Carrier, guest_port: u32, token: u128) -> (Carrier, u128) {
    let mut keeper = call(front, guest_port, PORT);
    keeper.send(&Message::Register { token, pid: 5 }, vec![]).unwrap();
    let Message::Registered { token, .. } = hear(&mut keeper) else { panic!("not registered") };
    let kept = until("the front is told", || front.receive_with().unwrap());
    assert_eq!(kept.0, Message::FrontToken { token });
    (keeper, token)
}

/// Presents an agent, who is welcome.
pub fn present_agent(front: &mut Carrier, token: u128) -> Carrier {
    let mut agent = call(front, 40_000, PORT);
    agent.send(&Message::Present { token, program: 0, bell: 0 }, vec![]).unwrap();
    agent.send(&Message::Hello { pid: 6 }, vec![]).unwrap();
    assert!(matches!(hear(&mut agent), Message::Welcome { vni: 100, .. }));
    agent
}

/// Presents the bells of program 1.
pub fn present_bells(front: &mut Carrier, token: u128) -> Vec<OwnedFd> {
    let each = (0..BELLS as u32).map(|bell| {
        let mut stream = call(front, 41_000 + bell, PORT);
        stream.send(&Message::Present { token, program: 1, bell }, vec![]).unwrap();
        stream.into_socket()
    });
    each.collect()
}
