//! Which device, port and GID to use, and why not the others.
//!
//! The kernel tells what there is in sysfs, libibverbs which of it has a driver here. The choice itself is a function of
//! the two.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

const SYSFS: &str = "/sys/class/infiniband";

/// What the operator asked for; what is absent may be anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The RDMA device, such as `mlx5_0`.
    pub device: Option<String>,
    /// The network interface under it, such as `eth0`.
    pub netdev: Option<String>,
    /// The address that its GID holds.
    pub address: Option<IpAddr>,
    /// The underlay's address, if one is known: preferred, not required.
    pub underlay: Option<IpAddr>,
}

/// One GID of one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The device.
    pub device: String,
    /// Its port.
    pub port: u8,
    /// The GID's place in the port's table.
    pub index: u16,
    /// The GID.
    pub gid: [u8; 16],
    /// RoCE v2, so that routers can carry it.
    pub v2: bool,
    /// InfiniBand, not Ethernet.
    pub infiniband: bool,
    /// The network interface it belongs to.
    pub netdev: String,
    /// Why it cannot be used, if so.
    pub unusable: Option<String>,
}

impl Candidate {
    /// The address in the GID.
    pub fn address(&self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.gid);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }

    /// The kind of packets.
    pub fn transport(&self) -> &'static str {
        match (self.infiniband, self.v2) {
            (true, _) => "InfiniBand",
            (_, true) => "RoCE v2",
            _ => "RoCE v1",
        }
    }

    /// Higher is better.
    fn rank(&self, wanted: &Wanted) -> (bool, bool, u8) {
        let kind = match self.address() {
            IpAddr::V4(_) => 2,
            IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 != 0xfe80 => 1,
            IpAddr::V6(_) => 0,
        };
        (self.v2 || self.infiniband, wanted.underlay == Some(self.address()), kind)
    }

    /// Why this is not what was asked for.
    fn mismatch(&self, wanted: &Wanted) -> Option<String> {
        let other = |what, is: &dyn fmt::Display, asked: &dyn fmt::Display| {
            Some(format!("{what} is {is}, not {asked} as configured"))
        };
        match wanted {
            Wanted { device: Some(device), .. } if *device != self.device => {
                other("the device", &self.device, device)
            }
            Wanted { netdev: Some(netdev), .. } if *netdev != self.netdev => {
                other("the network interface", &self.netdev, netdev)
            }
            Wanted { address: Some(address), .. } if *address != self.address() => {
                other("the address", &self.address(), address)
            }
            _ => None,
        }
    }
}

/// Marks what was not asked for as unusable, and finds the best of the rest.
pub fn choose<'a>(wanted: &Wanted, candidates: &'a mut [Candidate]) -> Option<&'a Candidate> {
    for candidate in candidates.iter_mut().filter(|candidate| candidate.unusable.is_none()) {
        candidate.unusable = candidate.mismatch(wanted);
    }
    let usable = candidates.iter().filter(|candidate| candidate.unusable.is_none());
    // Of equals the first: tables begin with what was configured first.
    usable.rev().max_by_key(|candidate| candidate.rank(wanted))
}

/// Everything there is. `drivers`: the devices that libibverbs can drive, or why there are none.
pub fn list(drivers: &Result<Vec<String>, String>) -> Vec<Candidate> {
    list_at(Path::new(SYSFS), drivers)
}

fn list_at(root: &Path, drivers: &Result<Vec<String>, String>) -> Vec<Candidate> {
    let mut found = Vec::new();
    for device in entries(root) {
        let why = match drivers {
            Err(why) => Some(why.clone()),
            Ok(names) if !names.contains(&device) => {
                Some("libibverbs has no driver for it, or ib_uverbs is not loaded".to_owned())
            }
            Ok(_) => None,
        };
        for port in entries(&root.join(&device).join("ports")) {
            let at = root.join(&device).join("ports").join(&port);
            let Ok(port) = port.parse() else { continue };
            list_port(&at, &device, port, why.as_ref(), &mut found);
        }
    }
    found
}

fn list_port(at: &Path, device: &str, port: u8, why: Option<&String>, found: &mut Vec<Candidate>) {
    let state = text(&at.join("state"));
    let down = (!state.contains("ACTIVE")).then(|| format!("the port is {state}"));
    let infiniband = text(&at.join("link_layer")) == "InfiniBand";
    let mut indexes: Vec<u16> = entries(&at.join("gids")).iter().filter_map(|n| n.parse().ok()).collect();
    indexes.sort_unstable();
    let before = found.len();
    for index in indexes {
        let name = index.to_string();
        let gid = match text(&at.join("gids").join(&name)).parse::<Ipv6Addr>() {
            Ok(gid) if !gid.is_unspecified() => gid.octets(),
            _ => continue,
        };
        let kind = text(&at.join("gid_attrs/types").join(&name));
        let netdev = text(&at.join("gid_attrs/ndevs").join(&name));
        let unusable = why.cloned().or_else(|| down.clone());
        let unusable = unusable.or_else(|| (index > 255).then(|| "its index is above 255".to_owned()));
        let v2 = kind == "RoCE v2";
        found.push(Candidate {
            device: device.to_owned(),
            port,
            index,
            gid,
            v2,
            infiniband,
            netdev,
            unusable,
        });
    }
    if found.len() == before {
        let (device, netdev, v2) = (device.to_owned(), String::new(), false);
        let unusable = Some("the port has no GID: its network interface needs an address".to_owned());
        found.push(Candidate { device, port, index: 0, gid: [0; 16], v2, infiniband, netdev, unusable });
    }
}

fn entries(at: &Path) -> Vec<String> {
    let read = fs::read_dir(at).into_iter().flatten().flatten();
    let mut names: Vec<String> = read.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn text(at: &Path) -> String {
    fs::read_to_string(at).map(|text| text.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(device: &str, index: u16, address: &str, v2: bool) -> Candidate {
        let gid = match address.parse::<IpAddr>().unwrap() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let netdev = format!("net-{device}");
        let device = device.to_owned();
        Candidate { device, port: 1, index, gid, v2, infiniband: false, netdev, unusable: None }
    }

    fn all() -> Vec<Candidate> {
        vec![
            candidate("a", 0, "fe80::1", false),
            candidate("a", 1, "fe80::1", true),
            candidate("a", 2, "192.0.2.1", false),
            candidate("a", 3, "192.0.2.1", true),
            candidate("b", 0, "2001:db8::1", true),
            candidate("b", 1, "198.51.100.1", true),
        ]
    }

    fn chosen(wanted: &Wanted) -> Option<(String, u16)> {
        choose(wanted, &mut all()).map(|candidate| (candidate.device.clone(), candidate.index))
    }

    #[test]
    fn the_best_gid_is_routable_and_the_underlays() {
        let is = |device: &str, index| Some((device.to_owned(), index));
        assert_eq!(chosen(&Wanted::default()), is("a", 3));
        let underlay = |text: &str| Wanted { underlay: text.parse().ok(), ..Wanted::default() };
        assert_eq!(chosen(&underlay("198.51.100.1")), is("b", 1));
        assert_eq!(chosen(&underlay("2001:db8::1")), is("b", 0));
        assert_eq!(chosen(&underlay("203.0.113.1")), is("a", 3), "preferred, not required");
        assert_eq!(chosen(&Wanted { device: Some("b".into()), ..Wanted::default() }), is("b", 1));
        assert_eq!(chosen(&Wanted { netdev: Some("net-b".into()), ..Wanted::default() }), is("b", 1));
        let address = |text: &str| Wanted { address: text.parse().ok(), ..Wanted::default() };
        assert_eq!(chosen(&address("fe80::1")), is("a", 1));
        assert_eq!(chosen(&address("203.0.113.1")), None, "required");
    }

    #[test]
    fn what_is_not_chosen_says_why() {
        let mut candidates = all();
        candidates[3].unusable = Some("the port is 1: DOWN".to_owned());
        let wanted = Wanted { device: Some("a".into()), ..Wanted::default() };
        assert_eq!(choose(&wanted, &mut candidates).unwrap().index, 1, "v1 would be worse");
        assert_eq!(candidates[4].unusable.as_deref(), Some("the device is b, not a as configured"));
        assert_eq!(candidates[3].unusable.as_deref(), Some("the port is 1: DOWN"));
    }

    #[test]
    fn sysfs_is_read_as_it_is() {
        let root = std::env::temp_dir().join(format!("vsocket-select-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("rxe0/ports/1/state", "4: ACTIVE\n");
        write("rxe0/ports/1/link_layer", "Ethernet\n");
        write("rxe0/ports/1/gids/0", "fe80:0000:0000:0000:5054:00ff:fe12:3456\n");
        write("rxe0/ports/1/gids/1", "0000:0000:0000:0000:0000:ffff:0a09:0001\n");
        write("rxe0/ports/1/gids/2", "0000:0000:0000:0000:0000:0000:0000:0000\n");
        write("rxe0/ports/1/gid_attrs/types/1", "RoCE v2\n");
        write("rxe0/ports/1/gid_attrs/ndevs/1", "eth0\n");
        write("down0/ports/1/state", "1: DOWN\n");
        write("down0/ports/1/gids/0", "fe80::2\n");
        write("bare0/ports/1/state", "4: ACTIVE\n");
        let drivers = Ok(vec!["rxe0".to_owned(), "down0".to_owned()]);
        let found = list_at(&root, &drivers);
        let without = list_at(&root, &Err("there is no libibverbs device".to_owned()));
        fs::remove_dir_all(&root).unwrap();
        let brief: Vec<_> = found.iter().map(|c| (&*c.device, c.index, c.unusable.as_deref())).collect();
        assert_eq!(brief[1], ("down0", 0, Some("the port is 1: DOWN")));
        assert_eq!(brief[0].0, "bare0");
        assert!(brief[0].2.unwrap().contains("needs an address"));
        assert_eq!((brief[2], brief[3]), (("rxe0", 0, None), ("rxe0", 1, None)));
        assert_eq!((found[3].netdev.as_str(), found[3].transport()), ("eth0", "RoCE v2"));
        assert_eq!(found[3].address(), "10.9.0.1".parse::<IpAddr>().unwrap());
        assert!(without.iter().all(|candidate| candidate.unusable.is_some()));
    }
}
