//! What control messages are made of, and how each part is written and read: little-endian, in order, checked.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::Side;
use crate::layout::Geometry;
use crate::reason::Reason;

/// A connection's addresses, seen from its owner. IPv4-mapped IPv6 addresses are IPv4 here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tuple {
    /// The owner's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

impl Tuple {
    /// A tuple with mapped addresses unmapped and flow labels and scopes dropped.
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
        Self { local: plain(local), remote: plain(remote) }
    }

    /// The same connection seen from the other end.
    #[must_use]
    pub fn mirrored(self) -> Self {
        Self { local: self.remote, remote: self.local }
    }
}

/// What carries a direction's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Lane {
    /// Kernel TCP, the anchor itself.
    Tcp,
    /// A ring shared by two endpoints.
    Direct,
    /// Ring, backend, fabric, backend, ring.
    Fabric,
}

impl Lane {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Direct => "direct",
            Self::Fabric => "fabric",
        }
    }

    /// Its number, as messages and records carry it.
    pub fn code(self) -> u8 {
        match self {
            Self::Tcp => 0,
            Self::Direct => 1,
            Self::Fabric => 2,
        }
    }

    /// The lane with this number.
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Tcp),
            1 => Some(Self::Direct),
            2 => Some(Self::Fabric),
            _ => None,
        }
    }
}

/// A segment for one generation of a connection, and who the receiver of the message is in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Segment {
    /// The slab's number, unique in the life of the backend named by `boot`.
    pub slab: u64,
    /// Number of the segment in the slab.
    pub index: u32,
    /// The slab's sizes.
    pub geometry: Geometry,
    /// The side of the message's receiver.
    pub side: Side,
    /// `Direct` or `Fabric`.
    pub lane: Lane,
}

/// Most regions of a guest's memory: what vhost-user can hand over at a time.
pub const MAX_REGIONS: u32 = 32;

/// A region of a guest's memory: whole pages, which wrap round nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Region {
    /// Which one of its table, from 0.
    pub index: u32,
    /// How many the table has.
    pub count: u32,
    /// Where it begins for the guest.
    pub address: u64,
    /// Its bytes.
    pub size: u64,
    /// Where it begins in its descriptor.
    pub offset: u64,
}

impl Region {
    /// Whether it can be.
    pub fn is_valid(&self) -> bool {
        let Self { index, count, address, size, offset } = *self;
        let ends = |from: u64| from.checked_add(size).is_some_and(|end| i64::try_from(end).is_ok());
        let whole = |n: u64| n.is_multiple_of(4096);
        index < count
            && count <= MAX_REGIONS
            && size > 0
            && [address, size, offset].into_iter().all(whole)
            && ends(address)
            && ends(offset)
    }
}

/// Runs of pages in one message.
pub const RUNS: usize = 12;

/// Pages of a guest's memory, in the order of what lies in them: runs of pages with numbers one behind the other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Runs([u64; RUNS]);

impl Runs {
    /// As many of these pages as fit, by their guest-physical page numbers, and how many that were. Number 0, and those that
    /// do not fit 48 bits, are no ring's page: such a list is not made.
    pub fn of(pages: &[u64]) -> Option<(Self, usize)> {
        let mut runs = [0; RUNS];
        let (mut taken, mut at) = (0, 0);
        while at < RUNS && taken < pages.len() {
            let first = pages[taken];
            if first == 0 || first >> 48 != 0 {
                return None;
            }
            let follows = |n: &usize| pages.get(taken + n) == Some(&(first + *n as u64));
            let len = (1..usize::from(u16::MAX)).find(|n| !follows(n)).unwrap_or(usize::from(u16::MAX));
            runs[at] = first << 16 | len as u64;
            (taken, at) = (taken + len, at + 1);
        }
        Some((Self(runs), taken))
    }

    /// Each run: the number of its first page, and how many there are.
    pub fn iter(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        self.0.iter().take_while(|run| **run != 0).map(|run| (run >> 16, (run & 0xffff) as usize))
    }
}

/// Fields in their order in a body.
pub(super) struct Writer<'a>(pub(super) &'a mut [u8]);
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

pub(super) trait Field: Sized {
    fn put(&self, out: &mut Writer<'_>);
    fn take(from: &mut Reader<'_>) -> Option<Self>;
}

impl Writer<'_> {
    pub fn bytes(&mut self, bytes: &[u8]) {
        let (head, rest) = core::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = rest;
    }
}

impl<'a> Reader<'a> {
    pub fn bytes<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(head)
    }
}

macro_rules! integer_fields {
    ($($t:ty),*) => { $(impl Field for $t {
        fn put(&self, out: &mut Writer<'_>) { out.bytes(&self.to_le_bytes()); }
        fn take(from: &mut Reader<'_>) -> Option<Self> { Some(Self::from_le_bytes(*from.bytes()?)) }
    })* };
}
integer_fields!(u8, u16, u32, u64, u128);

impl Field for bool {
    fn put(&self, out: &mut Writer<'_>) {
        u8::from(*self).put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        match u8::take(from)? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
}

impl Field for Reason {
    fn put(&self, out: &mut Writer<'_>) {
        (*self as u16).put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        Self::from_code(u16::take(from)?)
    }
}

impl Field for SocketAddr {
    fn put(&self, out: &mut Writer<'_>) {
        let (family, ip) = match self.ip() {
            IpAddr::V4(v4) => (4u8, v4.to_ipv6_mapped()),
            IpAddr::V6(v6) => (6, v6),
        };
        family.put(out);
        out.bytes(&ip.octets());
        self.port().put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let family = u8::take(from)?;
        let ip = Ipv6Addr::from(*from.bytes::<16>()?);
        let port = u16::take(from)?;
        let ip = match family {
            4 => IpAddr::V4(ip.to_ipv4_mapped()?),
            6 if ip.to_ipv4_mapped().is_none() => IpAddr::V6(ip),
            _ => return None,
        };
        Some(Self::new(ip, port))
    }
}

impl Field for Tuple {
    fn put(&self, out: &mut Writer<'_>) {
        self.local.put(out);
        self.remote.put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let (local, remote) = (SocketAddr::take(from)?, SocketAddr::take(from)?);
        (local.is_ipv4() == remote.is_ipv4()).then_some(Self { local, remote })
    }
}

impl Field for Segment {
    fn put(&self, out: &mut Writer<'_>) {
        self.slab.put(out);
        self.index.put(out);
        self.geometry.put(out);
        (self.side.index() as u8).put(out);
        self.lane.code().put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let (slab, index) = (u64::take(from)?, u32::take(from)?);
        let geometry = Geometry::take(from)?;
        let side = Side::from_index(u8::take(from)?)?;
        let lane = Lane::from_code(u8::take(from)?).filter(|l| *l != Lane::Tcp)?;
        geometry.segment_offset(index)?;
        Some(Self { slab, index, geometry, side, lane })
    }
}

impl Field for Geometry {
    fn put(&self, out: &mut Writer<'_>) {
        self.segments().put(out);
        (self.ring_len() as u64).put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        Self::new(u32::take(from)?, u64::take(from)?)
    }
}

impl Field for Runs {
    fn put(&self, out: &mut Writer<'_>) {
        self.0.iter().for_each(|run| run.put(out));
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let mut runs = [0; RUNS];
        for run in &mut runs {
            *run = u64::take(from)?;
        }
        // Neither a page 0, nor a run of nothing, nor one behind the end.
        let used = runs.iter().take_while(|run| **run != 0).count();
        let good = |run: &u64| run >> 16 != 0 && run & 0xffff != 0;
        (used > 0 && runs[..used].iter().all(good) && runs[used..].iter().all(|run| *run == 0))
            .then_some(Self(runs))
    }
}

impl Field for Region {
    fn put(&self, out: &mut Writer<'_>) {
        self.index.put(out);
        self.count.put(out);
        self.address.put(out);
        self.size.put(out);
        self.offset.put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let (index, count) = (u32::take(from)?, u32::take(from)?);
        let (address, size, offset) = (u64::take(from)?, u64::take(from)?, u64::take(from)?);
        Some(Self { index, count, address, size, offset }).filter(Self::is_valid)
    }
}
