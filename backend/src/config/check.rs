//! From what was written to what it means.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use toml::Spanned;

use super::raw::{self, Fault};
use super::{
    Backends, Config, DEFAULT_MAX_CONNECTIONS, DEFAULT_MAX_STREAMS, DEFAULT_PORT, DEFAULT_RING_BYTES, Device,
    Fabric, MAX_RING_BYTES, MIN_RING_BYTES, Mac, Machine, Peer, Tls, Vport,
};
use crate::directory::{self, Directory};
use crate::peer::message::HostName;

/// Each stream is a descriptor, and up to 64 KiB that wait.
const MAX_STREAMS: i64 = 1 << 16;

/// The largest CID or port: the one above stands for any.
const MAX_VSOCK: u32 = u32::MAX - 1;

/// Connections of one vport are numbered in a table of this size at most.
const MAX_CONNECTIONS: i64 = 1 << 20;

type Checked<T> = Result<T, Fault>;

/// Checks the whole of it.
pub fn check(raw: raw::Config) -> Checked<Config> {
    let host = host_name("host", &raw.host)?;
    let control = path("control", &raw.control)?;
    let backends = backends(&host, &raw)?;
    let vports = vports(&raw.vport, &control)?;
    let directory = entries(&raw.directory, backends.as_ref(), &vports)?;
    Ok(Config { host, control, backends, vports, directory })
}

fn fault<T, V>(key: &str, value: &Spanned<V>, what: impl Into<String>) -> Checked<T> {
    Err(Fault { at: value.span(), key: key.to_owned(), what: what.into() })
}

/// Remembers where each value was first seen, so that its second use can be refused by name.
struct Unique<T>(HashSet<T>);

impl<T: Eq + Hash> Unique<T> {
    fn new() -> Self {
        Self(HashSet::new())
    }

    fn take<V>(&mut self, key: &str, at: &Spanned<V>, value: T, what: impl Into<String>) -> Checked<()> {
        if self.0.insert(value) { Ok(()) } else { fault(key, at, what) }
    }
}

fn host_name(key: &str, name: &Spanned<String>) -> Checked<HostName> {
    match HostName::new(name.as_ref()) {
        Some(name) => Ok(name),
        None => fault(key, name, "a host name is 1 to 64 letters, digits, '-', '.' or '_'"),
    }
}

fn path(key: &str, path: &Spanned<PathBuf>) -> Checked<PathBuf> {
    if path.as_ref().as_os_str().is_empty() {
        return fault(key, path, "empty path");
    }
    Ok(path.as_ref().clone())
}

/// A UNIX socket's path has room for 107 bytes.
fn socket_path(key: &str, value: &Spanned<PathBuf>) -> Checked<PathBuf> {
    let checked = path(key, value)?;
    match checked.as_os_str().len() {
        ..=107 => Ok(checked),
        long => fault(key, value, format!("a UNIX socket's path has at most 107 bytes, this has {long}")),
    }
}

fn listen(key: &str, address: &Spanned<SocketAddr>) -> Checked<SocketAddr> {
    let at = *address.as_ref();
    if at.port() == 0 {
        return fault(key, address, "port 0: peers must know where to dial");
    }
    if at.ip().is_multicast() {
        return fault(key, address, "a multicast address cannot be listened on");
    }
    Ok(at)
}

/// An address that other backends are reached at.
fn reachable(key: &str, ip: &Spanned<IpAddr>) -> Checked<IpAddr> {
    if ip.as_ref().is_unspecified() || ip.as_ref().is_multicast() {
        return fault(key, ip, "not the address of one host");
    }
    Ok(*ip.as_ref())
}

fn backends(host: &HostName, raw: &raw::Config) -> Checked<Option<Backends>> {
    let Some(first) = raw.peer.first() else { return no_backends(raw) };
    let Some(tls) = &raw.tls else { return fault("peer", first, "needs [tls] with ca, cert and key") };
    let Some(own) = &raw.peers else { return fault("peer", first, "needs [peers] with listen") };
    let Some(fabric) = &raw.fabric else {
        return fault("peer", first, "needs [fabric] with listen");
    };
    let control = listen("peers.listen", &own.as_ref().listen)?;
    let fabric = self::fabric(fabric, control)?;
    let (mut hosts, mut vteps) = (Unique::new(), Unique::new());
    let peers = raw.peer.iter().map(|peer| self::peer(host, peer.as_ref(), &mut hosts, &mut vteps));
    let peers = peers.collect::<Checked<_>>()?;
    Ok(Some(Backends { tls: self::tls(tls.as_ref())?, listen: control, fabric, peers }))
}

/// Without peers the rest is optional, but what is there must still be right.
fn no_backends(raw: &raw::Config) -> Checked<Option<Backends>> {
    let tls = raw.tls.as_ref().map(|tls| self::tls(tls.as_ref())).transpose()?;
    let control =
        raw.peers.as_ref().map(|peers| listen("peers.listen", &peers.as_ref().listen)).transpose()?;
    let Some(fabric) = &raw.fabric else { return Ok(None) };
    let own = control.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)));
    let fabric = self::fabric(fabric, own)?;
    Ok(match (tls, control) {
        (Some(tls), Some(listen)) => Some(Backends { tls, listen, fabric, peers: Vec::new() }),
        _ => None,
    })
}

fn tls(raw: &raw::Tls) -> Checked<Tls> {
    Ok(Tls {
        ca: path("tls.ca", &raw.ca)?,
        cert: path("tls.cert", &raw.cert)?,
        key: path("tls.key", &raw.key)?,
    })
}

fn fabric(raw: &Spanned<raw::Fabric>, control: SocketAddr) -> Checked<Fabric> {
    let table = raw.as_ref();
    let listen = table.listen.as_ref().map(|address| fabric_listen(address, control)).transpose()?;
    let device = Device {
        name: table.device.as_ref().map(|name| word("fabric.device", name)).transpose()?,
        netdev: table.netdev.as_ref().map(|name| word("fabric.netdev", name)).transpose()?,
        address: table.address.as_ref().map(|ip| reachable("fabric.address", ip)).transpose()?,
        underlay: listen.map(|listen| listen.ip()),
    };
    let needs_listen =
        || fault("fabric", raw, "needs listen: without an RDMA device peers dial this address");
    let kind = table.kind.as_ref().map_or("auto", |kind| kind.as_ref().as_str());
    match (kind, listen, &table.kind) {
        ("auto", Some(listen), _) => Ok(Fabric::Auto { listen, device }),
        ("soft", Some(listen), Some(at)) => {
            let chooses = table.device.is_some() || table.netdev.is_some() || table.address.is_some();
            if chooses {
                return fault("fabric.kind", at, "\"soft\" has no device, netdev or address to choose");
            }
            Ok(Fabric::Soft { listen })
        }
        ("verbs", _, Some(at)) if !cfg!(feature = "verbs") => {
            fault("fabric.kind", at, "this vsocketd is built without verbs; use \"soft\" or \"auto\"")
        }
        ("verbs", ..) => Ok(Fabric::Verbs(device)),
        ("auto" | "soft", ..) => needs_listen(),
        (other, _, Some(at)) => {
            let known = "\"auto\", \"verbs\", \"soft\"";
            fault("fabric.kind", at, format!("unknown fabric {other:?}; known: {known}"))
        }
        (_, _, None) => needs_listen(),
    }
}

fn fabric_listen(value: &Spanned<SocketAddr>, control: SocketAddr) -> Checked<SocketAddr> {
    let address = listen("fabric.listen", value)?;
    if address.ip().is_unspecified() {
        return fault("fabric.listen", value, "must be an address that peers can dial, not a wildcard");
    }
    if address == control {
        return fault("fabric.listen", value, format!("{address} is peers.listen already"));
    }
    Ok(address)
}

/// The name of a device.
fn word(key: &str, value: &Spanned<String>) -> Checked<String> {
    let name = value.as_ref();
    if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == '/') {
        return fault(key, value, format!("{name:?} is no device's name"));
    }
    Ok(name.clone())
}

fn peer(
    own: &HostName,
    raw: &raw::Peer,
    hosts: &mut Unique<HostName>,
    vteps: &mut Unique<IpAddr>,
) -> Checked<Peer> {
    let host = host_name("peer.host", &raw.host)?;
    if host == *own {
        return fault("peer.host", &raw.host, format!("{host} is this host itself"));
    }
    hosts.take("peer.host", &raw.host, host.clone(), format!("peer {host} is there twice"))?;
    let vtep = reachable("peer.vtep", &raw.vtep)?;
    vteps.take("peer.vtep", &raw.vtep, vtep, format!("{vtep} is another peer's vtep"))?;
    let control = listen("peer.control", &raw.control)?;
    if control.ip().is_unspecified() {
        return fault("peer.control", &raw.control, "not the address of one host");
    }
    Ok(Peer { host, vtep, control })
}

fn vni(key: &str, value: &Spanned<i64>) -> Checked<u32> {
    match u32::try_from(*value.as_ref()) {
        Ok(vni @ 1..0x100_0000) => Ok(vni),
        _ => fault(key, value, format!("{} is not a VNI (1 to 16777215)", value.as_ref())),
    }
}

fn mac(key: &str, value: &Spanned<String>) -> Checked<Mac> {
    match Mac::parse(value.as_ref()) {
        None => fault(key, value, "a MAC is six bytes in hex, such as 02:00:00:64:00:01"),
        Some(mac) if !mac.is_unicast() => fault(key, value, format!("{mac} is not a unicast MAC")),
        Some(mac) => Ok(mac),
    }
}

fn inner(key: &str, value: &Spanned<IpAddr>) -> Checked<IpAddr> {
    let ip = *value.as_ref();
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
        return fault(key, value, format!("{ip} is no address of a guest"));
    }
    Ok(ip)
}

fn vports(raw: &[raw::Vport], control: &PathBuf) -> Checked<Vec<Vport>> {
    let (mut names, mut sockets) = (Unique::new(), Unique::new());
    let (mut macs, mut addresses, mut cids) = (Unique::new(), Unique::new(), Unique::new());
    let mut vports = Vec::with_capacity(raw.len());
    for one in raw {
        let vport = vport(one)?;
        names.take(
            "vport.name",
            &one.name,
            vport.name.clone(),
            format!("vport {} is there twice", vport.name),
        )?;
        let shown = vport.socket.display();
        sockets.take(
            "vport.socket",
            &one.socket,
            vport.socket.clone(),
            format!("{shown} is another vport's"),
        )?;
        if vport.socket == *control {
            return fault("vport.socket", &one.socket, format!("{shown} is the control socket"));
        }
        if let (Some(machine), Some(cid), Some(front)) = (&vport.machine, &one.cid, &one.front) {
            cids.take("vport.cid", cid, machine.cid, format!("{} is another vport's CID", machine.cid))?;
            let shown = machine.front.display();
            if machine.front == *control {
                return fault("vport.front", front, format!("{shown} is the control socket"));
            }
            sockets.take(
                "vport.front",
                front,
                machine.front.clone(),
                format!("{shown} is a vport's already"),
            )?;
        }
        let (vni, mac) = (vport.vni, vport.mac);
        macs.take("vport.mac", &one.mac, (vni, mac.0), format!("{mac} is another vport's in VNI {vni}"))?;
        for address in one.addresses.as_ref() {
            let ip = *address.as_ref();
            let what = format!("{ip} is there twice in VNI {vni}");
            addresses.take("vport.addresses", address, (vni, ip), what)?;
        }
        vports.push(vport);
    }
    Ok(vports)
}

fn vport(raw: &raw::Vport) -> Checked<Vport> {
    let name = raw.name.as_ref();
    if HostName::new(name).is_none() {
        return fault("vport.name", &raw.name, "a vport's name is 1 to 64 letters, digits, '-', '.' or '_'");
    }
    let addresses = raw.addresses.as_ref().iter().map(|one| inner("vport.addresses", one));
    let addresses = addresses.collect::<Checked<Vec<_>>>()?;
    if addresses.is_empty() {
        return fault("vport.addresses", &raw.addresses, "a vport needs at least one address");
    }
    Ok(Vport {
        name: name.clone(),
        vni: vni("vport.vni", &raw.vni)?,
        mac: mac("vport.mac", &raw.mac)?,
        addresses,
        socket: socket_path("vport.socket", &raw.socket)?,
        max_connections: max_connections(raw.max_connections.as_ref())?,
        ring_bytes: ring_bytes(raw.ring_bytes.as_ref())?,
        direct: direct(raw)?,
        machine: machine(raw)?,
    })
}

/// A vport with `cid` and `front` is a virtual machine's.
fn machine(raw: &raw::Vport) -> Checked<Option<Machine>> {
    let only = "only a virtual machine's vport has it: one with cid and front";
    match (&raw.cid, &raw.front, &raw.port, &raw.max_streams) {
        (None, None, None, None) => Ok(None),
        (None, None, Some(port), _) => fault("vport.port", port, only),
        (None, None, _, Some(streams)) => fault("vport.max_streams", streams, only),
        (Some(cid), None, ..) => fault("vport.cid", cid, "needs front, the socket that QEMU connects to"),
        (None, Some(front), ..) => fault("vport.front", front, "needs cid, the guest's vsock CID"),
        (Some(cid), Some(_), ..) if !cfg!(feature = "vm") => {
            fault("vport.cid", cid, "this vsocketd is built without vm: it serves containers only")
        }
        (Some(at), Some(front), port, streams) => Ok(Some(Machine {
            cid: cid(at)?,
            front: socket_path("vport.front", front)?,
            port: port.as_ref().map_or(Ok(DEFAULT_PORT), self::port)?,
            max_streams: streams.as_ref().map_or(Ok(DEFAULT_MAX_STREAMS), max_streams)?,
        })),
    }
}

fn cid(value: &Spanned<i64>) -> Checked<u32> {
    match u32::try_from(*value.as_ref()) {
        Ok(cid @ 3..=MAX_VSOCK) => Ok(cid),
        _ => fault("vport.cid", value, format!("{} is no guest's CID (3 to 4294967294)", value.as_ref())),
    }
}

fn port(value: &Spanned<i64>) -> Checked<u32> {
    match u32::try_from(*value.as_ref()) {
        Ok(port @ 1..=MAX_VSOCK) => Ok(port),
        _ => fault("vport.port", value, format!("{} is no vsock port (1 to 4294967294)", value.as_ref())),
    }
}

fn max_streams(value: &Spanned<i64>) -> Checked<u32> {
    match *value.as_ref() {
        n @ 1..=MAX_STREAMS => Ok(n as u32),
        n => fault("vport.max_streams", value, format!("{n} is not between 1 and {MAX_STREAMS}")),
    }
}

fn max_connections(value: Option<&Spanned<i64>>) -> Checked<u32> {
    let Some(value) = value else { return Ok(DEFAULT_MAX_CONNECTIONS) };
    match *value.as_ref() {
        n @ 1..=MAX_CONNECTIONS => Ok(n as u32),
        n => fault("vport.max_connections", value, format!("{n} is not between 1 and {MAX_CONNECTIONS}")),
    }
}

fn ring_bytes(value: Option<&Spanned<i64>>) -> Checked<u32> {
    let Some(value) = value else { return Ok(DEFAULT_RING_BYTES) };
    match u32::try_from(*value.as_ref()) {
        Ok(n @ MIN_RING_BYTES..=MAX_RING_BYTES) if n.is_power_of_two() => Ok(n),
        _ => {
            let what = format!(
                "{} is not a power of two between {MIN_RING_BYTES} and {MAX_RING_BYTES}",
                value.as_ref()
            );
            fault("vport.ring_bytes", value, what)
        }
    }
}

fn direct(raw: &raw::Vport) -> Checked<bool> {
    match &raw.direct {
        Some(value) if *value.as_ref() && raw.cid.is_some() => {
            fault("vport.direct", value, "a virtual machine's rings lie in its own memory: it shares none")
        }
        value => Ok(value.as_ref().is_none_or(|value| *value.as_ref())),
    }
}

fn entries(raw: &[raw::Entry], backends: Option<&Backends>, vports: &[Vport]) -> Checked<Directory> {
    let peers: HashMap<IpAddr, &HostName> =
        backends.iter().flat_map(|b| &b.peers).map(|peer| (peer.vtep, &peer.host)).collect();
    let here: HashSet<(u32, IpAddr)> =
        vports.iter().flat_map(|v| v.addresses.iter().map(|&ip| (v.vni, ip))).collect();
    let mut directory = Directory::default();
    for one in raw {
        let vni = vni("directory.vni", &one.vni)?;
        let address = inner("directory.address", &one.address)?;
        let mac = mac("directory.mac", &one.mac)?;
        let vtep = reachable("directory.vtep", &one.vtep)?;
        let Some(&host) = peers.get(&vtep) else {
            return fault("directory.vtep", &one.vtep, format!("{vtep} is no [[peer]]'s vtep"));
        };
        if here.contains(&(vni, address)) {
            let what = format!("{address} of VNI {vni} belongs to a vport of this host");
            return fault("directory.address", &one.address, what);
        }
        if !directory.insert(vni, address, directory::Place { host: host.clone(), vtep, mac }) {
            return fault(
                "directory.address",
                &one.address,
                format!("{address} is there twice in VNI {vni}"),
            );
        }
    }
    Ok(directory)
}
