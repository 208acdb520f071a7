use super::*;
use crate::memory::Slab;
use crate::program::client::SlabEntry;
use std::sync::Arc;
use vsocket_channel::Side;
use vsocket_channel::layout::{Geometry, LAYOUT_VERSION, SLAB_MAGIC};

/// A set that hears a slab's doorbells on one side.
fn listening() -> (EpollSet, Arc<SlabEntry>) {
    let geometry = Geometry::new(1, 4096).unwrap();
    let memfd = rustix::fs::memfd_create("slab", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, geometry.slab_len() as u64).unwrap();
    let header = [&SLAB_MAGIC.to_ne_bytes()[..], &LAYOUT_VERSION.to_ne_bytes()].concat();
    assert_eq!(rustix::io::pwrite(&memfd, &header, 0), Ok(12));
    let slab = Arc::new(Slab::map(&memfd, 1, geometry).unwrap());
    let entry = Arc::new(SlabEntry::new(slab, vec![], vec![]));
    let set = EpollSet::new(-1);
    set.ours.store(true, Ordering::Relaxed);
    set.spin.store(0, Ordering::Relaxed);
    set.inner.lock().unwrap().hear_one(&entry, Side::One);
    (set, entry)
}

const APPLICATION: libc::epoll_event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 7 };

/// Whoever publishes between the announcement and the last look takes the announcement, and that look takes the edge:
/// the thread must not then sleep as one who has announced nothing.
#[test]
fn a_bell_heard_in_the_last_look_is_announced_again() {
    let (set, entry) = listening();
    let bell = &entry.slab.bells(Side::One)[set.bell];
    let mut out = [libc::epoll_event { events: 0, u64: 0 }; 4];
    let (mut rung, mut slept) = (0, 0);
    let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
        if timeout.is_none() {
            slept += 1;
            assert!(bell.take(), "asleep without an announcement");
            out[0] = APPLICATION;
            return Ok(1);
        }
        if bell.take() {
            rung += 1;
            out[0] = libc::epoll_event { events: libc::EPOLLIN as u32, u64: TOKEN | BELLS };
            return Ok(1);
        }
        Ok(0)
    };
    assert_eq!(set.wait(&mut out, None, None, &mut real), Ok(1));
    assert_eq!({ out[0].u64 }, 7);
    assert_eq!((rung, slept), (1, 1));
    let far = &entry.slab.bells(Side::Zero)[set.bell];
    assert!(!far.take() && set.inner.lock().unwrap().sleepers == 0);
    wait::return_bell(set.bell);
}

/// What the agent says between the announcement and the last look is read, not slept upon.
#[test]
fn mail_heard_in_the_last_look_is_read_before_sleeping() {
    let (set, entry) = listening();
    let bell = &entry.slab.bells(Side::One)[set.bell];
    let mut out = [libc::epoll_event { events: 0, u64: 0 }; 4];
    let mut said = false;
    let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
        if timeout.is_none() {
            assert!(said && !set.control.load(Ordering::Relaxed), "slept upon unread mail");
            out[0] = APPLICATION;
            return Ok(1);
        }
        if bell.sleeping.load(Ordering::Relaxed) != 0 && !std::mem::replace(&mut said, true) {
            out[0] = libc::epoll_event { events: libc::EPOLLIN as u32, u64: TOKEN | CONTROL };
            return Ok(1);
        }
        Ok(0)
    };
    assert_eq!(set.wait(&mut out, None, None, &mut real), Ok(1));
    wait::return_bell(set.bell);
}

/// Who asks for one event and does not wait gets it, also when the kernel has events of ours before it.
#[test]
fn events_of_ours_take_no_room_from_the_applications() {
    let (set, _entry) = listening();
    let mut out = [libc::epoll_event { events: 0, u64: 0 }];
    let ours = |number| libc::epoll_event { events: libc::EPOLLIN as u32, u64: TOKEN | number };
    let mut queue = vec![APPLICATION, ours(BELLS), ours(CONTROL)];
    let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
        assert!(timeout.is_some(), "asleep");
        Ok(queue.pop().map_or(0, |event| {
            out[0] = event;
            1
        }))
    };
    let now = Some(Duration::ZERO);
    assert_eq!(set.wait(&mut out, now, Some(Instant::now()), &mut real), Ok(1));
    assert_eq!({ out[0].u64 }, 7);
    wait::return_bell(set.bell);
}

/// One of two sleeping threads takes the edge: the other's sleep stays announced.
#[test]
fn a_bell_that_wakes_one_thread_is_announced_for_the_other() {
    let (set, entry) = listening();
    let bell = &entry.slab.bells(Side::One)[set.bell];
    let mut out = [libc::epoll_event { events: 0, u64: 0 }; 4];
    let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
        if timeout.is_some() {
            return Ok(0);
        }
        set.inner.lock().unwrap().sleepers += 1;
        assert!(bell.take());
        out[0] = APPLICATION;
        out[1] = libc::epoll_event { events: libc::EPOLLIN as u32, u64: TOKEN | BELLS };
        Ok(2)
    };
    assert_eq!(set.wait(&mut out, None, None, &mut real), Ok(1));
    assert!(bell.take(), "the other thread sleeps without an announcement");
    wait::return_bell(set.bell);
}

mod cold {
    use super::*;
    use crate::endpoint::Endpoint;
    use crate::memory::{Bound, Records};
    use crate::program::conn::{Conn, Shared};
    use crate::program::socket;
    use rustix::fd::OwnedFd;
    use rustix::io::{IoSlice, IoSliceMut};
    use rustix::net::{RecvFlags, SendFlags};
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use vsocket_channel::bell::publish_fence;
    use vsocket_channel::lane::Stay;
    use vsocket_channel::message::{Lane, Segment};
    use vsocket_channel::ring::Ring;

    mod races;

    const RING: usize = 4096;
    const IN: u32 = libc::EPOLLIN as u32;
    const OUT: u32 = libc::EPOLLOUT as u32;
    const ET: u32 = libc::EPOLLET as u32;

    /// A slab of one segment, the program's side of it being 0.
    fn slab() -> Arc<SlabEntry> {
        let geometry = Geometry::new(1, RING as u64).unwrap();
        let memfd = rustix::fs::memfd_create("slab", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, geometry.slab_len() as u64).unwrap();
        let header = [&SLAB_MAGIC.to_ne_bytes()[..], &LAYOUT_VERSION.to_ne_bytes()].concat();
        assert_eq!(rustix::io::pwrite(&memfd, &header, 0), Ok(12));
        let bells = || {
            let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
            (0..4).map(|_| rustix::event::eventfd(0, flags).unwrap()).collect::<Vec<OwnedFd>>()
        };
        Arc::new(SlabEntry::new(Arc::new(Slab::map(&memfd, 1, geometry).unwrap()), bells(), bells()))
    }

    /// A connection of the program, on both rings of a slab of its own, and its far end.
    struct Line {
        fd: i32,
        conn: ConnRef,
        entry: Arc<SlabEntry>,
        far: TcpStream,
        near: Option<TcpStream>,
        /// What the far end has written.
        head: u64,
        /// What it has read.
        tail: u64,
    }

    impl Line {
        fn new(records: &Arc<Shared>, index: u32) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let far = listener.accept().unwrap().0;
            near.set_nonblocking(true).unwrap();
            let fd = near.as_raw_fd();
            let slot = table::slot(fd).unwrap();
            slot.follow(true);
            slot.set_nonblocking(true);
            let conn = Conn::make(fd, index, records).unwrap();
            conn.record().init(0, 0, true);
            slot.hold(conn.clone());
            let mut line = Self { fd, conn, entry: slab(), far, near: Some(near), head: 0, tail: 0 };
            line.bind(1);
            line
        }

        /// Onto both rings of a generation, in a new slab.
        fn bind(&mut self, generation: u32) {
            self.entry = slab();
            let geometry = Geometry::new(1, RING as u64).unwrap();
            let segment = Segment { slab: 1, index: 0, geometry, side: Side::Zero, lane: Lane::Direct };
            let far = Arc::new(Vec::new());
            let segment = Bound::new(generation, &segment, self.entry.slab.clone(), far).unwrap();
            self.conn.bind(segment, self.entry.clone());
            self.conn.endpoint().prepare(generation).unwrap();
            super::bound(&self.conn);
            assert!(self.ring(1).indices.publish_stay(Stay { generation, start: self.head, escape: 7 }));
            self.endpoint().record.ready.store(generation, Ordering::Release);
            assert_eq!(self.endpoint().readable(), Some(false));
        }

        fn endpoint(&self) -> Endpoint<'_> {
            self.conn.endpoint()
        }

        fn ring(&self, from: usize) -> Ring<'_> {
            let bound = self.conn.bound().unwrap();
            if from == 0 { bound.tx() } else { bound.rx() }
        }

        /// As the far end does after it has published something: whether it had to ring.
        fn bell(&self) -> bool {
            publish_fence();
            let mask = self.conn.bound().unwrap().header().waiters[0].mask.load(Ordering::Relaxed);
            let bells = self.entry.slab.bells(Side::Zero).iter().enumerate();
            let rung: Vec<_> = bells.filter(|(n, bell)| mask & 1 << n != 0 && bell.take()).collect();
            for (n, _) in &rung {
                rustix::io::write(&self.entry.own[*n], &1u64.to_ne_bytes()).unwrap();
            }
            !rung.is_empty()
        }

        /// The far end sends; it does not ring.
        fn publish(&mut self, bytes: &[u8]) {
            let ring = self.ring(1);
            ring.bytes.put(self.head, bytes);
            ring.publish(self.head + bytes.len() as u64);
            self.head += bytes.len() as u64;
        }

        /// The far end reads everything.
        fn drain(&mut self) {
            let ring = self.ring(0);
            let n = ring.available(self.tail).unwrap() as u64;
            ring.release(self.tail + n);
            publish_fence();
            let wanted = ring.indices.stay.want_space.swap(0, Ordering::AcqRel) != 0;
            self.tail += n;
            if wanted {
                self.bell();
            }
        }

        fn send(&self, n: usize) -> Result<usize, Errno> {
            let bytes = vec![5; n];
            socket::send(self.fd, table::slot(self.fd).unwrap(), &[IoSlice::new(&bytes)], SendFlags::empty())
        }

        fn recv(&self) -> Result<usize, Errno> {
            let mut bytes = [0; RING];
            let mut bufs = [IoSliceMut::new(&mut bytes)];
            socket::recv(self.fd, table::slot(self.fd).unwrap(), &mut bufs, RecvFlags::empty())
        }
    }

    impl Drop for Line {
        fn drop(&mut self) {
            forget_fd(self.fd);
            table::slot(self.fd).unwrap().forget();
            self.near.take();
        }
    }

    /// A set of the kernel's with `lines` in it, waiting for these events.
    struct Rig {
        epfd: OwnedFd,
        set: &'static EpollSet,
        lines: Vec<Line>,
    }

    impl Rig {
        fn new(lines: u32, events: u32) -> Self {
            let epfd = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            created(epfd.as_raw_fd());
            let set = set_of(epfd.as_raw_fd()).unwrap();
            set.spin.store(0, Ordering::Relaxed);
            set.ours.store(true, Ordering::Relaxed);
            let (memfd, records) = Records::create().unwrap();
            let watchdog = memfd.try_clone().unwrap();
            let shared = Arc::new(Shared { records, memory: memfd, name: (0, 0), watchdog });
            let lines = (0..lines).map(|n| Line::new(&shared, n)).collect();
            let rig = Self { epfd, set, lines };
            for n in 0..rig.lines.len() {
                rig.ctl(libc::EPOLL_CTL_ADD, n, events);
            }
            // A socket has room from the beginning.
            rig.ready();
            rig.sleep();
            rig
        }

        fn ctl(&self, op: i32, n: usize, events: u32) {
            let done = ctl(self.epfd.as_raw_fd(), op, self.lines[n].fd, Some((events, n as u64)));
            assert_eq!(done, Outcome::Done(Ok(0)));
        }

        /// What is ready. The kernel is asked, and nobody sleeps.
        fn ready(&self) -> Vec<(u64, u32)> {
            let mut out = [libc::epoll_event { events: 0, u64: 0 }; 8];
            let real = |out: &mut [libc::epoll_event], _| {
                // SAFETY: the list has room for as many.
                let n = unsafe { libc::epoll_wait(self.set.fd, out.as_mut_ptr(), out.len() as i32, 0) };
                Ok(usize::try_from(n).unwrap())
            };
            self.set.kernel_turn.store(0, Ordering::Relaxed);
            let found = wait(self.set.fd, &mut out, Some(Duration::ZERO), real);
            let Outcome::Done(Ok(n)) = found else { panic!("not ours") };
            let mut found: Vec<_> = out[..n].iter().map(|e| ({ e.u64 }, { e.events })).collect();
            found.sort_unstable();
            found
        }

        /// Nothing is ready, and the slabs are announced, until no connection needs another look.
        fn sleep(&self) {
            loop {
                assert_eq!(self.ready(), vec![]);
                if self.watched() == 0 {
                    return;
                }
            }
        }

        fn watched(&self) -> usize {
            // A slab is announced before a sleep only.
            let mut inner = self.set.looking().unwrap();
            inner.announce();
            let mut out = [libc::epoll_event { events: 0, u64: 0 }; 8];
            assert_eq!(self.set.harvest(&mut inner, &mut out, true), 0);
            inner.watched().count()
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            self.lines.clear();
            closed_set(self.epfd.as_raw_fd());
        }
    }

    /// Those that nothing has happened to cost nothing.
    #[test]
    fn a_cold_slab_is_not_looked_at_until_its_bell_rings() {
        let mut rig = Rig::new(2, IN);
        rig.lines[1].publish(b"bytes");
        assert_eq!(rig.ready(), vec![], "looked at without a bell");
        assert!(rig.lines[1].bell(), "nobody has announced a sleep");
        assert_eq!(rig.ready(), vec![(1, IN)]);
        // Level-triggered: until it is read.
        assert_eq!(rig.ready(), vec![(1, IN)]);
        assert_eq!(rig.lines[1].recv(), Ok(5));
        assert_eq!(rig.ready(), vec![]);
        rig.sleep();
    }

    #[test]
    fn a_warm_slab_needs_no_bell() {
        let mut rig = Rig::new(1, IN);
        rig.lines[0].publish(b"1");
        rig.lines[0].bell();
        assert_eq!(rig.ready(), vec![(0, IN)]);
        assert_eq!(rig.lines[0].recv(), Ok(1));
        rig.lines[0].publish(b"2");
        assert!(!rig.lines[0].bell());
        assert_eq!(rig.ready(), vec![(0, IN)]);
    }

    /// Whoever publishes before the announcement does not ring: the look after it finds the bytes.
    #[test]
    fn what_was_published_before_the_announcement_is_found() {
        let mut rig = Rig::new(1, IN);
        rig.lines[0].publish(b"1");
        rig.lines[0].bell();
        assert_eq!(rig.ready(), vec![(0, IN)]);
        assert_eq!(rig.lines[0].recv(), Ok(1));
        assert_eq!(rig.ready(), vec![]);
        rig.lines[0].publish(b"2");
        assert!(!rig.lines[0].bell());
        rig.set.inner.lock().unwrap().announce();
        assert_eq!(rig.ready(), vec![(0, IN)]);
    }

    /// A set that never sleeps lets go of what is idle, and then hears its bell.
    #[test]
    fn a_slab_turns_cold_in_a_busy_set_too() {
        let mut rig = Rig::new(2, IN);
        for n in 0..2 {
            rig.lines[n].publish(b"1");
            rig.lines[n].bell();
        }
        assert_eq!(rig.ready(), vec![(0, IN), (1, IN)]);
        assert_eq!(rig.lines[1].recv(), Ok(1));
        let later = wait::clock() + 1_000_000_000;
        let mut inner = rig.set.looking().unwrap();
        inner.cool(later);
        let mut out = [libc::epoll_event { events: 0, u64: 0 }; 8];
        assert_eq!(inner.harvest(&mut out, false, later), 1);
        assert_eq!(inner.watched().map(|hot| hot.fd).collect::<Vec<_>>(), [rig.lines[0].fd]);
        drop(inner);
        rig.lines[1].publish(b"2");
        assert!(rig.lines[1].bell());
        assert_eq!(rig.ready(), vec![(0, IN), (1, IN)]);
    }

    #[test]
    fn an_edge_comes_for_each_arrival_in_a_cold_slab() {
        let mut rig = Rig::new(1, IN | ET);
        for n in 0..3 {
            rig.lines[0].publish(b"more");
            assert!(rig.lines[0].bell(), "round {n}");
            assert_eq!(rig.ready(), vec![(0, IN)]);
            assert_eq!(rig.ready(), vec![]);
            rig.sleep();
        }
        assert_eq!(rig.lines[0].recv(), Ok(12));
    }

    /// A send that takes less than it was given in a slab that is cold: room is a new edge, although nobody was asked to
    /// tell of it before.
    #[test]
    fn room_is_an_edge_after_a_send_that_blocked() {
        for blocks in [false, true] {
            let mut rig = Rig::new(1, OUT | ET);
            // That it comes onto the ring is no event.
            rig.lines[0].send(1).unwrap();
            rig.sleep();
            assert_eq!(rig.lines[0].send(2 * RING), Ok(RING - 1));
            if blocks {
                assert_eq!(rig.lines[0].send(1), Err(Errno::AGAIN));
            } else {
                // The next look asks for it.
                assert_eq!(rig.ready(), vec![]);
                rig.sleep();
            }
            rig.lines[0].drain();
            assert_eq!(rig.ready(), vec![(0, OUT)]);
        }
    }

    /// There is room again before anybody could ask to be told of it.
    #[test]
    fn room_that_came_at_once_is_an_edge_too() {
        let mut rig = Rig::new(1, OUT | ET);
        rig.lines[0].send(1).unwrap();
        rig.sleep();
        assert_eq!(rig.lines[0].send(2 * RING), Ok(RING - 1));
        rig.lines[0].drain();
        assert_eq!(rig.ready(), vec![(0, OUT)]);
    }

    #[test]
    fn an_interest_that_was_renewed_is_looked_at() {
        let oneshot = IN | libc::EPOLLONESHOT as u32;
        let mut rig = Rig::new(1, oneshot);
        rig.lines[0].publish(b"1");
        rig.lines[0].bell();
        assert_eq!(rig.ready(), vec![(0, IN)]);
        rig.sleep();
        for again in [oneshot, oneshot | ET] {
            rig.ctl(libc::EPOLL_CTL_MOD, 0, again);
            assert_eq!(rig.ready(), vec![(0, IN)]);
            rig.sleep();
        }
        rig.ctl(libc::EPOLL_CTL_DEL, 0, 0);
        rig.sleep();
        rig.ctl(libc::EPOLL_CTL_ADD, 0, IN);
        assert_eq!(rig.ready(), vec![(0, IN)]);
    }

    /// The agent has done something with a connection, and says only that.
    #[test]
    fn a_connection_that_was_stirred_is_looked_at_in_every_set() {
        let rigs = [Rig::new(1, IN), Rig::new(0, IN)];
        let line = &rigs[0].lines[0];
        let second = ctl(rigs[1].epfd.as_raw_fd(), libc::EPOLL_CTL_ADD, line.fd, Some((IN, 0)));
        assert_eq!(second, Outcome::Done(Ok(0)));
        rigs[1].sleep();
        for n in 0..3 {
            line.endpoint().record.set_status(status::RX_EOF, status::RX_EOF);
            assert_eq!(rigs[0].ready(), vec![], "round {n}: looked at by itself");
            line.conn.stir();
            assert_eq!(rigs[0].ready(), vec![(0, IN)]);
            assert_eq!(rigs[1].ready(), vec![(0, IN)]);
            line.endpoint().record.set_status(status::RX_EOF, 0);
            rigs.iter().for_each(Rig::sleep);
        }
    }

    /// A call of the application changes the lane; another set, or thread, has to know.
    #[test]
    fn a_call_that_changes_the_lane_stirs() {
        let rig = Rig::new(1, IN);
        assert_eq!(socket::shutdown(rig.lines[0].fd, true, false), Outcome::Done(Ok(0)));
        assert_eq!(rig.ready(), vec![(0, IN)]);
    }

    /// The kernel's socket has something to say: on the ring that is not the application's, but must be looked at.
    #[test]
    fn an_edge_of_the_kernel_is_heard() {
        let rig = Rig::new(1, IN);
        // The escape byte, of which more must come: the set goes on asking.
        (&rig.lines[0].far).write_all(&[7]).unwrap();
        assert_eq!(rig.ready(), vec![]);
        assert_eq!(rig.set.inner.lock().unwrap().watched().count(), 1);
        // Not the escape byte: the stay was never meant, and what follows is raw.
        let rig = Rig::new(1, IN);
        (&rig.lines[0].far).write_all(b"raw").unwrap();
        assert_eq!(rig.ready(), vec![(0, IN)]);
        assert_eq!(rig.lines[0].recv(), Ok(3));
        assert_eq!(rig.ready(), vec![]);
        (&rig.lines[0].far).write_all(b"more").unwrap();
        assert_eq!(rig.ready(), vec![(0, IN)]);
    }

    #[test]
    fn a_connection_in_another_slab_is_heard_there() {
        let mut rig = Rig::new(1, IN);
        // The stay was never meant.
        (&rig.lines[0].far).write_all(b"raw").unwrap();
        assert_eq!(rig.ready(), vec![(0, IN)]);
        assert_eq!(rig.lines[0].recv(), Ok(3));
        rig.lines[0].head = 3;
        rig.sleep();
        rig.lines[0].bind(2);
        rig.sleep();
        rig.lines[0].publish(b"there");
        assert!(rig.lines[0].bell());
        assert_eq!(rig.ready(), vec![(0, IN)]);
        assert_eq!(rig.lines[0].recv(), Ok(5));
    }

    /// The kernel reports a descriptor in its old way, and before anybody looks it becomes a connection of ours: an
    /// application that reads once for each event finds nothing the second time.
    #[test]
    fn a_connection_taken_in_during_the_sleep_is_reported_once() {
        let mut rig = Rig::new(1, IN);
        forget_fd(rig.lines[0].fd);
        rig.lines[0].publish(b"1");
        let mut out = [libc::epoll_event { events: 0, u64: 0 }; 8];
        let mut slept = 0;
        let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
            if timeout.is_some() {
                return Ok(0);
            }
            slept += 1;
            out[0] = libc::epoll_event { events: IN, u64: 0 };
            rig.ctl(libc::EPOLL_CTL_ADD, 0, IN);
            Ok(1)
        };
        assert_eq!(rig.set.wait(&mut out, None, None, &mut real), Ok(1));
        assert_eq!(slept, 1);
        // It is still ready, if the application has not read it.
        assert_eq!(rig.ready(), vec![(0, IN)]);
    }

    /// The kernel wakes who sleeps when what is waited for changes to something that is ready.
    #[test]
    fn a_change_of_what_is_waited_for_wakes_the_sleeper() {
        let mut rig = Rig::new(1, 0);
        wait::watch_kick(&rig.epfd, TOKEN | KICK);
        rig.lines[0].publish(b"1");
        let mut out = [libc::epoll_event { events: 0, u64: 0 }; 8];
        let mut real = |out: &mut [libc::epoll_event], timeout: Option<Timespec>| {
            if timeout.is_none() {
                rig.ctl(libc::EPOLL_CTL_MOD, 0, IN);
            }
            // SAFETY: the list has room for as many.
            let n = unsafe { libc::epoll_wait(rig.set.fd, out.as_mut_ptr(), out.len() as i32, 0) };
            assert!(timeout.is_some() || n > 0, "sleeps on");
            Ok(usize::try_from(n).unwrap())
        };
        assert_eq!(rig.set.wait(&mut out, None, None, &mut real), Ok(1));
    }

    /// A descriptor number that stands for another connection: what was known of the one before does not count.
    #[test]
    fn a_number_that_is_used_again_is_another_connection() {
        let mut rig = Rig::new(1, IN);
        rig.lines[0].publish(b"1");
        rig.lines[0].bell();
        assert_eq!(rig.ready(), vec![(0, IN)]);
        let member = rig.lines[0].conn.members().remove(0);
        forget_fd(rig.lines[0].fd);
        assert_eq!(rig.ready(), vec![]);
        rig.ctl(libc::EPOLL_CTL_ADD, 0, IN);
        member.set.stir(member.fd, 0);
        assert_eq!(rig.ready(), vec![(0, IN)]);
        assert_eq!(rig.ready(), vec![(0, IN)]);
        assert_eq!(rig.set.inner.lock().unwrap().watched().count(), 1);
    }
}
