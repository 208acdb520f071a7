//! nginx, haproxy in front of it, curl with TLS; wrk measures.

use rustix::process::Signal;
use std::time::Duration;

use crate::common::{Lab, Program, Stat, wait_until};
use crate::kit::{self, PATHS, SOON, Site, children, number, on_lane, same};

const PORT: u16 = 8080;
const TLS: u16 = 8443;
const BALANCER: u16 = 8081;
const NEEDS: [&str; 3] = ["nginx:nginx", "wrk:wrk", "curl:curl"];

/// nginx as its manual has it, with four workers and sendfile, in a guest.
struct Nginx {
    configuration: String,
}

impl Nginx {
    fn new(site: &Site) -> Self {
        site.bytes("1k", 1000);
        site.bytes("64k", 65536);
        let (root, certificate) = (site.at(""), site.at("tls"));
        kit::prepare(&[
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=lab",
            "-addext",
            &format!("subjectAltName=IP:{},IP:{}", site.ip(), site.ip_of(site.third())),
            "-keyout",
            &format!("{certificate}.key"),
            "-out",
            &format!("{certificate}.pem"),
        ]);
        let text = format!(
            "worker_processes 4; user nobody nogroup; daemon off; pid {root}nginx.pid; error_log {root}error.log;
            events {{ worker_connections 2048; }}
            http {{
                access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; root {root};
                client_body_temp_path {root}body; proxy_temp_path {root}proxy; fastcgi_temp_path {root}fastcgi;
                uwsgi_temp_path {root}uwsgi; scgi_temp_path {root}scgi;
                server {{ listen {PORT}; listen {TLS} ssl;
                    ssl_certificate {certificate}.pem; ssl_certificate_key {certificate}.key; }}
            }}"
        );
        Self { configuration: site.text("nginx.conf", &text) }
    }

    fn serve(&self, lab: &Lab, verb: &str, guest: &str) -> Program {
        let mut server = lab.serve_by(verb, guest, PORT, &["nginx", "-c", &self.configuration]);
        server.listens(TLS);
        server
    }
}

/// What wrk counts in so many seconds: requests a second.
fn wrk(site: &Site, verb: &str, seconds: u32, options: &[&str], url: &str) -> f64 {
    let duration = format!("-d{seconds}");
    let out = site.client(verb, &[&["wrk", "-t2", &duration], options, &[url]].concat());
    assert!(!out.contains("Socket errors") && !out.contains("Non-2xx"), "{out}");
    number(&out, "Requests/sec:")
}

#[test]
fn nginx_keeps_connections() {
    if !kit::have(&NEEDS) {
        return;
    }
    for path in PATHS {
        let site = Site::new("nginx-keep-alive", path);
        let nginx = Nginx::new(&site);
        for (file, least) in [("1k", 5_000_000), ("64k", 50_000_000)] {
            let url = format!("http://{}:{PORT}/{file}", site.ip());
            site.compare(&format!("wrk -c50, {file}"), "req/s", on_lane(50, least), |verb| {
                let server = nginx.serve(&site.lab, verb, site.server());
                let rate = wrk(&site, verb, 3, &["-c50"], &url);
                kit::stop(server);
                rate
            });
        }
    }
}

/// A connection for each request: none is worth an upgrade.
#[test]
fn nginx_closes_connections() {
    if !kit::have(&NEEDS) {
        return;
    }
    for path in PATHS {
        let site = Site::new("nginx-close", path);
        let nginx = Nginx::new(&site);
        let url = format!("http://{}:{PORT}/1k", site.ip());
        site.compare(
            "wrk -c50, 1k, close",
            "req/s",
            |before| before.none_upgraded(),
            |verb| {
                let server = nginx.serve(&site.lab, verb, site.server());
                let rate = wrk(&site, verb, 2, &["-c50", "-H", "Connection: close"], &url);
                kit::stop(server);
                rate
            },
        );
    }
}

/// A download into a file: MB/s by curl's account.
fn download(site: &Site, verb: &str, url: &str, file: &str) -> f64 {
    let (to, ca) = (site.at(&format!("{file}.here")), site.at("tls.pem"));
    let out = site.client(
        verb,
        &[
            "curl",
            "-sS",
            "--http1.1",
            "--fail",
            "--cacert",
            &ca,
            "-o",
            &to,
            "-w",
            "speed %{speed_download}",
            url,
        ],
    );
    same(&site.at(file), &to);
    number(&out, "speed") / 1e6
}

#[test]
fn nginx_sends_a_gigabyte() {
    if !kit::have(&NEEDS) {
        return;
    }
    for path in PATHS {
        let site = Site::new("nginx-1g", path);
        let nginx = Nginx::new(&site);
        site.bytes("1g", 1 << 30);
        let url = format!("http://{}:{PORT}/1g", site.ip());
        site.compare("curl, 1 GiB", "MB/s", on_lane(1, 900 << 20), |verb| {
            let server = nginx.serve(&site.lab, verb, site.server());
            let rate = download(&site, verb, &url, "1g");
            kit::stop(server);
            rate
        });
    }
}

/// Old workers finish what they have begun, new ones take what is new, and the old ones end.
#[test]
fn nginx_reloads_under_load() {
    if !kit::have(&NEEDS) {
        return;
    }
    for path in PATHS {
        let site = Site::new("nginx-reload", path);
        let nginx = Nginx::new(&site);
        site.bytes("200m", 200 << 20);
        let server = nginx.serve(&site.lab, "run", site.server());
        let before = site.lab.before(path);
        let url = format!("http://{}:{PORT}/200m", site.ip());
        let old = children(server.pid());
        assert_eq!(old.len(), 4, "workers");
        let mut clients = Vec::new();
        for n in 0..6 {
            let to = site.at(&format!("{n}.here"));
            // So slow that two reloads fall into it.
            let command = ["curl", "-sS", "--fail", "--limit-rate", "120M", "-o", &to, &url];
            clients.push((site.lab.run("a", &command), to.clone()));
            if n % 2 == 1 {
                std::thread::sleep(Duration::from_millis(400));
                server.signal(Signal::HUP);
            }
        }
        for (client, to) in clients {
            client.ok();
            same(&site.at("200m"), &to);
        }
        wait_until(SOON, "the old workers end", || {
            let now = children(server.pid());
            now.len() == 4 && now.iter().all(|pid| !old.contains(pid))
        });
        on_lane(6, 1000 << 20)(&before);
        kit::stop(server);
    }
}

#[test]
fn curl_over_tls() {
    if !kit::have(&NEEDS) {
        return;
    }
    for path in PATHS {
        let site = Site::new("curl-tls", path);
        let nginx = Nginx::new(&site);
        site.bytes("300m", 300 << 20);
        let url = format!("https://{}:{TLS}/300m", site.ip());
        site.compare("curl, TLS, 300 MiB", "MB/s", on_lane(1, 280 << 20), |verb| {
            let server = nginx.serve(&site.lab, verb, site.server());
            let rate = download(&site, verb, &url, "300m");
            kit::stop(server);
            rate
        });
        let url = format!("https://{}:{TLS}/1k", site.ip());
        site.compare("wrk -c10, TLS, 1k", "req/s", on_lane(10, 1_000_000), |verb| {
            let server = nginx.serve(&site.lab, verb, site.server());
            let rate = wrk(&site, verb, 2, &["-c10"], &url);
            kit::stop(server);
            rate
        });
    }
}

/// haproxy in the path's server guest, nginx in the third one: a proxy between two lanes, which splices.
#[test]
fn haproxy_before_nginx() {
    if !kit::have(&[&NEEDS[..], &["haproxy:haproxy"]].concat()) {
        return;
    }
    for path in PATHS {
        let site = Site::new("haproxy", path);
        let nginx = Nginx::new(&site);
        site.bytes("300m", 300 << 20);
        let text = format!(
            "global\n nbthread 2\n maxconn 2000\n\
             defaults\n mode http\n option splice-request\n option splice-response\n timeout connect 10s\n timeout client 60s\n timeout server 60s\n\
             frontend front\n bind {}:{BALANCER}\n default_backend back\n\
             backend back\n http-reuse always\n server one {}:{PORT}\n",
            site.ip(),
            site.ip_of(site.third())
        );
        let configuration = site.text("haproxy.cfg", &text);
        let serve = |verb: &str| {
            let backend = nginx.serve(&site.lab, verb, site.third());
            let balancer = site.serve(verb, BALANCER, &["haproxy", "-db", "-f", &configuration]);
            (backend, balancer)
        };
        let url = |file: &str| format!("http://{}:{BALANCER}/{file}", site.ip());
        let behind = Behind::new(&site);
        site.compare(
            "curl, 300 MiB",
            "MB/s",
            |_| behind.carried(280 << 20),
            |verb| {
                let (backend, balancer) = serve(verb);
                let rate = download(&site, verb, &url("300m"), "300m");
                kit::stop(balancer);
                kit::stop(backend);
                rate
            },
        );
        for file in ["1k", "64k"] {
            let behind = Behind::new(&site);
            let measure = |verb: &str| {
                let (backend, balancer) = serve(verb);
                let rate = wrk(&site, verb, 3, &["-c50"], &url(file));
                kit::stop(balancer);
                kit::stop(backend);
                rate
            };
            site.compare(&format!("wrk -c50, {file}"), "req/s", |_| behind.carried(5_000_000), measure);
        }
    }
}

/// The counters of the client's guest and of the one behind the proxy, whose connections are on whichever lane.
struct Behind<'a> {
    site: &'a Site,
    stats: [Stat; 2],
}

impl<'a> Behind<'a> {
    fn new(site: &'a Site) -> Self {
        Self { site, stats: Self::ask(site) }
    }

    fn ask(site: &Site) -> [Stat; 2] {
        ["a", site.third()].map(|guest| site.lab.stat(guest))
    }

    /// Since then at each of the two so many bytes went over lanes, and a third as many at most over TCP: two connections
    /// behind each other take their time to be upgraded, beside all the others.
    fn carried(&self, least: u64) {
        for (then, now) in self.stats.iter().zip(Self::ask(self.site)) {
            let rose = |lane| now.moved(lane) - then.moved(lane);
            let (fast, tcp) = (rose("direct") + rose("fabric"), rose("tcp"));
            assert!(fast >= least && tcp <= fast / 3, "{fast} bytes on lanes, {tcp} on TCP: {}", now.0);
        }
    }
}
