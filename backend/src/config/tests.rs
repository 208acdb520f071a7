use super::*;

const GOOD: &str = r#"host = "h1"
control = "/run/h1.ctl"
[tls]
ca = "ca.pem"
cert = "h1.pem"
key = "h1.key"
[peers]
listen = "192.0.2.1:4791"
[fabric]
kind = "soft"
listen = "192.0.2.1:4790"
[[peer]]
host = "h2"
vtep = "192.0.2.2"
control = "192.0.2.2:4791"
[[vport]]
name = "a"
vni = 100
mac = "02:00:00:64:00:01"
addresses = ["198.51.100.1", "2001:db8:100::1"]
socket = "/run/a.vport"
[[vport]]
name = "e"
vni = 200
mac = "02:00:00:64:00:01"
addresses = ["198.51.100.1"]
socket = "/run/e.vport"
ring_bytes = 65536
max_connections = 7
[[directory]]
vni = 100
address = "198.51.100.3"
mac = "02:00:00:64:00:03"
vtep = "192.0.2.2"
"#;

fn parse(text: &str) -> Result<Config, Error> {
    Config::parse(Path::new("h1.toml"), text)
}

#[test]
fn a_good_file_means_what_it_says() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.host.as_str(), "h1");
    let backends = config.backends.as_ref().unwrap();
    assert_eq!(backends.fabric, Fabric::Soft { listen: "192.0.2.1:4790".parse().unwrap() });
    assert_eq!(
        config.peer(&HostName::new("h2").unwrap()).unwrap().control,
        "192.0.2.2:4791".parse().unwrap()
    );
    assert_eq!((config.vports[0].ring_bytes, config.vports[0].max_connections), (256 << 10, 1024));
    assert_eq!((config.vports[1].ring_bytes, config.vports[1].max_connections), (65536, 7));
    let place = config.directory.find(100, "198.51.100.3".parse().unwrap()).unwrap();
    assert_eq!((place.host.as_str(), place.mac.0[5]), ("h2", 3));
}

#[test]
fn the_fabric_may_be_chosen_by_device() {
    let fabric = |lines: &str| {
        let table = "kind = \"soft\"\nlisten = \"192.0.2.1:4790\"";
        parse(&GOOD.replacen(table, lines, 1)).map(|config| config.backends.unwrap().fabric)
    };
    let listen = "192.0.2.1:4790".parse().unwrap();
    let device = Device { underlay: "192.0.2.1".parse().ok(), ..Device::default() };
    let auto = Fabric::Auto { listen, device: device.clone() };
    assert_eq!(fabric("listen = \"192.0.2.1:4790\"").unwrap(), auto);
    assert_eq!(fabric("kind = \"auto\"\nlisten = \"192.0.2.1:4790\"").unwrap(), auto);
    let verbs = fabric("kind = \"verbs\"\ndevice = \"rxe0\"\nnetdev = \"eth0\"\naddress = \"192.0.2.7\"");
    if cfg!(feature = "verbs") {
        let (name, netdev) = (Some("rxe0".to_owned()), Some("eth0".to_owned()));
        let wanted = Device { name, netdev, address: "192.0.2.7".parse().ok(), underlay: None };
        assert_eq!(verbs.unwrap(), Fabric::Verbs(wanted));
    } else {
        assert!(verbs.unwrap_err().to_string().contains("built without verbs"));
    }
}

#[test]
fn a_vport_may_be_a_machines() {
    let with = |lines: &str| {
        let text = GOOD.replacen("max_connections = 7", lines, 1);
        parse(&text).map(|config| config.vports[1].machine.clone()).map_err(|error| error.to_string())
    };
    let machine =
        Machine { cid: 3, front: "/run/e.qemu".into(), port: DEFAULT_PORT, max_streams: DEFAULT_MAX_STREAMS };
    assert_eq!(with(""), Ok(None));
    assert_eq!(with("cid = 3\nfront = \"/run/e.qemu\""), Ok(Some(machine.clone())));
    let chosen = Machine { port: 9, max_streams: 2, ..machine };
    assert_eq!(with("cid = 3\nfront = \"/run/e.qemu\"\nport = 9\nmax_streams = 2"), Ok(Some(chosen)));
    for (lines, message) in [
        ("cid = 3", "h1.toml:29: vport.cid: needs front"),
        ("front = \"f\"", "h1.toml:29: vport.front: needs cid"),
        ("port = 9", "h1.toml:29: vport.port: only a virtual"),
        ("max_streams = 9", "h1.toml:29: vport.max_streams: only a virtual"),
        ("cid = 2\nfront = \"f\"", "h1.toml:29: vport.cid: 2 is no guest's"),
        ("cid = 3\nfront = \"/run/a.vport\"", "h1.toml:30: vport.front: /run/a.vport is a vport's"),
        ("cid = 3\nfront = \"/run/h1.ctl\"", "is the control socket"),
        ("cid = 3\nfront = \"f\"\nport = 0", "h1.toml:31: vport.port: 0 is no"),
        ("cid = 3\nfront = \"f\"\nmax_streams = 0", "h1.toml:31: vport.max_streams: 0 is not"),
    ] {
        let error = with(lines).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn a_vport_may_share_no_memory() {
    let with = |lines: &str| {
        let text = GOOD.replacen("max_connections = 7", lines, 1);
        parse(&text).map(|config| config.vports[1].direct).map_err(|error| error.to_string())
    };
    assert_eq!((with(""), with("direct = true"), with("direct = false")), (Ok(true), Ok(true), Ok(false)));
    let machine = "cid = 3\nfront = \"/run/e.qemu\"";
    let with_machine = |line: &str| with(&format!("{machine}\n{line}"));
    if cfg!(feature = "vm") {
        assert_eq!((with_machine(""), with_machine("direct = false")), (Ok(true), Ok(false)));
        let error = with_machine("direct = true").unwrap_err();
        assert!(error.contains("h1.toml:31: vport.direct: a virtual machine's"), "{error}");
    }
    let error = with("direct = 1").unwrap_err();
    assert!(error.contains("h1.toml:29: vport.direct: invalid type"), "{error}");
}

#[test]
fn a_host_may_stand_alone() {
    let config = parse("host = \"h1\"\ncontrol = \"c\"\n").unwrap();
    assert!(config.backends.is_none() && config.vports.is_empty() && config.directory.is_empty());
}

/// (what is replaced, by what, parts of the message)
const BAD: &[(&str, &str, &[&str])] = &[
    ("host = \"h1\"", "host = \"\"", &["h1.toml:1: host: ", "1 to 64 letters"]),
    ("host = \"h1\"", "host = \"a/b\"", &["h1.toml:1: host: "]),
    ("host = \"h1\"", "host = h1", &["h1.toml:1: host: "]),
    ("host = \"h1\"", "host = 1", &["h1.toml:1: host: ", "invalid type: integer", "expected a string"]),
    ("host = \"h1\"", "hots = \"h1\"", &["h1.toml:1: hots: ", "unknown field `hots`", "`host`"]),
    ("host = \"h1\"\n", "", &["missing field `host`"]),
    ("control = \"/run/h1.ctl\"", "control = \"\"", &["h1.toml:2: control: empty path"]),
    ("[tls]\nca = \"ca.pem\"\ncert = \"h1.pem\"\nkey = \"h1.key\"\n", "", &["h1.toml:8: peer: needs [tls]"]),
    ("key = \"h1.key\"\n", "", &["tls", "missing field `key`"]),
    ("ca = \"ca.pem\"", "ca = \"\"", &["h1.toml:4: tls.ca: empty path"]),
    ("[peers]\nlisten = \"192.0.2.1:4791\"\n", "", &["peer: needs [peers] with listen"]),
    ("192.0.2.1:4791", "192.0.2.1", &["h1.toml:8: peers.listen: ", "socket address"]),
    ("192.0.2.1:4791", "192.0.2.1:0", &["h1.toml:8: peers.listen: port 0"]),
    ("192.0.2.1:4791", "224.0.0.1:4791", &["h1.toml:8: peers.listen: a multicast"]),
    ("kind = \"soft\"", "kind = \"smoke\"", &["h1.toml:10: fabric.kind: unknown fabric \"smoke\""]),
    ("kind = \"soft\"", "kind = \"soft\"\ndevice = \"rxe0\"", &["fabric.kind: \"soft\" has no device"]),
    ("kind = \"soft\"", "netdev = \"\"", &["h1.toml:10: fabric.netdev: \"\" is no device's name"]),
    ("kind = \"soft\"", "address = \"0.0.0.0\"", &["h1.toml:10: fabric.address: not the address"]),
    ("kind = \"soft\"\nlisten = \"192.0.2.1:4790\"", "", &["fabric: needs listen"]),
    ("192.0.2.1:4790", "0.0.0.0:4790", &["h1.toml:11: fabric.listen: ", "wildcard"]),
    ("192.0.2.1:4790", "192.0.2.1:4791", &["h1.toml:11: fabric.listen: 192.0.2.1:4791 is peers.listen"]),
    ("[fabric]\nkind = \"soft\"\nlisten = \"192.0.2.1:4790\"\n", "", &["peer: needs [fabric]"]),
    ("host = \"h2\"", "host = \"h1\"", &["h1.toml:13: peer.host: h1 is this host itself"]),
    ("vtep = \"192.0.2.2\"", "vtep = \"h2\"", &["h1.toml:14: peer.vtep: ", "IP address"]),
    ("vtep = \"192.0.2.2\"", "vtep = \"0.0.0.0\"", &["h1.toml:14: peer.vtep: not the address of one host"]),
    ("192.0.2.2:4791", "0.0.0.0:4791", &["h1.toml:15: peer.control: not the address"]),
    ("name = \"a\"", "name = \"\"", &["h1.toml:17: vport.name: "]),
    ("name = \"e\"", "name = \"a\"", &["h1.toml:23: vport.name: vport a is there twice"]),
    ("vni = 100", "vni = 0", &["h1.toml:18: vport.vni: 0 is not a VNI"]),
    ("vni = 100", "vni = 16777216", &["h1.toml:18: vport.vni: 16777216 is not a VNI"]),
    ("vni = 100", "vni = -1", &["h1.toml:18: vport.vni: -1 is not a VNI"]),
    ("vni = 100", "vni = \"x\"", &["h1.toml:18: vport.vni: ", "invalid type: string"]),
    ("02:00:00:64:00:01", "03:00:00:64:00:01", &["h1.toml:19: vport.mac: ", "not a unicast MAC"]),
    ("02:00:00:64:00:01", "00:00:00:00:00:00", &["h1.toml:19: vport.mac: ", "not a unicast MAC"]),
    ("02:00:00:64:00:01", "2:0:0:64:0:1", &["h1.toml:19: vport.mac: a MAC is six bytes"]),
    ("vni = 200", "vni = 100", &["h1.toml:25: vport.mac: ", "another vport's in VNI 100"]),
    (
        "vni = 200\nmac = \"02:00:00:64:00:01\"",
        "vni = 100\nmac = \"02:00:00:64:00:05\"",
        &["h1.toml:26: vport.addresses: 198.51.100.1 is there twice in VNI 100"],
    ),
    (
        "\"2001:db8:100::1\"",
        "\"198.51.100.1\"",
        &["h1.toml:20: vport.addresses: 198.51.100.1 is there twice"],
    ),
    ("\"2001:db8:100::1\"", "\"::\"", &["h1.toml:20: vport.addresses: :: is no address of a guest"]),
    ("\"2001:db8:100::1\"", "\"guest\"", &["h1.toml:20: vport.addresses: "]),
    ("[\"198.51.100.1\", \"2001:db8:100::1\"]", "[]", &["h1.toml:20: vport.addresses: ", "at least one"]),
    ("/run/e.vport", "/run/a.vport", &["h1.toml:27: vport.socket: /run/a.vport is another vport's"]),
    ("/run/e.vport", "/run/h1.ctl", &["h1.toml:27: vport.socket: /run/h1.ctl is the control socket"]),
    (
        "ring_bytes = 65536",
        "ring_bytes = 65537",
        &["h1.toml:28: vport.ring_bytes: 65537 is not a power of two"],
    ),
    ("ring_bytes = 65536", "ring_bytes = 4096", &["h1.toml:28: vport.ring_bytes: 4096 is not"]),
    ("max_connections = 7", "max_connections = 0", &["h1.toml:29: vport.max_connections: 0 is not between"]),
    ("max_connections = 7", "max_conections = 7", &["h1.toml:29: vport.max_conections: unknown field"]),
    ("address = \"198.51.100.3\"", "address = \"127.0.0.1\"", &["h1.toml:32: directory.address: 127.0.0.1"]),
    (
        "address = \"198.51.100.3\"",
        "address = \"198.51.100.1\"",
        &["h1.toml:32: directory.address: ", "this host"],
    ),
    (
        "00:64:00:03\"\nvtep = \"192.0.2.2\"",
        "00:64:00:03\"\nvtep = \"192.0.2.9\"",
        &["h1.toml:34: directory.vtep: 192.0.2.9 is no [[peer]]'s vtep"],
    ),
];

#[test]
fn bad_files_say_where_and_why() {
    for (good, bad, parts) in BAD {
        assert!(GOOD.contains(good), "the table is stale: {good}");
        let message = match parse(&GOOD.replacen(good, bad, 1)) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{bad} was taken"),
        };
        for part in *parts {
            assert!(message.contains(part), "{bad}: expected {part:?} in {message:?}");
        }
    }
}

#[test]
fn entries_may_not_be_there_twice() {
    for (table, what) in
        [("[[directory]]", "198.51.100.3 is there twice in VNI 100"), ("[[peer]]", "peer h2 is")]
    {
        let from = GOOD.find(table).unwrap();
        let to = GOOD[from + 2..].find("\n[").map_or(GOOD.len(), |n| from + 2 + n + 1);
        let twice = format!("{}{}{}", &GOOD[..to], &GOOD[from..to], &GOOD[to..]);
        let message = parse(&twice).unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    }
}

#[test]
fn socket_paths_must_fit() {
    let long = format!("/run/{}", "x".repeat(120));
    let message = parse(&GOOD.replace("/run/e.vport", &long)).unwrap_err().to_string();
    assert!(
        message.contains("h1.toml:27: vport.socket: ") && message.contains("at most 107 bytes"),
        "{message}"
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Path::new("/nonexistent/h1.toml")).unwrap_err();
    assert_eq!(error.to_string(), "cannot read /nonexistent/h1.toml");
}
