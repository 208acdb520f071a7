//! Which segments a capture wants.

#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use vsocket_channel::message::{Message, Tuple};

/// One end of a connection, with wildcards.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EndFilter {
    /// Its address; `None` is any.
    pub ip: Option<IpAddr>,
    /// Its port; `None` is any.
    pub port: Option<u16>,
}

impl EndFilter {
    fn matches(&self, end: SocketAddr) -> bool {
        self.ip.is_none_or(|ip| ip == end.ip()) && self.port.is_none_or(|port| port == end.port())
    }

    /// As control messages carry it: what is unspecified is any.
    fn encoded(&self) -> SocketAddr {
        SocketAddr::new(self.ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), self.port.unwrap_or(0))
    }

    fn decoded(end: SocketAddr) -> Self {
        let ip = Some(end.ip()).filter(|ip| !ip.is_unspecified());
        Self { ip, port: Some(end.port()).filter(|port| *port != 0) }
    }

    /// `*`, `ADDR`, `ADDR:PORT`, `*:PORT`; an IPv6 address with a port in brackets.
    fn parse(text: &str) -> Result<Self, String> {
        let address = |text: &str| match text {
            "*" => Ok(None),
            text => match text.parse::<IpAddr>() {
                Ok(ip) => Ok(Some(ip.to_canonical())),
                Err(_) => Err(format!("'{text}' is no address: want one, or *")),
            },
        };
        let port = |text: &str| match text {
            "*" => Ok(None),
            text => match text.parse::<u16>() {
                Ok(port) if port != 0 => Ok(Some(port)),
                _ => Err(format!("'{text}' is no port: want 1 to 65535, or *")),
            },
        };
        if let Some((inside, after)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let port = match after.strip_prefix(':') {
                Some(after) => port(after)?,
                None if after.is_empty() => None,
                None => return Err(format!("'{after}' after the brackets is no port: want :PORT")),
            };
            return Ok(Self { ip: address(inside)?, port });
        }
        match text.split_once(':') {
            Some((_, after)) if after.contains(':') => Ok(Self { ip: address(text)?, port: None }),
            Some((before, after)) => Ok(Self { ip: address(before)?, port: port(after)? }),
            None => Ok(Self { ip: address(text)?, port: None }),
        }
    }
}

/// A connection seen from the guest of this host, with wildcards: `LOCAL-REMOTE`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowFilter {
    /// The guest's end.
    pub local: EndFilter,
    /// The far end.
    pub remote: EndFilter,
}

impl FlowFilter {
    /// Whether it is one of these connections.
    pub fn matches(&self, tuple: &Tuple) -> bool {
        self.local.matches(tuple.local) && self.remote.matches(tuple.remote)
    }
}

impl FromStr for FlowFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (local, remote) = text
            .split_once('-')
            .ok_or("want LOCAL-REMOTE, each an address with a port, * for any: '*-198.51.100.3:6379'")?;
        let (local, remote) = (EndFilter::parse(local)?, EndFilter::parse(remote)?);
        if let (Some(l), Some(r)) = (local.ip, remote.ip)
            && l.is_ipv4() != r.is_ipv4()
        {
            return Err(format!("{l} and {r} are no ends of one connection: one is IPv4, one IPv6"));
        }
        Ok(Self { local, remote })
    }
}

/// Everything that a segment must match.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    /// The vport's number.
    pub vport: Option<u32>,
    /// The tenant network.
    pub vni: Option<u32>,
    /// The connection.
    pub flow: FlowFilter,
}

impl Filter {
    /// Whether the segments of this connection are wanted.
    pub fn matches(&self, vport: u32, vni: u32, tuple: &Tuple) -> bool {
        self.vport.is_none_or(|v| v == vport) && self.vni.is_none_or(|v| v == vni) && self.flow.matches(tuple)
    }

    /// The request for a capture.
    pub fn request(&self, snaplen: u32, queue: u64) -> Message {
        Message::Capture {
            vport: self.vport.unwrap_or(u32::MAX),
            vni: self.vni.unwrap_or(u32::MAX),
            local: self.flow.local.encoded(),
            remote: self.flow.remote.encoded(),
            snaplen,
            queue,
        }
    }

    /// The filter of a request.
    pub fn of(vport: u32, vni: u32, local: SocketAddr, remote: SocketAddr) -> Self {
        let some = |n: u32| Some(n).filter(|n| *n != u32::MAX);
        let flow = FlowFilter { local: EndFilter::decoded(local), remote: EndFilter::decoded(remote) };
        Self { vport: some(vport), vni: some(vni), flow }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(local: &str, remote: &str) -> Tuple {
        Tuple::new(local.parse().unwrap(), remote.parse().unwrap())
    }

    #[test]
    fn flows() {
        let v4 = tuple("198.51.100.1:4000", "198.51.100.3:80");
        let v6 = tuple("[2001:db8::1]:4000", "[2001:db8::3]:80");
        for (text, matches) in [
            ("*-*", [true, true]),
            ("*:*-*:80", [true, true]),
            ("*-*:81", [false, false]),
            ("198.51.100.1-*", [true, false]),
            ("198.51.100.1:4000-198.51.100.3:80", [true, false]),
            ("198.51.100.3:80-198.51.100.1:4000", [false, false]),
            ("::ffff:198.51.100.1-*", [true, false]),
            ("2001:db8::1-*", [false, true]),
            ("[2001:db8::1]-[2001:db8::3]:80", [false, true]),
            ("[2001:db8::1]:*-[*]:80", [false, true]),
        ] {
            let filter: FlowFilter = text.parse().unwrap();
            assert_eq!([filter.matches(&v4), filter.matches(&v6)], matches, "{text}");
            let whole = Filter { vport: Some(1), vni: None, flow: filter };
            let Message::Capture { vport, vni, local, remote, .. } = whole.request(1, 1) else { panic!() };
            assert_eq!(Filter::of(vport, vni, local, remote), whole, "{text}");
        }
    }

    #[test]
    fn bad_flows_say_what_is_wrong() {
        for (text, what) in [
            ("198.51.100.1:80", "LOCAL-REMOTE"),
            ("a-*", "'a' is no address"),
            ("*-*:0", "'0' is no port"),
            ("*-198.51.100.1:http", "'http' is no port"),
            ("[::1]80-*", "'80' after the brackets"),
            ("198.51.100.1-::1", "one is IPv4"),
        ] {
            let error = text.parse::<FlowFilter>().unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
    }

    #[test]
    fn all_of_it_must_match() {
        let tuple = tuple("198.51.100.1:4000", "198.51.100.3:80");
        let filter = Filter { vport: Some(1), vni: Some(100), flow: FlowFilter::default() };
        assert!(filter.matches(1, 100, &tuple));
        assert!(!filter.matches(2, 100, &tuple) && !filter.matches(1, 200, &tuple));
        assert!(Filter::default().matches(7, 7, &tuple));
    }
}
