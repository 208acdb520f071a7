//! `vsocketd vm-front` as QEMU, a guest's driver and the daemon see it; all three are played here.
#![cfg(feature = "vm")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::Dir;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vsocket_backend::carrier::{self, Carrier, Gone};
use vsocket_backend::front::packet::{HEADER_LEN, HOST, Header, NO_RECEIVE, NO_SEND, STREAM, op};
use vsocket_channel::message::{Message, Region};

const CID: u64 = 5;
const PORT: u32 = 7650;
const PATIENCE: Duration = Duration::from_secs(10);

/// Where QEMU has the guest's memory, and how much there is.
const QEMU: u64 = 0x7f00_0000_0000;
const BASE: u64 = 0x10_0000;
const LEN: u64 = 4 << 20;
const SIZE: u16 = 64;
const SLOT: u64 = 8192;

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Front {
    child: Child,
    dir: Dir,
}

impl Front {
    fn start(more: &[&str]) -> Self {
        let dir = Dir::new();
        let (socket, daemon) = (dir.0.join("qemu"), dir.0.join("vport"));
        let child = Command::new(env!("CARGO_BIN_EXE_vsocketd"))
            .args(["vm-front", "--cid", "5", "--socket"])
            .arg(&socket)
            .arg("--daemon")
            .arg(&daemon)
            .args(more)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        until("the front does not listen", || socket.exists().then_some(()));
        Self { child, dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.0.join("qemu")
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    fn maps(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap()
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The daemon's end of the link.
struct Daemon {
    _listener: OwnedFd,
    carrier: Carrier,
}

impl Daemon {
    fn listen(front: &Front, boot: u64) -> Self {
        let path = front.dir.0.join("vport");
        let _ = std::fs::remove_file(&path);
        let listener = carrier::listen_at(&path).unwrap();
        let mut carrier = until("no front", || carrier::accept(&listener).unwrap());
        let hello = until("no hello", || carrier.receive().unwrap());
        assert_eq!(hello, Message::FrontHello { pid: front.child.id(), cid: CID });
        let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        carrier.send(&Message::FrontWelcome { boot }, vec![Arc::new(pidfd)]).unwrap();
        Self { _listener: listener, carrier }
    }

    fn next(&self) -> (Message, Option<OwnedFd>) {
        until("the front says nothing", || self.carrier.receive_with().unwrap())
    }

    fn stream(&self) -> UnixStream {
        let (message, fd) = self.next();
        assert!(matches!(message, Message::FrontStream { host_port: PORT, .. }), "{message:?}");
        let stream = UnixStream::from(fd.unwrap());
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn memory(&self) {
        let (message, fd) = self.next();
        let region = Region { index: 0, count: 1, address: BASE, size: LEN, offset: 0 };
        assert!(
            matches!(message, Message::FrontRegion { region: this, .. } if this == region),
            "{message:?}"
        );
        assert!(fd.is_some());
    }

    /// Answers that it keeps away from the guest's memory, without which nobody stops.
    fn quiet_while<T: Send>(&mut self, stops: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let stopping = scope.spawn(stops);
            assert_eq!(self.next().0, Message::FrontPaused {});
            std::thread::sleep(Duration::from_millis(50));
            assert!(!stopping.is_finished());
            self.carrier.send(&Message::FrontQuiet {}, vec![]).unwrap();
            stopping.join().unwrap()
        })
    }

    /// What it hears of a guest that has booted.
    fn boot(&self) {
        self.memory();
        assert_eq!(self.next().0, Message::FrontReset {});
    }
}

/// QEMU and the guest's driver. Each buffer of a queue is one descriptor, at a place of its own.
struct Guest {
    qemu: Frontend,
    memory: GuestMemoryMmap,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    available: [u16; 2],
    seen: [u16; 2],
    read: u32,
}

impl Guest {
    fn connect(front: &Front) -> Self {
        let mut qemu = Frontend::connect(front.socket(), 2).unwrap();
        qemu.set_owner().unwrap();
        let features = qemu.get_features().unwrap();
        qemu.set_features(features).unwrap();
        let protocol = qemu.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK));
        qemu.set_protocol_features(protocol).unwrap();
        qemu.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (_, cid) = qemu.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
        assert_eq!(cid, CID.to_le_bytes());

        let file = std::fs::File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, LEN).unwrap();
        let region = MmapRegion::from_file(FileOffset::new(file, 0), LEN as usize).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(BASE)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let mut guest = Self {
            qemu,
            memory,
            kicks: [event(), event()],
            calls: [event(), event()],
            available: [0; 2],
            seen: [0; 2],
            read: 0,
        };
        guest.start([0, 0], features);
        (0..SIZE).for_each(|n| guest.offer(0, n, BASE + 0x10_0000 + SLOT * u64::from(n), SLOT as u32, 2));
        guest
    }

    fn areas(queue: usize) -> [u64; 3] {
        let at = BASE + 0x4000 * queue as u64;
        [at, at + 0x1000, at + 0x2000]
    }

    fn start(&mut self, base: [u16; 2], features: u64) {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        self.qemu.set_features(features).unwrap();
        let region = self.memory.iter().next().unwrap();
        let handle = region.file_offset().unwrap().file().as_raw_fd();
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: LEN,
            userspace_addr: QEMU,
            mmap_offset: 0,
            mmap_handle: handle,
        };
        self.qemu.set_mem_table(&[info]).unwrap();
        for (queue, base) in base.into_iter().enumerate() {
            let [table, available, used] = Self::areas(queue).map(|at| at - BASE + QEMU);
            self.qemu.set_vring_num(queue, SIZE).unwrap();
            self.qemu.set_vring_base(queue, base).unwrap();
            let config = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: table,
                used_ring_addr: used,
                avail_ring_addr: available,
                log_addr: None,
            };
            self.qemu.set_vring_addr(queue, &config).unwrap();
            self.qemu.set_vring_kick(queue, &self.kicks[queue]).unwrap();
            self.qemu.set_vring_call(queue, &self.calls[queue]).unwrap();
            self.qemu.set_vring_enable(queue, true).unwrap();
        }
    }

    fn stop(&mut self) -> [u16; 2] {
        [0, 1].map(|queue| self.qemu.get_vring_base(queue).unwrap() as u16)
    }

    fn offer(&mut self, queue: usize, n: u16, at: u64, len: u32, flags: u16) {
        let [table, available, _] = Self::areas(queue);
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&at.to_le_bytes());
        descriptor[8..12].copy_from_slice(&len.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        self.memory.write_slice(&descriptor, GuestAddress(table + 16 * u64::from(n))).unwrap();
        self.available_again(queue, n, available);
    }

    fn available_again(&mut self, queue: usize, n: u16, available: u64) {
        let slot = available + 4 + 2 * u64::from(self.available[queue] % SIZE);
        self.memory.write_obj(n, GuestAddress(slot)).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory
            .store(self.available[queue], GuestAddress(available + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
        self.kicks[queue].write(1).unwrap();
    }

    /// The buffer that was used next, and how much of it, if there is one.
    fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let [.., used] = Self::areas(queue);
        let index: u16 =
            self.memory.load(GuestAddress(used + 2), std::sync::atomic::Ordering::SeqCst).unwrap();
        if index == self.seen[queue] {
            return None;
        }
        let slot = used + 4 + 8 * u64::from(self.seen[queue] % SIZE);
        self.seen[queue] = self.seen[queue].wrapping_add(1);
        let id: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        Some((id as u16, self.memory.read_obj(GuestAddress(slot + 4)).unwrap()))
    }

    fn send(&mut self, header: &Header, payload: &[u8]) {
        let at = BASE + 0x20_0000;
        self.memory.write_slice(&header.emit(), GuestAddress(at)).unwrap();
        self.memory.write_slice(payload, GuestAddress(at + HEADER_LEN as u64)).unwrap();
        self.offer(1, 0, at, (HEADER_LEN + payload.len()) as u32, 0);
        let used = until("the device takes nothing", || self.used(1));
        assert_eq!(used, (0, 0));
    }

    fn packet(&self, port: u32, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST,
            src_port: port,
            dst_port: PORT,
            kind: STREAM,
            op,
            buf_alloc: 1 << 18,
            fwd_cnt: self.read,
            ..Header::default()
        }
    }

    fn say(&mut self, port: u32, op: u16, flags: u32, payload: &[u8]) {
        let header = Header { flags, len: payload.len() as u32, ..self.packet(port, op) };
        self.send(&header, payload);
    }

    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let (id, len) = self.used(0)?;
        let at = BASE + 0x10_0000 + SLOT * u64::from(id);
        let mut header = [0; HEADER_LEN];
        self.memory.read_slice(&mut header, GuestAddress(at)).unwrap();
        let header = Header::parse(&header);
        assert_eq!(len, HEADER_LEN as u32 + header.len);
        let mut payload = vec![0; header.len as usize];
        self.memory.read_slice(&mut payload, GuestAddress(at + HEADER_LEN as u64)).unwrap();
        let [_, available, _] = Self::areas(0);
        self.available_again(0, id, available);
        self.read = self.read.wrapping_add(header.len);
        assert_eq!((header.src_cid, header.dst_cid), (HOST, CID));
        Some((header, payload))
    }

    /// The next packet that says something besides credit.
    fn hear(&mut self) -> (Header, Vec<u8>) {
        until("nothing for the guest", || self.poll().filter(|(header, _)| header.op != op::CREDIT_UPDATE))
    }

    fn hears(&mut self, port: u32, op: u16) {
        let (header, _) = self.hear();
        assert_eq!((header.op, header.dst_port), (op, port));
    }

    fn open(&mut self, port: u32) {
        self.say(port, op::REQUEST, 0, &[]);
        self.hears(port, op::RESPONSE);
    }
}

#[test]
fn bytes_and_ends_go_both_ways() {
    let front = Front::start(&[]);
    let daemon = Daemon::listen(&front, 1);
    let mut guest = Guest::connect(&front);
    daemon.boot();
    guest.open(1000);
    let mut stream = daemon.stream();
    guest.say(1000, op::RW, 0, b"to the daemon");
    let mut heard = [0; 13];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"to the daemon");
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(guest.hear().1, b"to the guest");

    guest.say(1000, op::RW, 0, b"last words");
    guest.say(1000, op::SHUTDOWN, NO_SEND, &[]);
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"last words");
    stream.write_all(&vec![7; 50_000]).unwrap();
    drop(stream);
    let mut got = 0;
    let end = loop {
        match guest.hear() {
            (Header { op: op::RW, .. }, bytes) => got += bytes.len(),
            // That nobody receives any more may come at any time.
            (Header { op: op::SHUTDOWN, flags: NO_RECEIVE, .. }, _) => {}
            (end, _) => break end,
        }
    };
    assert_eq!((got, end.op, end.flags), (50_000, op::SHUTDOWN, NO_RECEIVE | NO_SEND));
    guest.say(1000, op::RST, 0, &[]);
    guest.say(1000, op::RW, 0, b"nobody is there");
    guest.hears(1000, op::RST);
}

#[test]
fn a_closing_guest_is_answered_when_the_daemon_has_read() {
    let front = Front::start(&[]);
    let daemon = Daemon::listen(&front, 1);
    let mut guest = Guest::connect(&front);
    daemon.boot();
    guest.open(9);
    let mut stream = daemon.stream();
    guest.say(9, op::RW, 0, b"bye");
    guest.say(9, op::SHUTDOWN, NO_SEND | NO_RECEIVE, &[]);
    guest.hears(9, op::RST);
    let mut heard = String::new();
    stream.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "bye");
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn the_daemon_may_come_late_go_and_come_back() {
    let front = Front::start(&[]);
    let mut guest = Guest::connect(&front);
    guest.say(1, op::REQUEST, 0, &[]);
    guest.hears(1, op::RST);

    let daemon = Daemon::listen(&front, 1);
    daemon.memory();
    guest.open(2);
    let stream = daemon.stream();
    // It hangs up, and is not dead: what it has it keeps, what is new waits for it.
    drop(daemon);
    guest.say(3, op::REQUEST, 0, &[]);
    let daemon = Daemon::listen(&front, 1);
    daemon.memory();
    guest.hears(3, op::RESPONSE);
    (&stream).write_all(b"still here").unwrap();
    assert_eq!(guest.hear().1, b"still here");
    let third = daemon.stream();
    // Another one knows nothing of the streams.
    drop(daemon);
    let daemon = Daemon::listen(&front, 2);
    guest.hears(2, op::RST);
    guest.hears(3, op::RST);
    assert_eq!((&third).read(&mut [0; 1]).unwrap(), 0);
    daemon.memory();
    guest.open(2);
    daemon.stream();
}

#[test]
fn qemu_may_pause_reset_and_go() {
    let front = Front::start(&[]);
    let mut daemon = Daemon::listen(&front, 1);
    // Once all that belongs to the daemon is there.
    drop(Guest::connect(&front));
    daemon.boot();
    assert_eq!(daemon.next().0, Message::FrontGone {});
    let before = front.descriptors();
    let mut guest = Guest::connect(&front);
    daemon.boot();
    guest.open(1);
    let mut stream = daemon.stream();
    let features = guest.qemu.get_features().unwrap();

    let base = daemon.quiet_while(|| guest.stop());
    stream.write_all(b"while it stands").unwrap();
    guest.start(base, features);
    daemon.memory();
    assert_eq!(daemon.next().0, Message::FrontResumed {});
    assert_eq!(guest.hear().1, b"while it stands");

    daemon.quiet_while(|| guest.stop());
    // The driver of the new boot sets its rings up anew.
    let [areas, _] = [Guest::areas(0), Guest::areas(1)];
    guest.memory.write_slice(&vec![0; 0x8000], GuestAddress(areas[0])).unwrap();
    (guest.available, guest.seen, guest.read) = ([0; 2], [0; 2], 0);
    guest.start([0, 0], features);
    (0..SIZE).for_each(|n| guest.offer(0, n, BASE + 0x10_0000 + SLOT * u64::from(n), SLOT as u32, 2));
    daemon.boot();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    guest.say(1, op::RW, 0, b"of another life");
    guest.hears(1, op::RST);
    guest.open(1);
    let mut stream = daemon.stream();

    assert!(front.maps().contains("memfd:guest"));
    drop(guest);
    assert_eq!(daemon.next().0, Message::FrontGone {});
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    until("something is left", || (front.descriptors() == before).then_some(()));
    assert!(!front.maps().contains("memfd:guest"));
    let mut guest = Guest::connect(&front);
    daemon.boot();
    guest.open(1);
}

#[test]
fn a_front_that_is_told_to_end_leaves_no_stream_hanging() {
    let mut front = Front::start(&[]);
    let daemon = Daemon::listen(&front, 1);
    let mut guest = Guest::connect(&front);
    daemon.boot();
    guest.open(1);
    let mut stream = daemon.stream();
    kill_process(Pid::from_child(&front.child), Signal::TERM).unwrap();
    guest.hears(1, op::RST);
    assert!(front.child.wait().unwrap().success());
    assert!(!front.socket().exists());
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(matches!(daemon.carrier.receive_with(), Err(Gone::Closed)));
}

#[test]
fn a_stream_whose_reader_sleeps_holds_up_no_other() {
    let front = Front::start(&["--max-streams", "2"]);
    let daemon = Daemon::listen(&front, 1);
    let mut guest = Guest::connect(&front);
    daemon.boot();
    guest.open(1);
    let mut slow = daemon.stream();
    guest.open(2);
    let mut quick = daemon.stream();
    guest.say(3, op::REQUEST, 0, &[]);
    guest.hears(3, op::RST);
    // As much as the device gives credit for, which is more than nothing and not for ever.
    let (mut sent, mut room, mut forwarded) = (0u32, 1u32 << 16, 0u32);
    let still = Instant::now() + Duration::from_secs(1);
    while Instant::now() < still {
        let credit = room - sent.wrapping_sub(forwarded);
        if credit > 0 {
            guest.say(1, op::RW, 0, &vec![1; credit.min(32 << 10) as usize]);
            sent += credit.min(32 << 10);
        }
        guest.say(1, op::CREDIT_REQUEST, 0, &[]);
        while let Some((header, _)) = guest.poll() {
            assert_eq!((header.op, header.dst_port), (op::CREDIT_UPDATE, 1));
            (room, forwarded) = (header.buf_alloc, header.fwd_cnt);
        }
    }
    assert!((1 << 16..8 << 20).contains(&sent), "{sent}");
    guest.say(2, op::RW, 0, b"quick");
    quick.read_exact(&mut [0; 5]).unwrap();
    slow.read_exact(&mut vec![0; sent as usize]).unwrap();
}

#[test]
fn a_daemon_that_missed_a_reboot_hears_of_it() {
    let front = Front::start(&[]);
    let daemon = Daemon::listen(&front, 1);
    let guest = Guest::connect(&front);
    daemon.boot();
    drop(daemon);
    drop(guest);
    let guest = Guest::connect(&front);
    let daemon = Daemon::listen(&front, 1);
    assert_eq!(daemon.next().0, Message::FrontGone {});
    daemon.memory();
    drop(guest);
}

#[test]
fn resets_that_nobody_takes_hold_the_guest_up_and_nothing_is_lost() {
    let front = Front::start(&[]);
    let mut guest = Guest::connect(&front);
    let at = BASE + 0x20_0000;
    let header = Header { op: op::RW, ..guest.packet(1, op::RW) };
    guest.memory.write_slice(&header.emit(), GuestAddress(at)).unwrap();
    let (mut offered, mut used, mut heard) = (0, 0, 0);
    let quiet = |guest: &mut Guest, used: &mut i32| {
        let mut since = Instant::now();
        while since.elapsed() < Duration::from_millis(50) {
            while guest.used(1).is_some() {
                (*used, since) = (*used + 1, Instant::now());
            }
        }
    };
    while offered - used < i32::from(SIZE) {
        (offered - used..SIZE.into()).for_each(|n| guest.offer(1, n as u16, at, HEADER_LEN as u32, 0));
        offered = used + i32::from(SIZE);
        quiet(&mut guest, &mut used);
        if used > 1000 {
            break;
        }
    }
    assert!((300..1000).contains(&used), "held up after {used}");
    until("not all are reset", || {
        while let Some((header, _)) = guest.poll() {
            assert_eq!((header.op, header.dst_port), (op::RST, 1));
            heard += 1;
        }
        (heard == offered).then_some(())
    });
    quiet(&mut guest, &mut used);
    assert_eq!(used, offered);
}

#[test]
fn a_driver_that_lies_harms_itself_only() {
    let front = Front::start(&[]);
    let daemon = Daemon::listen(&front, 1);
    let mut guest = Guest::connect(&front);
    daemon.boot();
    guest.open(1);
    let mut stream = daemon.stream();
    for (at, len, flags) in [(0, 44, 0), (u64::MAX - 5, 44, 0), (BASE, 3, 0), (BASE, 44, 2), (BASE, 44, 4)] {
        guest.offer(1, 0, at, len, flags);
        assert_eq!(until("it is kept", || guest.used(1)), (0, 0));
    }
    // One more buffer than there can be: the queue is broken, and the streams with it.
    guest.available[1] = guest.available[1].wrapping_add(SIZE + 1);
    guest.offer(1, 0, BASE, 44, 0);
    guest.hears(1, op::RST);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    let features = guest.qemu.get_features().unwrap();
    assert_eq!(features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 1 << 30);
    // QEMU is still answered, also for a daemon that is dead, or does not answer.
    guest.stop();
    assert_eq!(daemon.next().0, Message::FrontPaused {});
    // Who talks nonsense instead of vhost-user is hung up on, and the next one served.
    drop(guest);
    let mut stranger = UnixStream::connect(front.socket()).unwrap();
    stranger.write_all(&[0xff; 64]).unwrap();
    stranger.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(matches!(stranger.read(&mut [0; 1]), Ok(0) | Err(_)));
    drop(stranger);
    let mut guest = Guest::connect(&front);
    guest.open(1);
}
