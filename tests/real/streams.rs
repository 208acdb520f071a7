//! iperf3's modes, sockperf's, scp, rsync.

use serde_json::Value;
use std::fs;

use crate::common::{Program, wait_until};
use crate::kit::{self, PATHS, SOON, Site, number, on_lane, same};

const IPERF: u16 = 5201;
const SOCKPERF: u16 = 6401;
const SSH: u16 = 2222;
const RSYNC: u16 = 8873;

// ---------------------------------------------------------------- iperf3, sockperf

#[test]
fn iperf3() {
    if !kit::have(&["iperf3:iperf3"]) {
        return;
    }
    for path in PATHS {
        let site = Site::new("iperf3", path);
        let ip = site.ip();
        for (options, connections) in
            [(&["-R"][..], 1), (&["--bidir"], 2), (&["-P", "8"], 8), (&["-Z"], 1), (&["-l", "1000"], 1)]
        {
            site.compare(&options.join(" "), "Mbit/s", on_lane(connections, 100 << 20), |verb| {
                let server = site.serve(verb, IPERF, &["iperf3", "-s", "-B", &ip]);
                let out = site.client(verb, &[&["iperf3", "-c", &ip, "-J", "-t", "2"], options].concat());
                drop(server);
                let result: Value = serde_json::from_str(&out).expect("JSON of iperf3");
                assert!(result["error"].is_null(), "{result}");
                let sums = ["sum_received", "sum_received_bidir_reverse"].map(|sum| &result["end"][sum]);
                let rates = sums.iter().filter_map(|sum| sum["bits_per_second"].as_f64());
                rates.sum::<f64>() / 1e6
            });
        }
    }
}

#[test]
fn sockperf() {
    if !kit::have(&["sockperf:sockperf"]) {
        return;
    }
    for path in PATHS {
        let site = Site::new("sockperf", path);
        let (ip, port) = (site.ip(), SOCKPERF.to_string());
        let at = ["--tcp", "-i", &ip, "-p", &port];
        for (mode, options, label) in [
            ("ping-pong", &["--msg-size", "64", "--mps", "400000"][..], "Rate = "),
            ("ping-pong", &["--msg-size", "8000", "--mps", "400000"], "Rate = "),
            ("throughput", &["--msg-size", "1000"], "Message Rate is "),
        ] {
            let what = [&[mode], options].concat().join(" ");
            site.compare(&what, "msg/s", on_lane(1, 100_000), |verb| {
                let server = site.serve(verb, SOCKPERF, &[&["sockperf", "server"], &at[..]].concat());
                let out =
                    site.client(verb, &[&["sockperf", mode], &at[..], options, &["--time", "5"]].concat());
                assert!(
                    mode != "ping-pong" || out.contains("dropped messages = 0; # duplicated messages = 0"),
                    "{out}"
                );
                drop(server);
                if mode == "ping-pong" {
                    1e6 / (2.0 * number(&out, "avg-latency="))
                } else {
                    number(&out, label)
                }
            });
        }
    }
}

// ---------------------------------------------------------------- scp

/// A server with keys of its own, in the path's server guest.
struct Ssh<'a> {
    site: &'a Site,
    options: Vec<String>,
}

impl<'a> Ssh<'a> {
    fn new(site: &'a Site) -> Self {
        let (host, user) = (site.at("host"), site.at("user"));
        // A client with many keys has proved itself worth a lane before it is let in.
        let others: Vec<_> = (0..5).map(|n| site.at(&format!("other-{n}"))).collect();
        for key in [&host, &user].into_iter().chain(&others) {
            kit::prepare(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key]);
        }
        // Where the packaged service would keep what an unprivileged child is locked into.
        kit::prepare(&["install", "-d", "-m", "755", "/run/sshd"]);
        site.text(
            "sshd_config",
            &format!(
                "Port {SSH}\nListenAddress {}\nHostKey {host}\nPidFile none\nAuthorizedKeysFile {user}.pub\n\
                 StrictModes no\nUsePAM no\nMaxAuthTries 20\nPermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n\
                 Ciphers aes128-gcm@openssh.com\n",
                site.ip()
            ),
        );
        let words = [
            "-q",
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ];
        let keys: Vec<_> = others.iter().chain([&user]).flat_map(|key| ["-i", key]).collect();
        let words = [&keys[..], &words, &["-o", "BatchMode=yes", "-F", "/dev/null"]].concat();
        Self { site, options: words.into_iter().map(str::to_owned).collect() }
    }

    /// `options`: with `-r` it serves a connection in a child that has not executed the program anew.
    fn serve(&self, verb: &str, options: &[&str]) -> Program {
        let command = ["/usr/sbin/sshd", "-D", "-e", "-f", &self.site.at("sshd_config")];
        self.site.serve(verb, SSH, &[&command, options].concat())
    }

    fn run(&self, verb: &str, program: &str, words: &[&str]) -> String {
        let options: Vec<_> = self.options.iter().map(String::as_str).collect();
        let port = if program == "ssh" { "-p" } else { "-P" };
        self.site.client(verb, &[&[program], &options[..], &[port, "2222"], words].concat())
    }
}

#[test]
fn scp_a_gigabyte() {
    if !kit::have(&["/usr/sbin/sshd:openssh-server", "scp:openssh-client"]) {
        return;
    }
    for path in PATHS {
        let site = Site::new("scp", path);
        let ssh = Ssh::new(&site);
        let (from, to) = (site.bytes("1g", 1 << 30), site.at("1g.there"));
        let far = format!("root@{}:{to}", site.ip());
        let copy = |verb: &str, options: &[&str]| {
            let server = ssh.serve(verb, options);
            let begun = std::time::Instant::now();
            ssh.run(verb, "scp", &[&from, &far]);
            let took = begun.elapsed();
            same(&from, &to);
            fs::remove_file(&to).expect("the copy");
            kit::stop(server);
            1073.0 / took.as_secs_f64()
        };
        // The server executes itself for each connection, which it then has inherited.
        let then = site.lab.stat("a");
        site.compare("scp, 1 GiB", "MB/s", |before| before.none_upgraded(), |verb| copy(verb, &[]));
        let declined = site.lab.stat("a").declined("peer-not-open") - then.declined("peer-not-open");
        assert_eq!(declined, 1, "connections on TCP as the peer has not opened them");
        // And what a session has to say; with -r the server only forks, and locks its child into a sandbox.
        for options in [&[][..], &["-r"]] {
            let server = ssh.serve("run", options);
            let host = format!("root@{}", site.ip());
            let out = ssh.run("run", "ssh", &[&host, "seq 300000"]);
            assert!(out.lines().map(str::parse).eq((1..=300_000).map(Ok::<u32, _>)), "what seq says differs");
            kit::stop(server);
        }
    }
}

// ---------------------------------------------------------------- rsync

#[test]
fn rsync_over_a_daemon() {
    if !kit::have(&["rsync:rsync"]) {
        return;
    }
    for path in PATHS {
        let site = Site::new("rsync", path);
        fs::create_dir_all(site.at("from/small")).expect("a directory in memory");
        site.bytes("from/300m", 300 << 20);
        for n in 0..1000 {
            site.bytes(&format!("from/small/{n}"), 100 + 37 * n);
        }
        let module = site.at("");
        let text = format!(
            "port = {RSYNC}\naddress = {}\nuse chroot = no\nuid = root\ngid = root\nread only = no\n[all]\npath = {module}\n",
            site.ip()
        );
        let configuration = format!("--config={}", site.text("rsyncd.conf", &text));
        let serve =
            |verb: &str| site.serve(verb, RSYNC, &["rsync", "--daemon", "--no-detach", &configuration]);
        let (from, url) = (site.at("from/"), format!("rsync://{}:{RSYNC}/all", site.ip()));
        // Both ends are two processes each, which share a connection from before it is worth anything: neither has counted
        // all of its bytes, so it stays on TCP, whose counters say otherwise.
        let reasons = || {
            let stats = ["a", site.server()].map(|guest| site.lab.stat(guest));
            stats
                .map(|stat| stat.declined("untrackable") + stat.declined("peer-not-open"))
                .iter()
                .sum::<u64>()
        };
        let then = reasons();
        site.compare(
            "push, 300 MiB and 1000 files",
            "MB/s",
            |before| before.none_upgraded(),
            |verb| {
                let server = serve(verb);
                let begun = std::time::Instant::now();
                let to = format!("{url}/there-{verb}/");
                site.client(verb, &["rsync", "-a", "--whole-file", &from, &to]);
                let took = begun.elapsed();
                kit::prepare(&["diff", "-r", &from, &site.at(&format!("there-{verb}"))]);
                kit::stop(server);
                332.0 / took.as_secs_f64()
            },
        );
        assert!(reasons() > then, "no reason was counted");
        // Only what differs, and back; checksums cross both ways.
        let server = serve("run");
        site.bytes("from/300m", (300 << 20) - 12345);
        site.client("run", &["rsync", "-a", "-c", "--delete", &from, &format!("{url}/there-run/")]);
        site.client("run", &["rsync", "-a", "--delete", &format!("{url}/there-run/"), &site.at("back")]);
        kit::prepare(&["diff", "-r", &from, &site.at("back")]);
        kit::stop(server);
        wait_until(SOON, "no connection is left", || site.lab.ss("a").is_empty());
    }
}
