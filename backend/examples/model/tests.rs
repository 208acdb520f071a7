//! What must hold of any run, and that the document says what the program says.

use crate::costs::Stage;
use crate::report::{ONE, RNIC, SOFT, path, redis, run, text};
use crate::{RING, Setting, Work};

/// Gbit/s of the wire.
fn line_rate(setting: &Setting) -> f64 {
    8.0 / setting.costs[Stage::WireByte as usize]
}

#[test]
fn no_stream_is_faster_than_the_wire_or_the_window() {
    for write in [64, 4096, 64 << 10, 1 << 20] {
        for more in [0.0, 10_000.0, 100_000.0] {
            let mut setting = RNIC;
            for stage in [Stage::WireSmall, Stage::WireLarge] {
                setting.costs[stage as usize] += more;
            }
            let seen = run(setting, Work::Stream { write });
            let window = RING as f64 * 8.0 / (setting.costs[Stage::WireLarge as usize] + more);
            let most = line_rate(&setting).min(window);
            assert!(seen.gbits > 0.0 && seen.gbits <= most, "{write} B, {more} ns: {} of {most}", seen.gbits);
            assert!(seen.flight <= RING, "{} in flight", seen.flight);
            assert!(seen.busy.iter().all(|share| *share <= 1.001), "{:?}", seen.busy);
        }
    }
}

#[test]
fn no_round_trip_is_shorter_than_its_stages() {
    for setting in [RNIC, SOFT] {
        for (connections, pause) in [(1, 0.0), (1, 500_000.0), (10, 0.0), (40, 0.0)] {
            for spinning in [true, false] {
                let seen = run(Setting { spinning, ..setting }, Work::Ask { connections, pause });
                let least: f64 = path(&setting).iter().sum();
                assert!(seen.trip >= least, "{connections}, {pause}: {} < {least}", seen.trip);
                if pause == 0.0 {
                    // Little's law: there is always one under way on each connection.
                    let under_way = seen.rate * seen.trip / 1e9;
                    assert!((under_way / connections as f64 - 1.0).abs() < 0.05, "{under_way}");
                }
            }
        }
    }
}

#[test]
fn sleeping_ends_cost_their_wake_ups() {
    let seldom = Work::Ask { connections: 1, pause: 500_000.0 };
    let seen = run(Setting { spinning: false, ..RNIC }, seldom);
    // Both programs and the backends that are asked; the backend that asked is awake still.
    let wakes: f64 = [Stage::Wake, Stage::WakeNear]
        .iter()
        .map(|at| seen.spent[*at as usize] / RNIC.costs[*at as usize])
        .sum();
    assert!((3.5..6.5).contains(&wakes), "{wakes}");
    assert!(seen.trip > run(RNIC, ONE).trip + 3.0 * RNIC.costs[Stage::Wake as usize]);
}

#[test]
fn redis_is_not_faster_than_redis() {
    for connections in [1, 10, 40] {
        let (setting, work) = redis(RNIC, connections);
        assert!(run(setting, work).rate <= 1e9 / setting.costs[Stage::Server as usize]);
    }
}

#[test]
fn the_same_again() {
    assert_eq!(run(SOFT, ONE), run(SOFT, ONE));
}

#[test]
fn the_document_says_what_the_program_says() {
    let document = include_str!("../../../docs/performance.md");
    let begin = "<!-- printed by the model: begin -->\n";
    let (_, rest) = document.split_once(begin).expect("the tables");
    let (tables, _) = rest.split_once("<!-- printed by the model: end -->").expect("their end");
    assert_eq!(tables.trim(), text().trim(), "see the document for how to print them again");
}
