"""vmpeers.py: vsocket and what else there is, side by side in one emulated machine; scripts/vmlab peers.

One machine, and in it client and server over the loopback of one Soft-RoCE device: two emulated machines on two
processors starve each other. Every peer is measured by the same programs in turn, round after round, so that whatever
else the real machine does falls on all alike. An emulated processor tells which way costs less work, not how fast a
network card is: figures are worth their ratios, and only within one run.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

from vmlab import TARGET, Failure, Lab, check, on_signals

ROOT = Path(__file__).resolve().parents[1]
RDMA = "192.0.2.1"
# unit, whether more is better
MEASURES = {
    "rr-64": ("µs", False),
    "stream-64k": ("MB/s", True),
    "stream-1m": ("MB/s", True),
    "redis-get-c1": ("req/s", True),
    "redis-get-c10": ("req/s", True),
    "redis-get-c40": ("req/s", True),
}
# A measurement that takes longer hangs.
LIMIT = 20


class Sockets:
    """A way to carry TCP programs' bytes: how a program is started at each end, and where the server is."""

    def __init__(self, name, lab, port, address, client=(), server=(), verify=None):
        self.name, self.lab, self.port, self.address = name, lab, port, address
        self.client, self.server, self.verify = client, server, verify
        self.servers = {}

    def start(self, which, *command):
        return self.lab.start("exec", "h1", "--", *(self.client if which == "client" else self.server), *command)

    def serve(self, what, text, *command):
        """A server of this kind, started when it is first needed or after one that failed."""
        server = self.servers.get(what)
        if not server or not server.runs():
            server = self.servers[what] = self.start("server", *command)
            server.prints(text, LIMIT)

    def forget(self, what):
        if what in self.servers:
            self.servers.pop(what).kill()

    def measure(self, measure):
        kind, _, rest = measure.partition("-")
        try:
            value = getattr(self, kind)(rest)
            if self.verify:
                self.verify()
            return value
        except Failure:
            self.forget(kind)
            raise

    def rr(self, _size):
        address = f"{self.address}:{self.port}"
        self.serve("rr", "listening", "stream", "serve", address)
        command = ["stream", "echo", address, "--rounds", "4000", "--size", "64"]
        # The median: a connection is upgraded once, at its beginning, and the real machine interrupts the emulated one.
        return self.start("client", *command).report(LIMIT)["median_us"]

    def stream(self, size):
        port = str(self.port + 1)
        self.serve("stream", "listening", "iperf3", "-s", "-B", self.address, "-p", port, "--forceflush")
        command = ["iperf3", "-c", self.address, "-p", port, "-l", size.upper(), "-O", "1", "-t", "3", "-J"]
        end = json.loads(self.start("client", *command).ok(LIMIT))["end"]
        value = end["sum_received"]["bits_per_second"] / 8e6
        check(value > 0, "iperf3 received nothing")
        return value

    def redis(self, test):
        port, clients = str(self.port + 2), test.rpartition("c")[2]
        server = f"redis-server --bind {self.address} --port {port} --protected-mode no --save".split()
        self.serve("redis", "Ready to accept", *server, "")
        # A short run to learn how many requests two seconds take.
        rate = self.requests(port, clients, 300)
        return self.requests(port, clients, max(300, int(rate * 2)))

    def requests(self, port, clients, n):
        command = ["redis-benchmark", "-h", self.address, "-p", port, "-t", "get", "-c", clients, "-n", str(n), "--csv"]
        out = self.start("client", *command).ok(LIMIT)
        try:
            return float(out.splitlines()[-1].split(",")[1].strip('"'))
        except (IndexError, ValueError):
            raise Failure(f"redis-benchmark printed no rate: {out[-200:]}") from None


class Rsocket(Sockets):
    """librspreload under the same programs; where iperf3 does not get through, rsocket's own rstream."""

    def stream(self, size):
        try:
            return super().stream(size)
        except Failure as failure:
            self.forget("stream")
            bytes_of = {"64k": 65536, "1m": 1 << 20}[size]
            server = self.lab.start("exec", "h1", "--", "rstream", "-p", "7471")
            time.sleep(1)
            command = ["rstream", "-s", RDMA, "-p", "7471", "-S", str(bytes_of), "-C", str((16 << 20) // bytes_of)]
            client = self.lab.start("exec", "h1", "--", *command)
            try:
                out = client.ok(LIMIT)
                found = re.search(r"^custom .* ([0-9.]+)s +([0-9.]+) +[0-9.]+$", out, re.M)
                check(found, f"iperf3: {failure}; rstream: {client.last()}")
                return float(found[2]) * 1000 / 8
            finally:
                server.kill()


class Smc(Sockets):
    """SMC sockets of the kernel; without a queue pair of theirs that sends, it is TCP after all.

    With Linux 6.1 it always is. SMC says nothing over a queue pair whose `cur_qp_state` is not RTS, which is what Soft-RoCE
    reports of one that is. So the first message, which confirms the link, is refused (ENOLINK), the queue pair put into ERR,
    and the other end waits five seconds for that message before both fall back.
    """

    def pairs(self):
        pairs = self.lab.json("exec", "h1", "--", "rdma", "-j", "resource", "show", "qp")
        return [pair["state"] for pair in pairs if "smc" in pair.get("comm", "")]

    def measure(self, measure):
        try:
            value = super().measure(measure)
        except Failure as failure:
            raise Failure(f"queue pairs of SMC-R: {', '.join(self.pairs()) or 'none'}: {failure}") from None
        check("RTS" in self.pairs(), f"fell back to TCP; queue pairs of SMC-R: {self.pairs()}")
        return value


class Verbs:
    """Verbs without sockets: what all others cost beside it. Not a way to run redis."""

    name = "raw verbs"

    def __init__(self, lab):
        self.lab = lab
        self.server = None

    def measure(self, measure):
        test, size = {"rr-64": ("rc_lat", "64"), "stream-64k": ("rc_bw", "64K"), "stream-1m": ("rc_bw", "1M")}.get(
            measure, (None, None)
        )
        check(test, "not for this program")
        if not self.server or not self.server.runs():
            self.server = self.lab.start("exec", "h1", "--", "qperf")
            time.sleep(1)
        command = ["qperf", "-cm", "1", "-t", "2", "-m", size, RDMA, test]
        client = self.lab.start("exec", "h1", "--", *command)
        try:
            found = re.search(r"= +([0-9.,]+) +([a-zA-Z/]+)", client.ok(LIMIT))
            check(found, f"qperf: {client.last()}")
        except Failure:
            self.server.kill()
            raise
        value, unit = float(found[1].replace(",", "")), found[2]
        scale = {"ns": 1e-3, "us": 1, "ms": 1e3, "sec": 1e6, "KB/sec": 1e-3, "MB/sec": 1, "GB/sec": 1e3, "bytes/sec": 1e-6}
        check(unit in scale, f"qperf's unit is {unit}")
        # Its latency is one way.
        return value * scale[unit] * (2 if test == "rc_lat" else 1)


class Peers:
    def __init__(self, lab, rounds):
        self.lab, self.rounds = lab, rounds
        self.values, self.errors = {}, {}
        self.fabric = None

    def prepare(self):
        """The overlay with its daemons, both backends over the one device; and what the peers need."""
        lab = self.lab
        lab.up("1")
        lab.must("exec", "h1", "--", "ip", "addr", "add", "192.0.2.2/24", "dev", "eth0")
        lab.must("exec", "h1", "--", "lab", "up", "--backends-here", "--fabric", "verbs", limit=90)
        self.fabric = lab.json("exec", "h1", "--", "lab", "vsocketd", "h1", "stat", "--json")["fabric"]
        source, built = str(ROOT / "tests" / "programs" / "smc.c"), TARGET / "vmlab"
        for out, options in (("libsmc.so", "-shared -fPIC"), ("pnetid", "-DPNETID")):
            status = os.system(f"cc -O2 {options} -o '{built / out}' '{source}'")
            check(status == 0, f"cc cannot build {out}")
            lab.must("put", "h1", str(built / out))
        lab.must("exec", "h1", "--", "/tmp/pnetid", "lo", "rxe0")
        rspreload = lab.must("exec", "h1", "--", "sh", "-c", "echo /usr/lib/*/rsocket/librspreload.so").strip()
        in_guest = lambda mode, guest: ("lab", mode, guest, "--")
        self.peers = [
            Sockets("kernel TCP", lab, 7100, RDMA),
            Sockets("TCP over VXLAN", lab, 7200, "198.51.100.3", in_guest("exec", "a"), in_guest("exec", "c")),
            Rsocket("rsocket", lab, 7300, RDMA, *[("env", f"LD_PRELOAD={rspreload}")] * 2),
            Smc("SMC-R", lab, 7400, RDMA, *[("env", "LD_PRELOAD=/tmp/libsmc.so")] * 2),
            Verbs(lab),
            Sockets(
                "vsocket", lab, 7500, "198.51.100.3", in_guest("run", "a"), in_guest("run", "c"), self.is_accelerated
            ),
        ]
        self.carried = 0

    def is_accelerated(self):
        stat = self.lab.json("exec", "h1", "--", "lab", "vsocket", "a", "stat", "--json")
        carried = stat["bytes"]["fabric"]["tx"] + stat["bytes"]["fabric"]["rx"]
        before, self.carried = self.carried, carried
        check(carried > before, f"not over the fabric: {stat}")

    def run(self):
        for number in range(self.rounds):
            for measure in MEASURES:
                for peer in self.peers:
                    self.one(number, peer, measure)

    def one(self, number, peer, measure):
        key = peer.name, measure
        failed = self.errors.get(key, [])
        # What failed twice, or whose first measure did, is not waited for again.
        gone = len(self.errors.get((peer.name, "rr-64"), [])) >= 1 and not self.values.get((peer.name, "rr-64"))
        if len(failed) >= 2 or (gone and measure != "rr-64"):
            return
        try:
            value = peer.measure(measure)
        except (Failure, ValueError, KeyError) as failure:
            text = str(failure) if isinstance(failure, Failure) else repr(failure)
            self.errors.setdefault(key, []).append(text)
            print(f"{number + 1} {peer.name}: {measure}: {text[:200]}", file=sys.stderr, flush=True)
        else:
            self.values.setdefault(key, []).append(value)
            print(f"{number + 1} {peer.name}: {measure}: {value:.4g} {MEASURES[measure][0]}", file=sys.stderr, flush=True)

    def rows(self):
        for measure, (unit, more) in MEASURES.items():
            medians = {p.name: statistics.median(v) for p in self.peers if (v := self.values.get((p.name, measure)))}
            for peer in self.peers:
                row = {"measure": measure, "peer": peer.name, "unit": unit, "values": self.values.get((peer.name, measure), [])}
                if peer.name in medians:
                    row["median"] = float(f"{medians[peer.name]:.4g}")
                    for base in ("kernel TCP", "raw verbs"):
                        if base in medians:
                            ratio = medians[peer.name] / medians[base]
                            row[f"to {base}"] = float(f"{ratio if more else 1 / ratio:.3g}")
                errors = self.errors.get((peer.name, measure), [])
                if errors or not row["values"]:
                    row["error"] = errors[-1] if errors else "not tried, for rr-64 does not run"
                yield row


def table(rows, head):
    yield from head
    yield ""
    line = "{:<14} {:<15} {:>9} {:<6} {:>8} {:>8}"
    yield line.format("measure", "peer", "median", "unit", "to TCP", "to verbs")
    for row in rows:
        if "median" not in row:
            yield f"{row['measure']:<14} {row['peer']:<15} error: {' '.join(row['error'].split())[:110]}"
            continue
        ratios = [f"{row[key]:.3g}x" if key in row else "-" for key in ("to kernel TCP", "to raw verbs")]
        failed = f"  {len(row['values'])} rounds of it, for one failed" if "error" in row else ""
        yield line.format(row["measure"], row["peer"], f"{row['median']:,.4g}", row["unit"], *ratios) + failed
    yield ""
    yield "rr-64: a round trip of 64 bytes, the median of 4,000."
    yield "Ratios above 1 are better than kernel TCP, or than verbs by themselves."


def main():
    parser = argparse.ArgumentParser(prog="vmlab peers", description="see scripts/vmlab -h")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "runs" / f"{datetime.date.today()}-emulated")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")
    begun = time.monotonic()
    logs = TARGET / "vmlab" / "test-logs" / "peers"
    logs.mkdir(parents=True, exist_ok=True)
    lab = Lab(f"t{os.getpid()}-0", logs)
    on_signals(lab.down)
    peers = Peers(lab, args.rounds)
    try:
        peers.prepare()
        peers.run()
    except Failure as failure:
        print(f"vmlab: peers: {failure}", file=sys.stderr)
        return 1
    finally:
        lab.keep_logs("machine")
        lab.down()
    rows = list(peers.rows())
    accelerator = (TARGET / "vmlab" / "accelerator").read_text().splitlines()[0]
    head = [
        f"{datetime.date.today()}, one emulated machine (QEMU {accelerator}, {os.environ.get('VMLAB_CPUS', '1')} processor), "
        "Debian's kernel, Soft-RoCE over its own loopback",
        f"Median of {args.rounds} rounds, all peers in turn; {time.monotonic() - begun:.0f} s in all; "
        f"vsocket's fabric is {peers.fabric}",
    ]
    lines = list(table(rows, head))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "peers.txt").write_text("\n".join(lines) + "\n")
    with open(args.out / "peers.json", "w", encoding="utf-8") as out:
        rounded = [{**row, "values": [float(f"{v:.4g}") for v in row["values"]]} for row in rows]
        out.write("[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rounded) + "\n]\n")
    print("\n".join(lines))
    return 0 if any(row["peer"] == "vsocket" and "median" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
