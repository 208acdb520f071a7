"""vmlab.py: what scripts/vmlab tests and measures in emulated machines; see scripts/vmlab -h.

Every wait has an end, and a program's end ends with the command that started it, so nothing here can hang or stay behind.
"""

import argparse
import atexit
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

VMLAB = str(Path(__file__).resolve().with_name("vmlab"))
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or Path(__file__).resolve().parents[1] / "target")
ROOT = Path(__file__).resolve().parents[1]
ADDRESS = {"a": "198.51.100.1", "b": "198.51.100.2", "c": "198.51.100.3"}
HOST = {"a": "h1", "b": "h1", "c": "h2"}
MIB = 1 << 20
# What an emulated machine opens in some seconds; it opens 10,000 as well, in some minutes.
CONNECTIONS = int(os.environ.get("VMLAB_CONNECTIONS", "300"))
# Bytes of each of their messages. Long ones fill the rings, which finds other faults than many short ones do.
MESSAGE = int(os.environ.get("VMLAB_MESSAGE", "64"))


class Failure(Exception):
    """A check that did not hold, or a program that did not end well; its text says which."""


def check(holds, text):
    if not holds:
        raise Failure(text)


class Program:
    """A program in a machine, started by a command of scripts/vmlab."""

    def __init__(self, lab, args, log):
        self.what = " ".join(args)
        self.log = log
        with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
            self.child = subprocess.Popen(
                [VMLAB, *args], env=lab.env, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True
            )

    def out(self):
        return Path(f"{self.log}.out").read_text(errors="replace")

    def err(self):
        return Path(f"{self.log}.err").read_text(errors="replace")

    def runs(self):
        return self.child.poll() is None

    def prints(self, text, limit=20):
        wait_until(
            limit,
            lambda: text in self.out() + self.err() or not self.runs(),
            lambda: f"{self.what} does not print '{text}': {self.last()}",
        )
        check(text in self.out() + self.err(), f"{self.what} ended, {self.child.returncode}: {self.last()}")
        return self

    def last(self):
        """The end of what it said, for a message."""
        lines = (self.out().strip() + "\n" + self.err().strip()).strip().splitlines()
        return " | ".join(lines[-3:]) or "no output"

    def end_input(self):
        if self.child.stdin:
            self.child.stdin.close()
            self.child.stdin = None
        return self

    def ok(self, limit=60):
        """Its output, once it has ended well."""
        try:
            status = self.child.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure(f"{self.what}: not within {limit} s: {self.last()}") from None
        check(status == 0, f"{self.what}: exit status {status}: {self.last()}")
        return self.out()

    def report(self, limit=60):
        """The last line of JSON that `stream` printed."""
        lines = [line for line in self.ok(limit).splitlines() if line.startswith("{")]
        check(lines, f"{self.what}: no report: {self.last()}")
        return json.loads(lines[-1])

    def kill(self):
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()
        if self.child.stdin:
            self.child.stdin.close()
            self.child.stdin = None


def test_program(name, to):
    """A test program of ours, built and stripped for a machine; of the workspace, whose release build is there."""
    command = ["cargo", "test", "--release", "--no-run", "-q", "--message-format=json", "--workspace", "--test", name]
    built = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, cwd=ROOT)
    check(built.returncode == 0, f"{' '.join(command)}: {built.stderr[-500:].decode(errors='replace')}")
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    found = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == name]
    check(len(found) == 1, f"{' '.join(command)} made {found}")
    subprocess.run(["strip", "-o", str(to / name), found[0]], check=True)
    return to / name


def wait_until(limit, holds, what):
    """Looks until it holds: what it then is."""
    end = time.monotonic() + limit
    while True:
        found = holds()
        if found:
            return found
        check(time.monotonic() < end, f"not within {limit} s: {what() if callable(what) else what}")
        time.sleep(0.1)


class Lab:
    """A lab of machines of our own, by way of scripts/vmlab."""

    def __init__(self, name, logs):
        self.env = dict(os.environ, LAB=name)
        self.logs = logs
        self.programs = []
        self.count = 0

    def command(self, *args, limit=60, **options):
        try:
            return subprocess.run(
                [VMLAB, *args], env=self.env, capture_output=True, timeout=limit, **{"stdin": subprocess.DEVNULL, **options}
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"{' '.join(args)}: not within {limit} s") from None

    def must(self, *args, limit=60, **options):
        """What a command printed, which has to succeed."""
        done = self.command(*args, limit=limit, **options)
        text = done.stderr.decode(errors="replace").strip()
        check(done.returncode == 0, f"{' '.join(args)}: exit status {done.returncode}: {text[-600:]}")
        return done.stdout.decode(errors="replace")

    def up(self, *options):
        self.must("up", *options, limit=300)

    def down(self):
        self.stop_programs()
        self.command("down", limit=60)

    def keep_logs(self, name):
        done = self.command("logs", limit=60)
        (self.logs / f"{name}.logs").write_bytes(done.stdout + done.stderr)

    def stop_programs(self):
        for program in self.programs:
            program.kill()
        self.programs = []

    def start(self, *args):
        self.count += 1
        command = args[args.index("--") + 1] if "--" in args else args[0]
        program = Program(self, list(args), self.logs / f"{self.count:02}-{args[1]}-{os.path.basename(command)}")
        self.programs.append(program)
        return program

    def run(self, guest, *command, mode="run"):
        return self.start(mode, guest, "--", *command)

    def serve(self, guest, port, *command, mode="run"):
        """A server in a guest that listens."""
        program = self.run(guest, *command, mode=mode)
        wait_until(
            20,
            lambda: not program.runs()
            or self.must("plain", guest, "--", "ss", "-Hltn", f"sport = :{port}").strip(),
            lambda: f"{program.what} does not listen: {program.last()}",
        )
        check(program.runs(), f"{program.what} ended at once: {program.last()}")
        return program

    def json(self, *args):
        return json.loads(self.must(*args))

    def stat(self, guest):
        return self.json("vsocket", guest, "stat", "--json")

    def host_stat(self, host):
        return self.json("vsocketd", host, "stat", "--json")

    def connections(self, guest):
        return self.json("vsocket", guest, "ss", "--json")


class Moved:
    """What the agents of a and c count from now on: the proof of what carried the bytes."""

    def __init__(self, lab):
        self.lab = lab
        self.before = {guest: lab.stat(guest) for guest in ("a", "c")}

    def rose(self, guest):
        now, before = self.lab.stat(guest), self.before[guest]
        bytes_of = lambda stat, lane: stat["bytes"][lane]["tx"] + stat["bytes"][lane]["rx"]
        return {
            "fabric": bytes_of(now, "fabric") - bytes_of(before, "fabric"),
            "tcp": bytes_of(now, "tcp") - bytes_of(before, "tcp"),
            "upgraded": now["connections"]["fabric_total"] - before["connections"]["fabric_total"],
            "declined": now.get("declined", {}),
        }

    def over_fabric(self, least_bytes, least_share=0.7, connections=1):
        """A fast sender puts some megabytes into the kernel's socket before an emulated machine has changed lanes."""
        for guest in ("a", "c"):
            rose = self.rose(guest)
            share = rose["fabric"] / max(1, rose["fabric"] + rose["tcp"])
            check(
                rose["fabric"] >= least_bytes and share >= least_share and rose["upgraded"] >= connections,
                f"not over the fabric, by the agent of {guest}: {rose}, want {connections} connections and {least_bytes} bytes",
            )
        return f"{share:.1%} of {(rose['fabric'] + rose['tcp']) / 1e6:.1f} MB over fabric"


# ---------------------------------------------------------------- scenarios


class Scenarios:
    """Each public method is one; what it returns is shown beside its name."""

    def __init__(self, lab, nic):
        self.lab, self.nic = lab, nic
        # What the daemons say they use.
        self.kind = lab.host_stat("h1")["fabric"]

    def commands_pass_status_and_bytes(self):
        """The lab itself: exit status, input, both outputs, files, and the end of a command."""
        lab = self.lab
        check(lab.command("exec", "h1", "--", "sh", "-c", "exit 7").returncode == 7, "exit status 7 did not come back")
        done = lab.command("plain", "c", "--", "sh", "-c", "cat; echo aside >&2", stdin=None, input=b"in and out")
        check((done.stdout, done.stderr) == (b"in and out", b"aside\n"), f"cat: {done.stdout} {done.stderr}")
        check(lab.must("exec", "h1", "--", "printf", "%s|", "a b", "*", "$x") == "a b|*|$x|", "arguments are changed")
        there = lab.logs / "put"
        there.write_bytes(os.urandom(3 * MIB))
        lab.must("put", "h2", str(there), "/tmp/dir")
        lab.must("get", "h2", "/tmp/dir/put", str(lab.logs / "got"))
        check((lab.logs / "got" / "put").read_bytes() == there.read_bytes(), "a file came back as another")
        there.unlink()
        shutil.rmtree(lab.logs / "got")
        sleeper = lab.start("exec", "h1", "--", "sleep", "4321")
        pid = lambda: lab.command("exec", "h1", "--", "pidof", "sleep").stdout.strip()
        wait_until(10, pid, "sleep runs")
        sleeper.kill()
        wait_until(10, lambda: not pid(), "sleep has ended with the command that started it")
        return ""

    def the_fabric_is_the_one_asked_for(self):
        """Verbs where there is a device, which is named; elsewhere soft, and why."""
        uses = self.lab.host_stat("h1").get("fabric_uses")
        check(self.kind == {"rxe": "verbs", "soft": "soft"}[self.nic], f"{self.kind}: {uses}")
        if self.kind == "verbs":
            check("rxe0" in json.dumps(uses), f"vsocketd stat does not name the device: {uses}")
        else:
            check("device" in json.dumps(uses), f"vsocketd stat does not say why: {uses}")
        return f"{self.kind}, {json.dumps(uses)}"

    def the_contract_holds_on_the_device(self):
        """The fabric's conformance suite, as every fabric passes it, with both ends on one device."""
        if self.kind != "verbs":
            return None
        lab = self.lab
        lab.must("put", "h1", str(test_program("conformance", lab.logs)))
        command = ["env", "VSOCKET_TEST_VERBS=rxe0", "/tmp/conformance", "verbs::", "--test-threads=1"]
        out = lab.start("exec", "h1", "--", *command).ok(90)
        passed = re.search(r"test result: ok\. (\d+) passed; 0 failed; 0 ignored", out)
        check(passed and int(passed[1]) > 20 and "skipped" not in out, f"conformance: {out[-500:]}")
        return f"{passed[1]} cases"

    def integrity_128_mib_each_way(self):
        """Known bytes, both ways at once; each end compares what it gets, and its SHA-256, with what was sent."""
        size = 128 * MIB
        moved = Moved(self.lab)
        server = self.lab.serve("c", 7000, "stream", "serve", "198.51.100.3:7000", "--once")
        client = self.lab.run("a", "stream", "connect", "198.51.100.3:7000", "--bytes", str(size), "--seed", "20261125")
        reports = [client.report(120), server.report(20)]
        for report in reports:
            check((report["sent"], report["received"]) == (size, size), f"{report}")
        speed = 2 * size / reports[0]["seconds"] / 1e6
        return f"{moved.over_fabric(2 * size * 8 // 10, 0.8)}, {speed:.0f} MB/s"

    def redis(self):
        moved = Moved(self.lab)
        address = ["-h", ADDRESS["c"], "-p", "6390"]
        server = "redis-server --bind 198.51.100.3 --port 6390 --appendonly no --protected-mode no --save".split()
        self.lab.serve("c", 6390, *server, "")
        rates = []
        for test in ("set", "get"):
            out = self.lab.run("a", "redis-benchmark", *address, "-t", test, "-c", "10", "-n", "3000", "-d", "64", "--csv").ok()
            rates.append(f"{test} {float(out.splitlines()[-1].split(',')[1].strip(chr(34))):.0f}/s")
        self.lab.run("a", "redis-cli", *address, "config", "get", "port").ok()
        return f"{moved.over_fabric(MIB // 4, connections=20)}, {', '.join(rates)}"

    def iperf3(self):
        moved = Moved(self.lab)
        self.lab.serve("c", 5301, "iperf3", "-s", "-B", ADDRESS["c"], "-p", "5301")
        out = self.lab.run("a", "iperf3", "-c", ADDRESS["c"], "-p", "5301", "-n", "128M", "-J").ok()
        received = json.loads(out)["end"]["sum_received"]
        # It stops counting when the other end says that it has sent all.
        check(received["bytes"] >= 126 * MIB, f"iperf3 received {received['bytes']} bytes")
        return f"{moved.over_fabric(64 * MIB, 0.5)}, {received['bits_per_second'] / 1e6:.0f} Mbit/s"

    def sockperf(self):
        moved = Moved(self.lab)
        self.lab.serve("c", 6401, "sockperf", "server", "--tcp", "-i", ADDRESS["c"], "-p", "6401")
        # Long enough: what goes to and fro before the lane is there, on a kernel TCP that is faster here, is to be a small part.
        options = f"--tcp -i {ADDRESS['c']} -p 6401 --msg-size 64 --time 15 --mps 400000".split()
        out = self.lab.run("a", "sockperf", "ping-pong", *options).ok()
        median = next((line.split("=")[1].strip() for line in out.splitlines() if "percentile 50.0" in line), None)
        check(median, "sockperf printed no median")
        return f"{moved.over_fabric(16 * 1024)}, {median} µs"

    def the_underlay_shows_no_tenant(self):
        """A capture of the wire: with verbs RoCE v2, and no tenant's address in any header of the underlay."""
        options = "-Z root -i eth0 -s 128 -B 65536 -w /tmp/underlay.pcap".split()
        capture = self.lab.start("exec", "h1", "--", "tcpdump", *options)
        capture.prints("listening on")
        moved, device = Moved(self.lab), self._packets("h1")
        server = self.lab.serve("c", 7001, "stream", "serve", "198.51.100.3:7001", "--once")
        size = 16 * MIB
        self.lab.run("a", "stream", "connect", "198.51.100.3:7001", "--bytes", str(size)).report()
        server.report()
        moved.over_fabric(size, 0.5)
        fabric, device = moved.rose("a")["fabric"], self._packets("h1") - device
        # It ends at once and leaves unread what it has not come to: first it shall come to that.
        signal_it = lambda name: self.lab.must("exec", "h1", "--", "sh", "-c", f"kill -{name} $(pidof tcpdump)")
        counts = lambda: signal_it("USR1") or tcpdump_counts(capture.err())
        there = wait_until(10, counts, "tcpdump says how much it has seen")["received"]
        read = lambda: counts()["captured"] + counts()["dropped"]
        wait_until(60, lambda: read() >= there, lambda: f"tcpdump reads on: {counts()}")
        signal_it("INT")
        capture.ok(30)
        dropped = tcpdump_counts(capture.err())["dropped"]
        self.lab.must("get", "h1", "/tmp/underlay.pcap", str(self.lab.logs))
        seen = Underlay((self.lab.logs / "underlay.pcap").read_bytes())
        check(seen.frames > 100, f"only {seen.frames} frames")
        check(not seen.foreign, f"addresses in headers of the underlay: {sorted(seen.foreign)[:5]}")
        if self.kind == "verbs":
            # What was dropped is allowed for by the frame, so that nothing is where the kernel saw nothing dropped.
            most = seen.roce + dropped * seen.longest
            check(most >= fabric, f"{seen.roce} bytes of RoCE v2 for {fabric} of the fabric lane, {dropped} frames dropped")
            check(seen.roce_frames + dropped >= device, f"{seen.roce_frames} frames of RoCE v2, {device} by the device's count")
            check(dropped * 4 < seen.frames, f"{dropped} frames dropped, {seen.frames} seen")
        drops = f", {dropped} frames dropped" if dropped else ""
        return f"{seen.frames} frames, {seen.roce / 1e6:.1f} MB of RoCE v2, {seen.vxlan / 1e6:.1f} MB of VXLAN{drops}"

    def _packets(self, host):
        """What a host's device has sent and received."""
        if self.nic == "soft":
            return 0
        counters = "/sys/class/infiniband/rxe0/ports/1/hw_counters"
        counts = self.lab.must("exec", host, "--", "cat", f"{counters}/sent_pkts", f"{counters}/rcvd_pkts")
        return sum(map(int, counts.split()))

    def a_capture_reads_as_vxlan(self):
        """`vsocketd capture` of a large and a small stream, read by tshark here: what went by WRITE is in it as well."""
        tool = self.lab.start("vsocketd", "h1", "capture", "--vport", "a", "-w", "/tmp/fabric.pcap", "--bytes", "1G")
        tool.prints("capturing on")
        moved = Moved(self.lab)
        servers = [self.lab.serve("c", port, "stream", "serve", f"198.51.100.3:{port}", "--once") for port in (40001, 40002)]
        clients = [
            self.lab.run("a", "stream", "connect", "198.51.100.3:40001", "--until-eof", "--pace", "4000000"),
            self.lab.run("a", "stream", "echo", "198.51.100.3:40002", "--until-eof", "--size", "200", "--every", "1"),
        ]
        # Until enough of each went by the lane, however long a slow machine takes to bring it there.
        least = {"198.51.100.3:40001": 4 * MIB, "198.51.100.3:40002": 200 * 200}
        by_lane = lambda: {line["peer"]: sum(line["bytes"]["fabric"].values()) for line in self.lab.connections("a")}
        enough = lambda there: all(there.get(peer, 0) >= bytes for peer, bytes in least.items())
        wait_until(60, lambda: enough(by_lane()), lambda: f"bytes by the lane: {by_lane()}")
        for client in clients:
            client.end_input()
        for program in clients + servers:
            program.report()
        end = "for p in $(pidof vsocketd); do ! grep -q capture /proc/$p/cmdline || kill -INT $p; done"
        self.lab.must("exec", "h1", "--", "sh", "-c", end)
        tool.ok(20)
        check("dropped: none" in tool.err(), f"the capture is not whole: {tool.last()}")
        self.lab.must("get", "h1", "/tmp/fabric.pcap", str(self.lab.logs))
        ways = Inner(self.lab.logs / "fabric.pcap").ways
        bytes_of = lambda port: sum(way.bytes for ports, way in ways.items() if str(port) in ports)
        check(len(ways) == 4, f"two connections, both ways: {sorted(ways)}")
        # A busy machine puts much of it on kernel TCP; what the agent has seen go by the lane is all here.
        fabric, seen = moved.rose("a")["fabric"], [bytes_of(port) for port in (40001, 40002)]
        check(seen[0] >= 4 * MIB and seen[1] >= 200 * 200, f"bytes of the large and the small one: {seen}")
        # What still lay in a ring when its sender left went over TCP again: a ring at most, for each of four directions.
        check(sum(seen) >= fabric - MIB, f"{seen} bytes captured, {fabric} by the lane")
        longest = max(way.longest for way in ways.values())
        if self.kind == "verbs":
            check(longest > 4096, f"no segment that went by WRITE: the longest has {longest} bytes")
        return f"{sum(way.packets for way in ways.values())} packets, up to {longest} bytes of payload, {sum(seen) / 1e6:.1f} MB"

    def many_connections_few_queue_pairs(self):
        """CONNECTIONS at once on the lane: at most 8 queue pairs per VNI and one registration per region."""
        lab = self.lab
        for host in ("h1", "h2"):
            # Small rings, and as many as it takes: the machines have little memory.
            edit = f"/^addresses/a max_connections = {CONNECTIONS + 100}\\nring_bytes = 16384"
            lab.must("exec", host, "--", "sed", "-i", edit, f"/run/vsocket-lab/vs/{host}.toml")
            lab.must("stop", "backend", host)
        for host in ("h1", "h2"):
            lab.must("start", "backend", host)
        wait_until(20, lambda: all(p["up"] for p in lab.host_stat("h1")["peers"]), "the backends are peers again")
        idle = self._held("h1")
        limit = 20 + CONNECTIONS // 10
        lab.serve("c", 7003, *self._crowd("serve 198.51.100.3:7003"))
        clients = lab.run("a", *self._crowd(f"hold 198.51.100.3:7003 {CONNECTIONS} --message {MESSAGE}"))
        clients.prints(f"open {CONNECTIONS}", limit)
        on_lane = lambda: lab.host_stat("h1")["lanes"]["fabric"]
        try:
            # One that fell silent before its other end was open is taken up when it next speaks.
            most = wait_until(20, lambda: on_lane() >= CONNECTIONS * 99 // 100 and on_lane(), "")
        except Failure:
            raise Failure(f"{on_lane()} of {CONNECTIONS} connections on the lane: {lab.host_stat('h1')}") from None
        busy, slabs = self._held("h1"), lab.host_stat("h1")["slabs"]
        clients.end_input().ok(limit)
        if self.kind == "verbs":
            check(busy["qp"] <= 2 * 8, f"{busy} for 2 VNIs")
            # Besides the slabs, a queue pair's own places to send from and to receive in.
            check(busy["mr"] <= slabs + 2 * busy["qp"], f"registrations: {idle} without connections, {busy} with {slabs} slabs")
            return f"{most} on the lane: {busy['qp']} queue pairs, {busy['mr']} registrations, {slabs} slabs"
        return f"{most} on the lane: {slabs} slabs"

    @staticmethod
    def _crowd(words):
        """`crowd` with room for a socket and its share of a slab's doorbells for each connection."""
        return "sh", "-c", f"ulimit -n {3 * CONNECTIONS + 4096} && exec crowd {words}"

    def _held(self, host):
        """What the kernel says a host's daemon holds of the device."""
        if self.nic == "soft":
            return {}
        held = {}
        for kind in ("qp", "mr"):
            lines = self.lab.json("exec", host, "--", "rdma", "-j", "resource", "show", kind)
            held[kind] = sum(line.get("comm") == "vsocketd" for line in lines)
        return held

    def a_device_that_goes_and_comes(self):
        """`rdma link delete` under load: on over tcp, nothing lost; `rdma link add`: back on the lane."""
        if self.nic == "soft":
            return None
        lab = self.lab
        server = lab.serve("c", 7002, "stream", "serve", "198.51.100.3:7002", "--once", "--pace", "2000000")
        client = lab.run(
            "a", "stream", "connect", "198.51.100.3:7002", "--until-eof", "--pace", "2000000", "--report", "/tmp/sent"
        )
        here = lambda: [line for line in lab.connections("a") if line["peer"] == "198.51.100.3:7002"]
        lanes = lambda: [(line["tx_lane"], line["rx_lane"], line["reason"]) for line in here()]
        on = lambda lane: any(found[:2] == (lane, lane) for found in lanes())
        wait_until(20, lambda: on("fabric"), lambda: f"on the lane: {lanes()}")
        if self.kind == "verbs":
            lab.must("exec", "h1", "--", "rdma", "link", "delete", "rxe0")
            wait_until(30, lambda: on("tcp"), lambda: f"on tcp without the device: {lanes()}")
            reason = lanes()[0][2]
            sent = lambda: int.from_bytes(lab.command("exec", "h1", "--", "cat", "/tmp/sent").stdout, "little")
            then = sent()
            wait_until(20, lambda: sent() > then + MIB, "it goes on over tcp")
            lab.must("exec", "h1", "--", "rdma", "link", "add", "rxe0", "type", "rxe", "netdev", "eth0")
            wait_until(45, lambda: on("fabric"), lambda: f"back on the lane: {lanes()}")
        else:
            reason = f"not taken away, for the fabric is {self.kind}"
        client.end_input()
        reports = [client.report(30), server.report(30)]
        check(reports[0]["sent"] == reports[1]["received"], f"bytes were lost: {reports}")
        check(reports[1]["sent"] == reports[0]["received"], f"bytes were lost: {reports}")
        return f"{(reports[0]['sent'] + reports[0]['received']) / 1e6:.1f} MB whole, on tcp: {reason}"


class Underlay:
    """A capture's frames, as far as headers of the underlay go."""

    def __init__(self, data):
        little = struct.unpack_from("<I", data)[0] in (0xA1B2C3D4, 0xA1B23C4D)
        self.frames = self.roce = self.roce_frames = self.vxlan = self.longest = 0
        self.foreign = set()
        at = 24
        while at + 16 <= len(data):
            kept, length = struct.unpack_from("<8xII" if little else ">8xII", data, at)
            self.frame(data[at + 16 : at + 16 + kept], length)
            at += 16 + kept

    def frame(self, frame, length):
        self.frames += 1
        self.longest = max(self.longest, length)
        kind = struct.unpack_from(">H", frame, 12)[0] if len(frame) >= 34 else 0
        if kind == 0x0800:
            addresses = frame[26:30], frame[30:34]
            transport = frame[14 + 4 * (frame[14] & 15) :]
            if frame[23] == 17 and len(transport) >= 8:
                port = struct.unpack_from(">H", transport, 2)[0]
                self.roce += length * (port == 4791)
                self.roce_frames += port == 4791
                self.vxlan += length * (port == 4789)
        elif kind == 0x0806:
            addresses = frame[28:32], frame[38:42]
        elif kind == 0x86DD and len(frame) >= 54:
            for address in (frame[22:38], frame[38:54]):
                if address[:2] not in (b"\xfe\x80", b"\xff\x02") and address != bytes(16):
                    self.foreign.add(address.hex(":"))
            return
        else:
            return
        for address in addresses:
            text = ".".join(map(str, address))
            if not text.startswith(("192.0.2.", "224.", "0.0.0.0", "255.")):
                self.foreign.add(text)


def tcpdump_counts(text):
    """What tcpdump has last said of its packets; None before it has said all of that."""
    kinds = {"captured": "captured", "received": "received by filter", "dropped": "dropped by kernel"}
    found = {kind: re.findall(rf"(\d+) packets? {words}", text) for kind, words in kinds.items()}
    return {kind: int(numbers[-1]) for kind, numbers in found.items()} if all(found.values()) else None


class Way:
    """One direction of a connection inside a capture."""

    def __init__(self):
        self.packets = self.bytes = self.longest = 0
        self.next = None


class Inner:
    """A capture of `vsocketd`, as tshark reads it: each packet is looked at, and that sequence numbers go on."""

    FIELDS = "frame.protocols vxlan.vni udp.dstport ip.src tcp.srcport tcp.dstport tcp.seq_raw tcp.len tcp.flags".split()
    JUDGED = "ip.checksum.status tcp.checksum.status _ws.malformed".split()

    def __init__(self, file):
        self.ways = {}
        for packet in self.read(file):
            self.packet(dict(zip(self.FIELDS + self.JUDGED, packet)))

    def read(self, file):
        check(shutil.which("tshark"), "tshark is missing: scripts/setup --test")
        # What the tenants say inside TCP is not looked at.
        command = ["tshark", "-n", "-r", str(file), "-d", "tcp.port==1-65535,data", "-T", "fields", "-E", "separator=/t"]
        for protocol in ("ip", "tcp", "udp"):
            command += ["-o", f"{protocol}.check_checksum:TRUE"]
        for field in self.FIELDS + self.JUDGED:
            command += ["-e", field]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        check(done.returncode == 0, f"tshark: {done.stderr[-300:]}")
        return [line.split("\t") for line in done.stdout.splitlines()]

    def packet(self, p):
        layers = p["frame.protocols"].removesuffix(":data")
        check(layers == "eth:ethertype:ip:udp:vxlan:eth:ethertype:ip:tcp", f"{p}")
        check((p["vxlan.vni"], p["udp.dstport"], p["_ws.malformed"]) == ("100", "4789", ""), f"{p}")
        check(set(p["ip.checksum.status"].split(",")) == {"1"} and p["tcp.checksum.status"] == "1", f"{p}")
        outer, inner = p["ip.src"].split(",")
        check({"198.51.100.1": "192.0.2.1", "198.51.100.3": "192.0.2.2"}.get(inner) == outer, f"{p}")
        way = self.ways.setdefault((p["tcp.srcport"], p["tcp.dstport"]), Way())
        seq, length, flags = int(p["tcp.seq_raw"]), int(p["tcp.len"]), int(p["tcp.flags"], 16)
        if flags & 2:
            way.next = seq
        if (seq, length) == (0, 0) and not flags & 2:
            # Of a stay that is still to begin; the one before was cut off, if it has not ended.
            way.next = None
        if way.next is None:
            check(length == 0, f"bytes outside a stay: {p}")
            return
        check(seq == way.next, f"sequence numbers go on, {way.next} is next: {p}")
        way.next = None if flags & 1 else (seq + length + (flags >> 1 & 1)) % (1 << 32)
        way.packets, way.bytes, way.longest = way.packets + 1, way.bytes + length, max(way.longest, length)


SUITES = {
    # What is run in a lab of these options, in this order.
    "verbs": [
        (["--nic", "rxe"], None),
        (
            ["--nic", "soft"],
            ["the_fabric_is_the_one_asked_for", "integrity_128_mib_each_way", "many_connections_few_queue_pairs"],
        ),
    ],
}


class Test:
    """Scenarios in turn, each with a line."""

    def __init__(self, logs):
        self.logs = logs
        self.passed = self.failed = 0
        self.lab = None
        self.stopped = False

    def suite(self, name, wanted, nics):
        for number, (options, some) in enumerate(SUITES[name]):
            if nics and options[1] not in nics:
                continue
            self.one_lab(f"t{os.getpid()}-{number}", options, some, wanted)

    def one_lab(self, name, options, some, wanted):
        nic = options[1]
        logs = self.logs / nic
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        self.lab = lab = Lab(name, logs)
        begun = time.monotonic()
        try:
            lab.up("--hosts", *options)
            scenarios = Scenarios(lab, nic)
        except Failure as failure:
            self.line(nic, "up", begun, failure)
            lab.down()
            return
        self.line(nic, "up", begun, None)
        names = some or [n for n in vars(Scenarios) if not n.startswith("_")]
        for scenario in names:
            if wanted and not any(word in scenario for word in wanted):
                continue
            self.one(nic, scenarios, scenario)
        lab.down()
        self.lab = None

    def one(self, nic, scenarios, scenario):
        begun = time.monotonic()
        try:
            said = getattr(scenarios, scenario)()
        except (Failure, ValueError, KeyError, OSError) as failure:
            self.line(nic, scenario, begun, failure if isinstance(failure, Failure) else Failure(repr(failure)))
            self.lab.keep_logs(scenario)
        else:
            if said is not None:
                self.line(nic, scenario, begun, None, said)
        self.lab.stop_programs()

    def line(self, nic, scenario, begun, failure, said=""):
        took = time.monotonic() - begun
        text = scenario.replace("_", " ")
        if failure:
            self.failed += 1
            print(f"FAIL {nic}: {text}, {took:.0f} s\n     {failure}", flush=True)
            print(f"     logs are in {self.logs / nic}", flush=True)
        else:
            self.passed += 1
            print(f"ok   {nic}: {text}, {took:.0f} s{': ' if said else ''}{said}", flush=True)


def clear_away():
    """Labs of tests that were killed; the name of one begins with the number of its process."""
    for state in (TARGET / "vmlab" / "labs").glob("t[0-9]*-[0-9]*"):
        pid = state.name[1:].split("-")[0]
        if not Path(f"/proc/{pid}").exists():
            Lab(state.name, None).down()


def on_signals(end):
    def handle(signum, _frame):
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, handle)
    atexit.register(end)


def main():
    parser = argparse.ArgumentParser(prog="vmlab", description="see scripts/vmlab -h")
    parser.add_argument("--nic", action="append", choices=["rxe", "soft"])
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("scenario", nargs="*")
    args = parser.parse_intermixed_args()
    sys.stdout.reconfigure(errors="replace")
    test = Test(TARGET / "vmlab" / "test-logs" / args.suite)
    on_signals(lambda: test.lab and test.lab.down())
    clear_away()
    test.suite(args.suite, args.scenario, args.nic)
    print(f"{test.passed} passed, {test.failed} failed")
    return 0 if test.passed and not test.failed else 1


if __name__ == "__main__":
    sys.exit(main())
