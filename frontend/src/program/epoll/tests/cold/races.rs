//! What happens beside a look: arrivals, an agent's answer, a shutdown.

use super::*;
use crate::kernel;
use crate::program::poll;

/// The far end, with one byte at a time: the next when the one before has been taken.
fn ping(line: &Line, taken: &AtomicU64) {
    let bound = line.conn.bound().unwrap();
    let ring = bound.rx();
    for head in 0..MESSAGES {
        while taken.load(Ordering::Acquire) != head {
            std::hint::spin_loop();
        }
        (0..(head * 7919) % 300).for_each(|_| std::hint::spin_loop());
        ring.bytes.put(head, b"x");
        ring.publish(head + 1);
        publish_fence();
        let bells = line.entry.slab.bells(Side::Zero).iter().zip(&line.entry.own);
        bells.filter(|(bell, _)| bell.take()).for_each(|(_, own)| {
            rustix::io::write(own, &1u64.to_ne_bytes()).unwrap();
        });
    }
}

const MESSAGES: u64 = 20_000;

/// Who asks for room as well is told of that, while something arrives.
#[test]
fn what_arrives_during_a_look_is_an_edge_of_the_next() {
    let rig = Rig::new(1, IN | OUT | ET);
    let line = &rig.lines[0];
    assert_eq!(line.send(1), Ok(1));
    let taken = AtomicU64::new(0);
    let lost = std::thread::scope(|scope| {
        scope.spawn(|| ping(line, &taken));
        let (mut got, mut since) = (0, Instant::now());
        while got < MESSAGES {
            if rig.ready().iter().any(|(_, events)| events & IN != 0) {
                while line.recv().is_ok() {
                    got += 1;
                }
                since = Instant::now();
            } else if since.elapsed() > Duration::from_secs(10) {
                let lost = got;
                // The other thread is to end.
                while got < MESSAGES {
                    got += u64::from(line.recv().is_ok());
                    taken.store(got, Ordering::Release);
                }
                return Some(lost);
            }
            taken.store(got, Ordering::Release);
        }
        None
    });
    assert_eq!(lost, None, "no edge after so many messages");
}

/// A set with a descriptor in it that is being opened.
fn plain(line: &Line, set: &OwnedFd, events: u32) {
    let (fd, epfd) = (line.fd, set.as_raw_fd());
    // As before the agent's answer.
    table::slot(fd).unwrap().phase.store(table::OPENING, Ordering::SeqCst);
    assert_eq!(ctl(epfd, libc::EPOLL_CTL_ADD, fd, Some((events, 77))), Outcome::Bypass);
    let flags = epoll::EventFlags::from_bits_retain(events);
    epoll::add(set, line.conn.anchor(), epoll::EventData::new_u64(77), flags).unwrap();
    ctl_done(epfd, libc::EPOLL_CTL_ADD, fd, Some((events, 77)));
}

/// Another thread reads the agent's answer.
fn answered(line: &Line) {
    table::slot(line.fd).unwrap().phase.store(table::HELD, Ordering::SeqCst);
    hold(line.fd, &line.conn.clone());
}

#[test]
fn what_is_taken_out_beside_the_agents_answer_is_reported_no_more() {
    let mut rig = Rig::new(1, IN);
    let (fd, epfd) = (rig.lines[0].fd, rig.epfd.as_raw_fd());
    forget_fd(fd);
    plain(&rig.lines[0], &rig.epfd, IN);
    assert_eq!(ctl(epfd, libc::EPOLL_CTL_DEL, fd, None), Outcome::Bypass);
    answered(&rig.lines[0]);
    epoll::delete(&rig.epfd, rig.lines[0].conn.anchor()).unwrap();
    ctl_done(epfd, libc::EPOLL_CTL_DEL, fd, None);
    rig.lines[0].publish(b"1");
    rig.lines[0].bell();
    assert_eq!(rig.ready(), vec![], "reported after it was taken out");
}

#[test]
fn what_is_changed_beside_the_agents_answer_is_what_counts() {
    let mut rig = Rig::new(1, IN);
    let (fd, epfd) = (rig.lines[0].fd, rig.epfd.as_raw_fd());
    forget_fd(fd);
    plain(&rig.lines[0], &rig.epfd, OUT);
    assert_eq!(ctl(epfd, libc::EPOLL_CTL_MOD, fd, Some((IN, 78))), Outcome::Bypass);
    answered(&rig.lines[0]);
    let flags = epoll::EventFlags::from_bits_retain(IN);
    epoll::modify(&rig.epfd, rig.lines[0].conn.anchor(), epoll::EventData::new_u64(78), flags).unwrap();
    ctl_done(epfd, libc::EPOLL_CTL_MOD, fd, Some((IN, 78)));
    rig.lines[0].publish(b"1");
    rig.lines[0].bell();
    assert_eq!(rig.ready(), vec![(78, IN)]);
}

#[test]
fn what_comes_again_over_the_anchor_is_an_edge_for_who_found_nothing() {
    let mut rig = Rig::new(1, IN | ET);
    rig.lines[0].publish(&[5; 100]);
    rig.lines[0].bell();
    assert_eq!(rig.ready(), vec![(0, IN)]);
    rig.lines[0].far.write_all(&[5; 60]).unwrap();
    let _ = rig.lines[0].endpoint().leave(u32::MAX);
    let back = rig.lines[0].conn.stirring(|| rig.lines[0].endpoint().take_back());
    assert_eq!(back, crate::endpoint::Return::Done);
    assert_eq!(rig.lines[0].recv(), Ok(60));
    assert_eq!(rig.lines[0].recv(), Err(Errno::AGAIN));
    let _ = rig.ready();
    let _ = rig.ready();
    rig.lines[0].far.write_all(&[5; 20]).unwrap();
    assert_eq!(rig.ready(), vec![(0, IN)], "no edge");
}

#[test]
fn a_part_of_a_frame_before_the_end_is_a_reset() {
    for reset in [false, true] {
        let mut rig = Rig::new(1, IN);
        let line = &mut rig.lines[0];
        line.far.write_all(&[7; 5]).unwrap();
        if reset {
            kernel::abort(&line.far);
        } else {
            line.far.shutdown(std::net::Shutdown::Both).unwrap();
        }
        poll::ends_within(line.fd, Duration::from_secs(9));
        let told: Vec<_> = (0..3).map(|_| (rig.ready().len(), rig.lines[0].recv())).collect();
        assert_eq!(told, [(1, Err(Errno::CONNRESET)), (1, Ok(0)), (1, Ok(0))], "reset {reset}");
    }
}

#[test]
fn who_waits_for_room_hears_of_a_shutdown() {
    let rig = Rig::new(1, 0);
    let fd = rig.lines[0].fd;
    while rig.lines[0].send(RING).is_ok() {}
    table::slot(fd).unwrap().set_nonblocking(false);
    rig.lines[0].near.as_ref().unwrap().set_nonblocking(false).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let bytes = [5; 9];
        let got = socket::send(fd, table::slot(fd).unwrap(), &[IoSlice::new(&bytes)], SendFlags::empty());
        let _ = sender.send(got);
    });
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(socket::shutdown(fd, true, true), Outcome::Done(Ok(0)));
    let got = receiver.recv_timeout(Duration::from_secs(9));
    assert_eq!(got, Ok(Err(Errno::PIPE)));
}

#[test]
fn who_has_shut_both_ways_on_a_fabric_lane_is_deaf_when_its_agent_looks() {
    let mut rig = Rig::new(1, 0);
    rig.lines[0].publish(&[5; 10]);
    assert_eq!(rig.lines[0].recv(), Ok(10));
    let line = &mut rig.lines[0];
    let geometry = Geometry::new(1, RING as u64).unwrap();
    let segment = Segment { slab: 1, index: 0, geometry, side: Side::Zero, lane: Lane::Fabric };
    let fabric = Bound::new(1, &segment, line.entry.slab.clone(), Arc::new(Vec::new())).unwrap();
    line.conn.bind(fabric, line.entry.clone());
    assert_eq!(socket::shutdown(line.fd, true, true), Outcome::Done(Ok(0)));
    assert_eq!(line.ring(1).indices.reader.closed.load(Ordering::Relaxed), 1);
    // The far end does as `send_locked` and `seal` say.
    let frame = vsocket_channel::lane::Rewind { generation: 1, resume: 10, last: false }.encode(7);
    line.far.write_all(&frame).unwrap();
    while kernel::unread(line.conn.anchor()).unwrap() < frame.len() as u64 {
        std::thread::yield_now();
    }
    // The agent does.
    line.endpoint().attend();
    line.far.set_nonblocking(true).unwrap();
    let mut written = 0;
    let error = loop {
        match line.far.write(&[5; 4096]) {
            Ok(n) => written += n,
            Err(error) => break error,
        }
    };
    assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "{written} bytes were taken by nobody");
}
