//! What stands in a capture's queue: one segment, with what the tool cannot know.

#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// Bytes of a record before the segment's header; header and payload follow.
pub const RECORD_LEN: usize = 56;

/// Where a segment goes, seen from the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From our guest.
    Tx,
    /// To our guest.
    Rx,
}

/// One segment.
///
/// ```text
/// 0  way u8 (0 tx, 1 rx)   2  header u16   4  payload u32   8  kept u32   16  time u64, ns
/// 24  own VTEP, IPv6 or mapped   40  the peer's
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Its direction.
    pub way: Way,
    /// Bytes of its header, which follow the record.
    pub header: usize,
    /// Bytes of its payload.
    pub payload: usize,
    /// How many of these follow the header.
    pub kept: usize,
    /// When it was taken, since the epoch.
    pub time: Duration,
    /// This host's end of the overlay, and the peer's.
    pub ends: (IpAddr, IpAddr),
}

impl Record {
    /// Bytes of the record with what follows it.
    pub fn whole(&self) -> usize {
        RECORD_LEN + self.header + self.kept
    }

    /// Its image. Integers are in the machine's order: the queue does not leave it.
    pub fn encode(&self) -> [u8; RECORD_LEN] {
        let mut image = [0; RECORD_LEN];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[u8::from(self.way == Way::Rx)]);
        put(2, &(self.header as u16).to_ne_bytes());
        put(4, &(self.payload as u32).to_ne_bytes());
        put(8, &(self.kept as u32).to_ne_bytes());
        put(16, &(self.time.as_nanos() as u64).to_ne_bytes());
        put(24, &octets(self.ends.0));
        put(40, &octets(self.ends.1));
        image
    }

    /// What an image says.
    pub fn decode(image: &[u8; RECORD_LEN]) -> Self {
        fn take<const N: usize>(image: &[u8; RECORD_LEN], at: usize) -> [u8; N] {
            let mut bytes = [0; N];
            bytes.copy_from_slice(&image[at..at + N]);
            bytes
        }
        let end = |at| IpAddr::from(Ipv6Addr::from(take::<16>(image, at))).to_canonical();
        Self {
            way: if image[0] == 0 { Way::Tx } else { Way::Rx },
            header: u16::from_ne_bytes(take(image, 2)).into(),
            payload: u32::from_ne_bytes(take(image, 4)) as usize,
            kept: u32::from_ne_bytes(take(image, 8)) as usize,
            time: Duration::from_nanos(u64::from_ne_bytes(take(image, 16))),
            ends: (end(24), end(40)),
        }
    }
}

fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip() {
        for ends in [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]] {
            let [own, peer] = ends.map(|end| end.parse().unwrap());
            let time = Duration::new(1_900_000_000, 123_456_789);
            let record =
                Record { way: Way::Rx, header: 102, payload: 32768, kept: 77, time, ends: (own, peer) };
            assert_eq!(Record::decode(&record.encode()), record);
            assert_eq!(record.whole(), 56 + 102 + 77);
        }
    }
}
