use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

const QEMU: u64 = 0x7000_0000_0000;

fn session() -> Session {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let epoll = Arc::new(epoll);
    let link = Link::new("/nonexistent/daemon".into(), 7, epoll.clone());
    let mut session = Session::new(7, epoll, Rc::new(RefCell::new(link)));
    session.set_features(VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()).unwrap();
    session
}

fn memory(session: &mut Session) {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x20_000).unwrap();
    let region = VhostUserMemoryRegion::new(0x10_0000, 0x10_000, QEMU, 0x10_000);
    session.set_mem_table(&[region], vec![file.into()], None).unwrap();
}

fn start(session: &mut Session, base: [u32; 2]) {
    for index in 0..2 {
        session.set_vring_num(index, 8).unwrap();
        session.set_vring_base(index, base[index as usize]).unwrap();
        let at = QEMU + 0x4000 * u64::from(index);
        let flags = VhostUserVringAddrFlags::empty();
        session.set_vring_addr(index, flags, at, at + 0x1000, at + 0x2000, 0).unwrap();
        let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        session.set_vring_kick(index as u8, Some(kick.into())).unwrap();
        session.set_vring_enable(index, true).unwrap();
    }
}

fn stop(session: &mut Session) -> [u32; 2] {
    [0, 1].map(|index| session.get_vring_base(index).unwrap().num)
}

fn events(session: &mut Session) -> Vec<Event> {
    std::iter::from_fn(|| session.poll_event()).filter(|event| *event != Event::Running).collect()
}

#[test]
fn a_pause_is_no_reboot() {
    let mut session = session();
    memory(&mut session);
    start(&mut session, [0, 0]);
    assert_eq!(events(&mut session), [Event::Memory, Event::Rebooted]);
    assert!(session.vring(RX).0.runs() && session.vring(TX).0.runs());
    for vring in &mut session.vrings {
        vring.queue().set_next_avail(5);
    }
    assert_eq!(stop(&mut session), [5, 5]);
    assert!(!session.vring(TX).0.runs());
    memory(&mut session);
    start(&mut session, [5, 5]);
    assert_eq!(events(&mut session), [Event::Memory]);
    stop(&mut session);
    start(&mut session, [0, 0]);
    assert_eq!(events(&mut session), [Event::Rebooted]);
    // One queue may stand at zero by chance.
    session.vrings[0].queue().set_next_avail(9);
    assert_eq!(stop(&mut session), [9, 0]);
    start(&mut session, [9, 0]);
    assert_eq!(events(&mut session), []);
}

#[test]
fn the_memory_can_be_handed_on() {
    let mut session = session();
    memory(&mut session);
    let regions: Vec<_> = session.regions().map(|(region, _)| region).collect();
    let want = Region { index: 0, count: 1, address: 0x10_0000, size: 0x10_000, offset: 0x10_000 };
    assert_eq!(regions, [want]);
    assert!(want.is_valid());
}

#[test]
fn what_is_wrong_is_an_error() {
    let mut session = session();
    memory(&mut session);
    assert!(session.set_features(1 << 28).is_err());
    assert!(session.set_vring_num(0, 3).is_err());
    assert!(session.set_vring_num(0, 1 << 16).is_err());
    assert!(session.set_vring_num(2, 8).is_err());
    assert!(session.set_vring_base(0, 1 << 16).is_err());
    assert!(session.get_vring_base(7).is_err());
    assert!(session.set_vring_kick(0, None).is_err());
    let flags = VhostUserVringAddrFlags::empty;
    assert!(session.set_vring_addr(0, flags(), QEMU - 16, QEMU, QEMU, 0).is_err());
    assert!(session.set_vring_addr(0, flags(), QEMU, QEMU + 0x10_000, QEMU, 0).is_err());
    let config = VhostUserConfigFlags::empty();
    assert_eq!(session.get_config(0, 8, config).unwrap(), 7u64.to_le_bytes());
    assert!(session.get_config(0, 9, config).is_err() && session.get_config(u32::MAX, 2, config).is_err());
    let region = VhostUserMemoryRegion::new(0, 0x1000, QEMU, 0);
    let overlapping = VhostUserMemoryRegion::new(0x800, 0x1000, QEMU + 0x1000, 0);
    let file = || {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 0x2000).unwrap();
        File::from(file)
    };
    assert!(session.set_mem_table(&[region, overlapping], vec![file(), file()], None).is_err());
    let longer = VhostUserMemoryRegion::new(0, 0x4000, QEMU, 0);
    assert!(session.set_mem_table(&[longer], vec![file()], None).is_err());
}

#[test]
fn queues_in_memory_that_is_taken_away_break() {
    let mut session = session();
    memory(&mut session);
    start(&mut session, [0, 0]);
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x1000).unwrap();
    let region = VhostUserMemoryRegion::new(0x10_0000, 0x1000, QEMU, 0);
    session.set_mem_table(&[region], vec![file.into()], None).unwrap();
    assert!(!session.vring(RX).0.runs() && !session.vring(TX).0.runs());
}
