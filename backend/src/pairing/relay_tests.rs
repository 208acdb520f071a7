//! Pairing on one host where the two share no memory.

use super::tests::{A, B, One, a_to_b, tuple};
use super::*;

fn relayed() -> One {
    One::with([true, false, false])
}

/// In a stay of generation 1, both committed.
fn committed() -> One {
    let mut one = relayed();
    one.open_both(1);
    one.pairing.handle_prepared(A, 1);
    one.pairing.handle_prepared(B, 1);
    assert_eq!(one.done(), ["relay 0 1 generation 1", "0/1 commit 1", "1/2 commit 1"]);
    one
}

#[test]
fn either_who_shares_nothing_makes_it_a_relay() {
    for relayed in [[true, false, false], [false, true, false], [true, true, false]] {
        let mut one = One::with(relayed);
        one.open(A, a_to_b(), 4);
        let asked = ["0/1 prepare 9 side 0, carried", "1/2 prepare 9 side 0, carried"];
        assert_eq!(one.open(B, a_to_b().mirrored(), 9), asked);
        assert_eq!(one.segs.out.len(), 2);
        one.pairing.handle_prepared(B, 9);
        assert!(one.done().is_empty(), "no relay before both are ready");
        one.pairing.handle_prepared(A, 9);
        assert_eq!(one.done(), ["relay 0 1 generation 9", "0/1 commit 9", "1/2 commit 9"]);
        assert_eq!(one.pairing.lanes(), Lanes { direct: 0, fabric: 0, relay: 1 });
        assert!(one.pairing.lines().all(|line| line.lane == "relay"));
    }
    let mut others = One::with([false, false, true]);
    others.open_both(1);
    assert_eq!(others.segs.out.len(), 1, "a third one's choice is its own");
}

#[test]
fn the_relay_ends_before_anyone_is_told_and_memory_waits_for_its_own_guest() {
    let mut one = committed();
    assert_eq!(one.left(A, 1), ["relay ends", "1/2 withdraw 1 peer-left", "release of 0 to reuse"]);
    assert_eq!((one.pairing.lanes().relay, one.pairing.stays()), (0, 1));
    assert_eq!(one.left(B, 1), ["release of 1 to reuse"]);
    // And again, in the same memory.
    one.open(A, a_to_b(), 2);
    assert_eq!(one.open(B, a_to_b().mirrored(), 2).len(), 2);
    one.pairing.handle_prepared(A, 2);
    one.pairing.handle_prepared(B, 2);
    assert_eq!(one.done()[0], "relay 0 1 generation 2");
    assert_eq!(one.segs.keys.len(), 2);
}

#[test]
fn opening_again_before_leaving_counts_when_both_have_left() {
    let mut one = committed();
    assert!(one.open(A, a_to_b(), 2).is_empty());
    assert!(one.open(B, a_to_b().mirrored(), 2).is_empty());
    one.left(A, 1);
    let after = one.left(B, 1);
    assert!(after.contains(&"0/1 prepare 2 side 0, carried".to_owned()), "{after:?}");
    assert!(after.contains(&"1/2 prepare 2 side 0, carried".to_owned()), "{after:?}");
}

#[test]
fn a_stay_that_is_refused_has_no_relay() {
    let mut one = relayed();
    one.open_both(1);
    one.pairing.handle_prepared(A, 1);
    one.pairing.handle_refused(B, 1, Reason::Untrackable, one.now);
    assert_eq!(one.done(), ["0/1 withdraw 1 untrackable", "release of 1 to reuse"]);
    assert_eq!(one.segs.out.len(), 1, "nobody has written to the one who refused");
    assert_eq!(one.left(A, 1), ["release of 0 to reuse"]);
}

#[test]
fn who_is_busy_is_asked_again() {
    let mut one = relayed();
    one.open_both(1);
    one.pairing.handle_refused(B, 1, Reason::Busy, one.now);
    one.done();
    one.left(A, 1);
    one.pairing.handle_timeout(one.now + REST);
    let asked = ["0/1 prepare 2 side 0, carried", "1/2 prepare 2 side 0, carried"];
    assert_eq!(one.done(), asked);
}

#[test]
fn a_dead_agent_loses_its_own_memory_only() {
    for (vport, other, lost, kept) in [
        (0, B, "release of 0 lost", "release of 1 to reuse"),
        (1, A, "release of 1 lost", "release of 0 to reuse"),
    ] {
        let mut one = committed();
        one.pairing.handle_detached(vport);
        let withdraw = format!("{}/{} withdraw 1 peer-left", other.vport, other.conn);
        assert_eq!(one.done(), ["relay ends", &withdraw, lost]);
        assert_eq!(one.left(other, 1), [kept]);
        assert_eq!((one.pairing.stays(), one.segs.out.len()), (0, 0));
    }
    let mut one = committed();
    one.pairing.handle_detached(0);
    one.pairing.handle_detached(1);
    one.done();
    assert_eq!((one.pairing.stays(), one.segs.out.len()), (0, 0));
}

#[test]
fn closing_and_draining_end_the_relay_at_once() {
    let mut one = committed();
    one.pairing.handle_close(A);
    assert_eq!(one.done(), ["relay ends", "1/2 withdraw 1 ending"]);
    one.left(B, 1);
    assert_eq!(one.left(A, 1), ["release of 0 to reuse"]);
    let mut one = committed();
    assert!(one.pairing.handle_drain(1, true));
    assert_eq!(one.done(), ["1/0 withdraw 0 drained", "relay ends", "0/1 withdraw 1 drained"]);
    one.left(A, 1);
    one.left(B, 1);
    assert_eq!(one.open(A, a_to_b(), 2), ["0/1 declined drained"]);
    one.open(B, a_to_b().mirrored(), 2);
    assert!(one.pairing.handle_drain(1, false));
    assert_eq!(one.done().len(), 2, "both are asked");
}

#[test]
fn the_first_ones_memory_is_given_back_if_there_is_none_for_the_second() {
    let mut one = relayed();
    one.segs.there = Some(1);
    one.open_both(1);
    assert_eq!((one.segs.out.len(), one.pairing.stays()), (0, 0));
    one.pairing.handle_memory((1, 1));
    assert_eq!(one.done(), ["release of 0 to reuse"], "still only one");
    one.segs.there = Some(2);
    one.pairing.handle_memory((1, 1));
    assert_eq!(one.done().len(), 2, "both are asked");
    assert_eq!(one.segs.out.len(), 2);
    // None at all is a reason, which both hear.
    let mut one = relayed();
    one.segs.empty = true;
    one.open(A, a_to_b(), 1);
    assert_eq!(one.open(B, a_to_b().mirrored(), 1), ["0/1 declined quota", "1/2 declined quota"]);
}

#[test]
fn a_relay_that_fails_is_withdrawn_from_both() {
    let mut one = committed();
    let relay = *one.pairing.stays.keys().next().unwrap();
    one.pairing.handle_relay_failed(relay + 1, Reason::Violation);
    assert!(one.done().is_empty());
    one.pairing.handle_relay_failed(relay, Reason::Violation);
    one.pairing.handle_relay_failed(relay, Reason::Violation);
    assert_eq!(one.done(), ["relay ends", "0/1 withdraw 1 violation", "1/2 withdraw 1 violation"]);
    one.left(A, 1);
    assert_eq!(one.left(B, 1), ["release of 1 to reuse"]);
    one.pairing.handle_relay_failed(relay, Reason::Violation);
    assert!(one.done().is_empty());
}

#[test]
fn an_orderly_end_withdraws_relays() {
    let mut one = committed();
    assert_eq!(one.pairing.carried_stays(), 1);
    one.pairing.handle_stop(Reason::BackendGone);
    assert_eq!(one.done(), ["relay ends", "0/1 withdraw 1 backend-gone", "1/2 withdraw 1 backend-gone"]);
    one.left(A, 1);
    one.left(B, 1);
    assert_eq!((one.pairing.carried_stays(), one.segs.out.len()), (0, 0));
}

#[test]
fn ends_of_one_guest_are_not_relayed() {
    let mut one = relayed();
    let alone = tuple("198.51.100.1:1", "198.51.100.1:2");
    assert_eq!(one.open(A, alone, 1), ["0/1 declined peer-unknown"]);
}
