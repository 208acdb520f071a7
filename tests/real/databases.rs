//! redis beyond its benchmark, memcached, PostgreSQL.

use crate::common::{self, Before, Program, wait_until};
use crate::kit::{self, PATHS, SOON, Site, number, on_lane, source};

const REDIS: u16 = 6379;
const MEMCACHED: u16 = 11211;
const POSTGRES: u16 = 5432;

// ---------------------------------------------------------------- redis

const REDIS_NEEDS: [&str; 3] = ["redis-server:redis-server", "redis-cli:redis-tools", "python3:python3"];

fn redis(site: &Site, verb: &str, guest: &str, options: &[&str]) -> Program {
    let (ip, dir) = (site.ip_of(guest), site.at(""));
    let common = ["redis-server", "--bind", &ip, "--dir", &dir, "--save", "", "--protected-mode", "no"];
    let common =
        [&common[..], &["--enable-debug-command", "yes", "--dbfilename"], &[guest], options].concat();
    site.lab.serve_by(verb, guest, REDIS, &common)
}

fn ask(site: &Site, guest: &str, words: &[&str]) -> String {
    let ip = site.ip_of(guest);
    site.client("exec", &[&["redis-cli", "-h", &ip], words].concat()).trim().to_owned()
}

/// A replica takes a snapshot, then what is written while it does and afterwards: the same keys as its master's.
#[test]
fn redis_replicates() {
    if !kit::have(&REDIS_NEEDS) {
        return;
    }
    for path in PATHS {
        let site = Site::new("redis-replication", path);
        // The client has a lane to the master, and the master one to the replica in the other guest.
        let (master, copy) = (site.server(), site.third());
        let one = redis(&site, "run", master, &[]);
        let host = site.ip();
        let load = |n: &str, keys: &str| {
            let options = ["-t", "set", "-d", "100", "-c", "20", "-P", "8", "-n", n, "-r", keys, "--csv"];
            site.client("run", &[&["redis-benchmark", "-h", &host], &options[..]].concat());
        };
        load("400000", "1000000");
        let two = redis(&site, "run", copy, &["--replicaof", &host, &REDIS.to_string()]);
        load("100000", "2000000");
        let synchronized = || {
            wait_until(common::PROGRAM, "the replica has it all", || {
                ask(&site, copy, &["info", "replication"]).contains("master_link_status:up")
                    && ask(&site, master, &["wait", "1", "1000"]) == "1"
            });
        };
        synchronized();
        // The snapshot goes over TCP: the child that makes it has the connection as well, and was forked before it was worth
        // a lane. What comes after it does not.
        let then = site.lab.stat(copy);
        load("1000000", "2000000");
        synchronized();
        let digests = [master, copy].map(|guest| ask(&site, guest, &["debug", "digest"]));
        assert_eq!(digests[0], digests[1], "what the two hold");
        assert!(ask(&site, copy, &["dbsize"]).parse::<u64>().expect("a number of keys") > 300_000);
        let rose = |lane| site.lab.stat(copy).moved(lane) - then.moved(lane);
        let (fast, tcp) = (rose("direct") + rose("fabric"), rose("tcp"));
        assert!(fast > 100_000_000 && tcp < fast / 4, "{fast} bytes on lanes, {tcp} on TCP");
        kit::stop(two);
        kit::stop(one);
    }
}

/// Transactions of many clients at once, and what subscribers hear of them.
#[test]
fn redis_transactions_and_subscriptions() {
    if !kit::have(&REDIS_NEEDS) {
        return;
    }
    for path in PATHS {
        let site = Site::new("redis-transactions", path);
        let (ip, script) = (site.ip(), source("redis_check.py"));
        let command = ["python3", &script, &ip, "8", "1500"];
        site.compare("8 clients, MULTI, PUBLISH", "transactions/s", on_lane(9, 5_000_000), |verb| {
            let server = redis(&site, verb, site.server(), &[]);
            let rate = number(&site.client(verb, &command), "rate");
            kit::stop(server);
            rate
        });
    }
}

#[test]
fn redis_with_five_thousand_clients() {
    if !kit::have(&REDIS_NEEDS) {
        return;
    }
    for path in PATHS {
        let site = Site::new("redis-5000", path);
        let ip = site.ip();
        let command = ["redis-benchmark", "-h", &ip, "-t", "get", "-c", "5000", "-n", "300000", "--csv"];
        // A guest may have 1024 connections on lanes; the others stay on TCP, for that reason.
        let quota = || site.lab.stat("a").declined("quota");
        let proof = |before: &Before<'_>| {
            before.upgraded(1000);
            assert!(quota() > 3000, "{} connections beyond the quota", quota());
        };
        site.compare("GET, -c 5000", "req/s", proof, |verb| {
            let server = redis(&site, verb, site.server(), &["--maxclients", "6000"]);
            let out = site.client(verb, &command);
            assert!(!out.contains("rror"), "{out}");
            kit::stop(server);
            let row = out.lines().last().expect("a row").replace('"', "");
            number(&row, "GET,")
        });
        for guest in ["a", site.server()] {
            wait_until(SOON, "no connection is left", || site.lab.stat(guest).connections("open") == 0);
        }
    }
}

// ---------------------------------------------------------------- memcached

/// memaslap compares every value it gets with the one it has set.
#[test]
fn memcached() {
    if !kit::have(&["memcached:memcached", "memcaslap:libmemcached-tools", "memccapable:libmemcached-tools"])
    {
        return;
    }
    for path in PATHS {
        let site = Site::new("memcached", path);
        let (ip, port) = (site.ip(), MEMCACHED.to_string());
        let serve = |verb: &str| {
            let command = ["memcached", "-u", "nobody", "-l", &ip, "-p", &port, "-m", "512", "-t", "2"];
            site.serve(verb, MEMCACHED, &command)
        };
        let server = format!("{ip}:{port}");
        for (what, options) in
            [("50 clients", &["-c", "50"][..]), ("50 clients, multi-get", &["-c", "50", "-d", "20"])]
        {
            let command = [&["memcaslap", "-s", &server, "-T", "2", "-t", "3s", "-v", "1"], options].concat();
            site.compare(what, "ops/s", on_lane(50, 10_000_000), |verb| {
                let server = serve(verb);
                let out = site.client(verb, &command);
                assert!(
                    number(&out, "verify_misses:") == 0.0 && number(&out, "verify_failed:") == 0.0,
                    "{out}"
                );
                kit::stop(server);
                number(&out, "TPS:")
            });
        }
        // Its own test of the protocol, command by command.
        let server = serve("run");
        for protocol in ["-a", "-b"] {
            let out = site.client("run", &["memccapable", "-h", &ip, "-p", &port, protocol]);
            assert!(out.contains("All tests passed"), "{out}");
        }
        kit::stop(server);
    }
}

// ---------------------------------------------------------------- PostgreSQL

/// A cluster of its own, with pgbench's tables.
struct Postgres<'a> {
    site: &'a Site,
    data: String,
}

/// Its programs refuse to run as root.
const AS_POSTGRES: [&str; 4] = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"];

fn binary(name: &str) -> String {
    let found = kit::prepare(&["sh", "-c", &format!("ls -d /usr/lib/postgresql/*/bin/{name} | tail -n 1")]);
    found.trim().to_owned()
}

impl<'a> Postgres<'a> {
    fn new(site: &'a Site) -> Self {
        let data = site.at("postgres");
        kit::prepare(&["install", "-d", "-o", "postgres", "-g", "postgres", "-m", "700", &data]);
        let initdb = binary("initdb");
        let options = [initdb.as_str(), "-D", &data, "-A", "trust", "-N", "--no-locale", "-E", "UTF8"];
        kit::prepare(&[&AS_POSTGRES[..], &options].concat());
        kit::prepare(&["sh", "-c", &format!("echo 'host all all 0.0.0.0/0 trust' >>{data}/pg_hba.conf")]);
        Self { site, data }
    }

    fn serve(&self, verb: &str) -> Program {
        let (postgres, addresses) = (binary("postgres"), format!("listen_addresses={}", self.site.ip()));
        let settings = ["-c", &addresses, "-c", "fsync=off", "-c", "unix_socket_directories="];
        let command = [&AS_POSTGRES[..], &[&postgres, "-D", &self.data], &settings].concat();
        let server = self.site.serve(verb, POSTGRES, &command);
        wait_until(SOON, "PostgreSQL is ready", || server.err().contains("ready to accept connections"));
        server
    }

    fn pgbench(&self, verb: &str, options: &[&str]) -> String {
        let (pgbench, ip) = (binary("pgbench"), self.site.ip());
        self.site.client(
            verb,
            &[&[pgbench.as_str(), "-h", &ip, "-U", "postgres"], options, &["postgres"]].concat(),
        )
    }

    fn sql(&self, verb: &str, statement: &str) -> String {
        let (psql, ip) = (binary("psql"), self.site.ip());
        let command =
            [&psql, "-h", &ip, "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-Atc", statement, "postgres"];
        self.site.client(verb, &command).trim().to_owned()
    }
}

#[test]
fn postgres_and_pgbench() {
    if !kit::have(&[
        "/usr/lib/postgresql/*/bin/postgres:postgresql",
        "/usr/lib/postgresql/*/bin/pgbench:postgresql",
    ]) {
        return;
    }
    for path in PATHS {
        let site = Site::new("postgres", path);
        let postgres = Postgres::new(&site);
        let server = postgres.serve("run");
        // The tables come from the client, by COPY; and go back to it.
        let before = site.lab.before(path);
        postgres.pgbench("run", &["-i", "-q", "-s", "10", "-I", "dtgvp"]);
        on_lane(1, 12 << 20)(&before);
        let copy = "COPY pgbench_accounts TO STDOUT";
        let plain = postgres.sql("exec", copy);
        let before = site.lab.before(path);
        let fast = postgres.sql("run", copy);
        assert!(plain == fast && fast.lines().count() == 1_000_000, "what comes back differs");
        on_lane(1, 80 << 20)(&before);
        kit::stop(server);
        for (what, options) in [
            ("pgbench -c 10, select", &["-S", "-c", "10", "-j", "2", "-T", "3"][..]),
            ("pgbench -c 10, select, prepared", &["-S", "-M", "prepared", "-c", "10", "-j", "2", "-T", "3"]),
            ("pgbench -c 10, TPC-B", &["-N", "-c", "10", "-j", "2", "-T", "3"]),
            ("pgbench -c 1, select", &["-S", "-c", "1", "-T", "2"]),
        ] {
            let (connections, bytes) = if what.contains("-c 10") { (10, 500_000) } else { (1, 100_000) };
            site.compare(what, "tps", on_lane(connections, bytes), |verb| {
                let server = postgres.serve(verb);
                let out = postgres.pgbench(verb, &[&["-n"], options].concat());
                assert!(out.contains("number of failed transactions: 0 "), "{out}");
                kit::stop(server);
                number(&out, "tps =")
            });
        }
        let server = postgres.serve("run");
        let sums =
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)";
        assert_eq!(postgres.sql("run", sums), "t", "each transaction changed an account and left a line");
        kit::stop(server);
    }
}
