//! The guest's established connections, as its kernel knows them.
//!
//! The kernel is asked by sock_diag(7) for those alone: `/proc/net/tcp` lists closed connections too, for a minute each, and
//! where many come and go that takes seconds, in which the agent would serve nobody.

#![forbid(unsafe_code)]

use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use vsocket_channel::message::Tuple;

/// Families, as the kernel names them.
const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];
const ESTABLISHED: u8 = 1;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
/// `struct inet_diag_msg`.
const FOUND: usize = 72;

/// All of them.
pub fn tuples() -> Vec<Tuple> {
    // A kernel without sock_diag has the table.
    asked().unwrap_or_else(|_| listed())
}

fn asked() -> io::Result<Vec<Tuple>> {
    let protocol = Some(net::netlink::SOCK_DIAG);
    let socket = net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, protocol)?;
    let mut found = Vec::new();
    for family in FAMILIES {
        net::send(&socket, &question(family), SendFlags::empty())?;
        let mut room = vec![0; 64 << 10];
        loop {
            // The kernel goes on with its answer at each call; it never lets us wait.
            let (len, _) = net::recv(&socket, &mut room[..], RecvFlags::DONTWAIT)?;
            if !take(&room[..len], &mut found)? {
                break;
            }
        }
    }
    Ok(found)
}

fn question(family: u8) -> [u8; HEADER + REQUEST] {
    let mut bytes = [0; HEADER + REQUEST];
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    bytes[0..4].copy_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[HEADER] = family;
    bytes[HEADER + 1] = libc::IPPROTO_TCP as u8;
    bytes[HEADER + 4..HEADER + 8].copy_from_slice(&(1u32 << ESTABLISHED).to_ne_bytes());
    bytes
}

/// Takes one piece of an answer; whether there is more.
fn take(mut bytes: &[u8], found: &mut Vec<Tuple>) -> io::Result<bool> {
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    while let Some(head) = bytes.first_chunk::<HEADER>() {
        let len = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let body = bytes.get(HEADER..len).ok_or_else(broken)?;
        match i32::from(u16::from_ne_bytes([head[4], head[5]])) {
            libc::NLMSG_DONE => return Ok(false),
            libc::NLMSG_ERROR => return Err(io::ErrorKind::Unsupported.into()),
            _ => found.extend(body.first_chunk().and_then(tuple)),
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// Who an `inet_diag_msg` is about: family, state, two bytes, both ports, both addresses in 16 bytes each.
fn tuple(bytes: &[u8; FOUND]) -> Option<Tuple> {
    let address = |port: usize, at: usize| {
        let ip = match i32::from(bytes[0]) {
            libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*bytes[at..].first_chunk::<4>()?)),
            libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(*bytes[at..].first_chunk::<16>()?)),
            _ => return None,
        };
        Some(SocketAddr::new(ip, u16::from_be_bytes([bytes[port], bytes[port + 1]])))
    };
    (bytes[1] == ESTABLISHED).then_some(())?;
    Some(Tuple::new(address(4, 8)?, address(6, 24)?))
}

fn listed() -> Vec<Tuple> {
    let read = |name: &str| std::fs::read_to_string(name).unwrap_or_default();
    let tables = [read("/proc/self/net/tcp"), read("/proc/self/net/tcp6")];
    tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(parse).collect()
}

/// A line of `/proc/net/tcp` or `tcp6`, if it is an established connection.
fn parse(line: &str) -> Option<Tuple> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    (state == "01").then_some(())?;
    Some(Tuple::new(address(local)?, address(remote)?))
}

/// `0100007F:1F90`: 32-bit words in the machine's order, each of the address's bytes in the network's.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |n: usize| Some(u32::from_str_radix(ip.get(8 * n..8 * n + 8)?, 16).ok()?.to_ne_bytes());
    let ip = if ip.len() == 8 {
        IpAddr::V4(Ipv4Addr::from(word(0)?))
    } else {
        let mut octets = [0; 16];
        for (n, chunk) in octets.chunks_exact_mut(4).enumerate() {
            chunk.copy_from_slice(&word(n)?);
        }
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn both_ways_find_what_is_there() {
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(listen).unwrap();
            let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let tuple = Tuple::new(a.local_addr().unwrap(), a.peer_addr().unwrap());
            for found in [asked().unwrap(), listed()] {
                assert!(found.contains(&tuple), "{tuple:?}");
                assert!(!found.iter().any(|t| t.remote.port() == 0), "listeners are not listed");
            }
        }
    }

    #[test]
    fn an_answer_that_cannot_be_is_refused() {
        let mut found = Vec::new();
        let mut bytes = question(FAMILIES[0]).to_vec();
        assert!(take(&bytes, &mut found).unwrap() && found.is_empty());
        for len in [0u32, 15, 73] {
            bytes[0..4].copy_from_slice(&len.to_ne_bytes());
            assert!(take(&bytes, &mut found).is_err());
        }
        assert!(take(&bytes[..7], &mut found).unwrap());
    }
}
