"""vmguests.py: guests that are virtual machines, with a stock QEMU and a stock kernel; scripts/vmlab test vm.

Two machines on host h1, vm1 and vm2, one on h2, vm3, which is booted when it is needed, and the containers of scripts/lab beside
them. Each scenario proves by counters that bytes went by a lane, and where.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from vmlab import TARGET, Failure, Lab, check, clear_away, on_signals, wait_until
from vmqmp import Qmp

MIB = 1 << 20
ADDRESS = {"a": "198.51.100.1", "vm1": "198.51.100.11", "vm2": "198.51.100.12", "vm3": "198.51.100.13"}
NESTED = "198.51.100.21"
HOST = {"a": "h1", "vm1": "h1", "vm2": "h1", "vm3": "h2"}
BIN = Path(os.environ.get("VSOCKET_BIN") or TARGET / "release")
SOCKET, TOKEN, PORT = "/run/vsocket/agent.sock", "/run/vsocket/keeper.token", "7650"
# Of each comparison: plain and accelerated runs, in turn.
ROUNDS = int(os.environ.get("VMLAB_ROUNDS", "3"))
# Of the canaries: who is killed in turn, so many times.
DEATHS = int(os.environ.get("VMLAB_DEATHS", "1"))
EMULATED = "The processor is emulated (QEMU's tcg): ratios of what the same machine does, no figures of a product."


class Guests(Lab):
    """A lab of guests; `plain`: without agents, everything over kernel TCP."""

    def __init__(self, name, logs, plain):
        super().__init__(name, logs)
        # Programs of ours in containers, too.
        self.env["PATH"] = f"{BIN / 'examples'}:{self.env['PATH']}"
        self.plain, self.mode = plain, "plain" if plain else "run"
        self.state = TARGET / "vmlab" / "labs" / name
        self.sockets = Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "vsocket-lab" / name
        self.ports = itertools.count(7000)

    def run(self, guest, *command, mode=None):
        return super().run(guest, *map(str, command), mode=mode or self.mode)

    def serve(self, guest, port, *command, mode=None):
        return super().serve(guest, port, *map(str, command), mode=mode or self.mode)

    def inside(self, guest, *command, limit=60):
        """What a command in a guest printed, which has nothing to do with vsocket."""
        return self.must("plain", guest, "--", *map(str, command), limit=limit)

    def shell(self, guest, script, limit=60):
        return self.inside(guest, "sh", "-c", script, limit=limit)

    def qmp(self, machine):
        return Qmp(self.state / f"{machine}.qmp")

    def pid(self, name):
        return int((self.state / f"{name}.pid").read_text().split()[0])

    def runs(self, machine):
        machines = {one["name"]: one["state"] for one in self.json("status", "--json")["machines"]}
        return machines[machine] == "running"

    def vport(self, name):
        return next(vport for vport in self.host_stat(HOST[name])["vports"] if vport["name"] == name)

    def need(self, *machines):
        """These machines run, and have an agent that has a daemon."""
        for machine in machines:
            if not self.runs(machine):
                self.must("boot", machine, limit=120)
        if not self.plain:
            for machine in machines:
                self.has_agent(machine)

    def has_agent(self, machine, limit=30):
        connected = lambda: self.command("vsocket", machine, "stat", "--json").stdout.find(b'"connected":true') >= 0
        wait_until(limit, connected, lambda: f"{machine} has no agent, or that no daemon: {self.vport(machine)}")

    def redis(self, guest, port, mode=None):
        options = f"--bind {ADDRESS[guest]} --port {port} --appendonly no --protected-mode no --save".split()
        return self.serve(guest, port, "redis-server", *options, "", mode=mode)


class Proof:
    """What agents count from now on: the proof of what carried the bytes."""

    def __init__(self, lab, *guests):
        self.lab, self.guests = lab, guests
        self.before = {} if lab.plain else {guest: self.count(guest) for guest in guests}

    def count(self, guest):
        stat = self.lab.stat(guest)
        moved = {lane: count["tx"] + count["rx"] for lane, count in stat["bytes"].items()}
        tcp = moved.pop("tcp")
        return sum(moved.values()), tcp, {"declined": stat["declined"], "drops": stat["drops"]}

    def holds(self, least_bytes, least_share=0.7):
        """At least so many bytes, and such a share, went by a lane, by the agent of each guest."""
        if self.lab.plain:
            return "plain"
        share = 1.0
        for guest in self.guests:
            lane, tcp, why = self.count(guest)
            lane, tcp = lane - self.before[guest][0], tcp - self.before[guest][1]
            share = min(share, lane / max(1, lane + tcp))
            check(
                lane >= least_bytes and share >= least_share,
                f"{lane} bytes of {guest} on a lane, {tcp} on tcp; want {least_bytes} and {least_share:.0%}: {why}",
            )
        return f"{share:.1%} on a lane"


class Traffic:
    """A stream each way between two guests, until it is ended; every byte is checked by the programs."""

    def __init__(self, lab, client, server, pace=2_000_000):
        self.lab, self.guest, port = lab, client, next(lab.ports)
        self.peer, at = f"{ADDRESS[server]}:{port}", ADDRESS[server]
        options = ["--pace", pace] if pace else []
        self.server = lab.serve(server, port, "stream", "serve", f"{at}:{port}", "--once", *options)
        self.sent_file = f"/tmp/sent-{port}" if client.startswith("vm") else str(lab.logs / f"sent-{port}")
        options += ["--until-eof", "--report", self.sent_file]
        self.client = lab.run(client, "stream", "connect", self.peer, *options)

    def lanes(self):
        here = [line for line in self.lab.connections(self.guest) if line["peer"] == self.peer]
        return [(line["tx_lane"], line["rx_lane"], line["reason"]) for line in here]

    def on(self, lane, limit=30):
        """Both directions are on tcp, or both on another lane."""
        if not self.lab.plain:
            same = lambda found: (found == "tcp") == (lane == "tcp")
            both = lambda: any(same(tx) and same(rx) for tx, rx, _ in self.lanes())
            wait_until(limit, both, lambda: f"{self.guest} to {self.peer} on {lane}: {self.lanes()}, {self.client.last()}")
        return self

    def reason(self):
        return "plain" if self.lab.plain else self.lanes()[0][2]

    def sent(self):
        return int.from_bytes(self.lab.command("plain", self.guest, "--", "cat", self.sent_file).stdout, "little")

    def goes_on(self, bytes_more=MIB, limit=30):
        then = self.sent()
        more = lambda: self.sent() >= then + bytes_more
        wait_until(limit, more, lambda: f"{self.guest} to {self.peer} stands still: {self.client.last()}, {self.server.last()}")
        return self

    def whole(self):
        self.client.end_input()
        reports = [self.client.report(60), self.server.report(60)]
        check(reports[0]["sent"] == reports[1]["received"], f"bytes were lost: {reports}")
        check(reports[1]["sent"] == reports[0]["received"], f"bytes were lost: {reports}")
        return f"{(reports[0]['sent'] + reports[0]['received']) / 1e6:.1f} MB whole"


# ---------------------------------------------------------------- what is compared


def redis_rate(out):
    return float(out.splitlines()[-1].split(",")[1].strip('"')) / 1000


def sockperf_median(out):
    return float(next(line.split("=")[1] for line in out.splitlines() if "percentile 50.0" in line))


def iperf3_rate(out):
    return json.loads(out)["end"]["sum_received"]["bits_per_second"] / 1e6


# Name, unit, whether less is better, server and client, what the client's output says, least share of bytes on a lane.
WORKLOADS = [
    ("redis-get-c10", "k req/s", False, "redis", "redis-benchmark -h {at} -p {port} -t get -c 10 -n 10000 --csv", redis_rate, 0.7),
    ("redis-get-c1", "k req/s", False, "redis", "redis-benchmark -h {at} -p {port} -t get -c 1 -n 1500 --csv", redis_rate, 0.7),
    ("iperf3-1", "Mbit/s", False, "iperf3 -s -B {at} -p {port}", "iperf3 -c {at} -p {port} -t 2 -J", iperf3_rate, 0.5),
    (
        "sockperf-pingpong",
        "µs",
        True,
        "sockperf server --tcp -i {at} -p {port}",
        "sockperf ping-pong --tcp -i {at} -p {port} --msg-size 64 --time 1 --mps 400000",
        sockperf_median,
        0.7,
    ),
]


class Table:
    """Medians of all comparisons."""

    def __init__(self):
        self.rows = []

    def row(self, path, name, unit, less, plain, fast):
        old, new = statistics.median(plain), statistics.median(fast)
        ratio = old / new if less else new / old
        self.rows.append((path, name, unit, old, new, ratio))
        return f"{name} {ratio:.2f}x"

    def show(self):
        if not self.rows:
            return
        print(f"\n{'path':<12} {'workload':<18} {'virtio-net TCP':>14} {'vsocket':>10} {'unit':<8} {'ratio':>6}")
        for path, name, unit, old, new, ratio in self.rows:
            print(f"{path:<12} {name:<18} {old:>14.4g} {new:>10.4g} {unit:<8} {ratio:>5.2f}x")
        twice = [f"{name} {path}" for path, name, *_, ratio in self.rows if ratio >= 2]
        print(f"{EMULATED}\nTwice as fast or more: {', '.join(twice) or 'none'}\n", flush=True)


# ---------------------------------------------------------------- scenarios


class Scenarios:
    """Each public method is one; what it returns is shown beside its name."""

    def __init__(self, lab):
        self.lab, self.table = lab, Table()

    def _integrity(self, client, server, size=64 * MIB, share=0.8):
        """Known bytes, both ways at once; each end compares what it gets, and its SHA-256, with what was sent."""
        lab, port = self.lab, next(self.lab.ports)
        proof = Proof(lab, client, server)
        there = lab.serve(server, port, "stream", "serve", f"{ADDRESS[server]}:{port}", "--once")
        here = lab.run(client, "stream", "connect", f"{ADDRESS[server]}:{port}", "--bytes", size, "--seed", port)
        reports = [here.report(120), there.report(20)]
        for report in reports:
            check((report["sent"], report["received"]) == (size, size), f"{report}")
        return f"{proof.holds(2 * size * share, share)}, {2 * size / reports[0]['seconds'] / 1e6:.0f} MB/s"

    def integrity_of_two_machines_on_one_host(self):
        self.lab.need("vm1", "vm2")
        return self._integrity("vm1", "vm2")

    def integrity_of_a_machine_and_a_container(self):
        self.lab.need("vm1")
        return f"{self._integrity('a', 'vm1', 32 * MIB)}; {self._integrity('vm1', 'a', 32 * MIB)}"

    def redis_of_a_machine_and_a_container(self):
        lab = self.lab
        lab.need("vm1")
        said = []
        for client, server in (("a", "vm1"), ("vm1", "a")):
            port = next(lab.ports)
            proof = Proof(lab, client, server)
            lab.redis(server, port)
            options = f"-h {ADDRESS[server]} -p {port} -t set,get -c 10 -n 3000 -d 64 --csv".split()
            out = lab.run(client, "redis-benchmark", *options).ok()
            said.append(f"{client} to {server} {redis_rate(out):.1f} k/s, {proof.holds(MIB // 4)}")
        return "; ".join(said)

    def a_container_in_a_machine(self):
        """Namespaces of network, mounts and processes; of the machine's files in /run it sees the agent's socket alone."""
        lab, port = self.lab, next(self.lab.ports)
        lab.need("vm1", "vm2")
        self._nested()
        proof = Proof(lab, "vm1", "vm2")
        lab.redis("vm2", port)
        run = [] if lab.plain else ["vsocket", "run", "--agent", SOCKET, "--"]
        at = ["-h", ADDRESS["vm2"], "-p", str(port)]
        check(self._in_container(*run, "redis-cli", *at, "set", "from", "a container").strip() == "OK", "redis-cli")
        out = self._in_container(*run, "redis-benchmark", *at, "-t", "get", "-c", "5", "-n", "3000", "--csv")
        return f"{redis_rate(out):.1f} k/s, {proof.holds(100_000)}"

    def _nested(self):
        self.lab.shell(
            "vm1",
            f"""[ ! -e /run/netns/inner ] || exit 0
            ip netns add inner
            ip link add link eth0 name inner0 mtu 8950 netns inner type macvlan mode bridge
            ip -n inner addr add {NESTED}/24 dev inner0
            ip -n inner link set lo up
            ip -n inner link set inner0 up""",
        )

    def _in_container(self, *command, limit=60):
        script = f"""mkdir -p /tmp/box && mount -t tmpfs box /tmp/box
            if [ -e {SOCKET} ]; then : >/tmp/box/agent.sock && mount --bind {SOCKET} /tmp/box/agent.sock; fi
            mount -t tmpfs run /run && mkdir /run/vsocket
            if [ -e /tmp/box/agent.sock ]; then : >{SOCKET} && mount --bind /tmp/box/agent.sock {SOCKET}; fi
            exec "$@" """
        inside = ["ip", "netns", "exec", "inner", "unshare", "-m", "-p", "-f", "sh", "-c", script, "-"]
        return self.lab.inside("vm1", *inside, *command, limit=limit)

    def compared_on_one_host(self):
        self.lab.need("vm1", "vm2")
        return self._compared("same host", "vm1", "vm2")

    def integrity_across_hosts(self):
        self.lab.need("vm1", "vm3")
        return self._integrity("vm1", "vm3")

    def compared_across_hosts(self):
        self.lab.need("vm1", "vm3")
        return self._compared("across hosts", "vm1", "vm3")

    def _compared(self, path, client, server):
        lab, at, said = self.lab, ADDRESS[server], []
        for name, unit, less, serve, command, value, share in WORKLOADS:
            figures, port = {}, {}
            for mode in ("plain", lab.mode):
                port[mode] = next(lab.ports)
                if serve == "redis":
                    lab.redis(server, port[mode], mode=mode)
                else:
                    lab.serve(server, port[mode], *serve.format(at=at, port=port[mode]).split(), mode=mode)
            # Agents count only what is accelerated.
            proof = Proof(lab, client, server)
            for mode in ["plain", lab.mode] * ROUNDS:
                out = lab.run(client, *command.format(at=at, port=port[mode]).split(), mode=mode).ok()
                figures.setdefault(mode, []).append(value(out))
            held = proof.holds(16 << 10, share)
            row = self.table.row(path, name, unit, less, figures["plain"], figures[lab.mode])
            said.append(f"{row} ({held})")
            lab.stop_programs()
        return ", ".join(said)

    # ---------------------------------------------------------------- deaths

    def the_backend_is_killed_and_comes_back(self):
        """Programs in machines go on over tcp, lose nothing, and return to the lane; nothing in them is touched."""
        lab = self.lab
        lab.need("vm1", "vm2")
        flows = [Traffic(lab, "vm1", "vm2"), Traffic(lab, "vm2", "a")]
        for flow in flows:
            flow.on("lane")
        lab.must("kill", "backend", "h1")
        for flow in flows:
            flow.on("tcp").goes_on()
        reasons = [flow.reason() for flow in flows]
        lab.must("start", "backend", "h1")
        for flow in flows:
            flow.on("lane", 45).goes_on()
        return f"{'; '.join(flow.whole() for flow in flows)}, on tcp: {', '.join(reasons)}"

    def the_agent_is_killed_and_comes_back(self):
        lab = self.lab
        lab.need("vm1", "vm2")
        flow, other = Traffic(lab, "vm2", "vm1"), Traffic(lab, "vm2", "a")
        flow.on("lane"), other.on("lane")
        self._kill_agent("vm1")
        flow.goes_on()
        other.on("lane").goes_on()
        said = [flow.whole(), other.whole()]
        return f"{'; '.join(said)}; {self._integrity('vm2', 'vm1', 16 * MIB, 0.5)}"

    def _kill_agent(self, machine):
        """The agent; its keeper starts another, or it is started with its keeper, as by systemd."""
        lab = self.lab
        if lab.plain:
            return
        before = lab.must("state", "agent", machine).strip()
        lab.must("kill", "agent", machine)
        time.sleep(1)
        now = lab.command("state", "agent", machine).stdout.decode().strip()
        if now in ("", before):
            lab.must("start", "agent", machine)
        lab.has_agent(machine)

    def qemu_stops_and_continues(self):
        lab = self.lab
        lab.need("vm1", "vm2")
        flow, other = Traffic(lab, "vm2", "vm1"), Traffic(lab, "vm2", "a")
        flow.on("lane"), other.on("lane")
        for pause in (0.5, 3):
            lab.must("pause", "machine", "vm1")
            time.sleep(pause)
            other.on("lane").goes_on()
            lab.must("cont", "machine", "vm1")
            flow.goes_on()
        flow.on("lane")
        return f"{flow.whole()}; {other.whole()}"

    def a_machine_is_reset(self):
        lab = self.lab
        lab.need("vm1", "vm2")
        flow, other = Traffic(lab, "vm2", "vm1"), Traffic(lab, "vm2", "a")
        flow.on("lane"), other.on("lane")
        qmp = lab.qmp("vm1")
        qmp.do("set-action", reboot="reset")
        qmp.do("system_reset")
        other.on("lane").goes_on()
        def answers():
            try:
                return lab.command("plain", "vm1", "--", "true", limit=5).returncode == 0
            except Failure:
                return False

        time.sleep(2)
        # A reset machine under emulation may crawl: 10 to 80 s were seen.
        wait_until(200, answers, "the machine does not answer")
        flow.client.kill(), flow.server.kill()
        lab.need("vm1")
        return f"{other.whole()}; {self._integrity('vm2', 'vm1', 16 * MIB, 0.5)}"

    def qemu_is_killed(self):
        lab = self.lab
        lab.need("vm1", "vm2")
        flow, other = Traffic(lab, "vm2", "vm1"), Traffic(lab, "vm2", "a")
        flow.on("lane"), other.on("lane")
        lab.must("kill", "machine", "vm1")
        other.on("lane").goes_on()
        self._nothing_left("vm1")
        flow.client.kill(), flow.server.kill()
        lab.need("vm1")
        return f"{other.whole()}; {self._integrity('vm2', 'vm1', 16 * MIB, 0.5)}"

    def _nothing_left(self, machine):
        """The host has nothing of a machine that is gone."""
        def left():
            vport = self.lab.vport(machine)
            return vport["agent"] or vport["connections"] or (vport["machine"] or {}).get("memory_bytes")

        wait_until(20, lambda: not left(), lambda: f"left of {machine}: {self.lab.vport(machine)}")

    def the_front_is_killed_and_the_device_replugged(self):
        lab = self.lab
        lab.need("vm1", "vm2")
        flow, other = Traffic(lab, "vm2", "vm1"), Traffic(lab, "vm2", "a")
        flow.on("lane"), other.on("lane")
        lab.must("kill", "front", "vm1")
        flow.on("tcp").goes_on()
        self._nothing_left("vm1")
        other.on("lane").goes_on()
        lab.must("start", "front", "vm1")
        qmp = lab.qmp("vm1")
        self._unplug(qmp)
        self._plug(qmp, "vm1")
        flow.on("lane", 60).goes_on()
        return f"{flow.whole()}; {other.whole()}"

    @staticmethod
    def _unplug(qmp):
        qmp.do("device_del", id="vsock")
        qmp.event("DEVICE_DELETED")
        qmp.do("chardev-remove", id="front")

    def _plug(self, qmp, machine):
        address = {"type": "unix", "data": {"path": str(self.lab.sockets / f"{machine}.front")}}
        qmp.do("chardev-add", id="front", backend={"type": "socket", "data": {"addr": address, "server": False}})
        qmp.do("device_add", driver="vhost-user-vsock-pci", id="vsock", chardev="front", bus="port1")

    def a_live_redis_connection_survives_a_snapshot(self):
        """Drain, take the device out, migrate to a file, end QEMU; another QEMU and another front go on with it."""
        lab, port = self.lab, next(self.lab.ports)
        lab.need("vm1", "vm2")
        lab.redis("vm2", port)
        run = "" if lab.plain else f"vsocket run --agent {SOCKET} --"
        # A session of its own, for who started it will not see the new QEMU.
        lab.shell(
            "vm1",
            f"""setsid sh -c 'while :; do echo CLIENT ID; echo INCR counter; sleep 0.05; done |
                {run} redis-cli -h {ADDRESS['vm2']} -p {port} >/tmp/counts 2>&1' </dev/null >/dev/null 2>&1 &""",
        )
        peer = f"{ADDRESS['vm2']}:{port}"
        lanes = lambda: [line["tx_lane"] for line in lab.connections("vm1") if line["peer"] == peer]
        on = lambda lane: any((found == "tcp") == (lane == "tcp") for found in lanes())
        count = lambda: int((lab.inside("vm1", "tail", "-n", "1", "/tmp/counts").strip() or "0").replace('"', "") or 0)
        state = lab.logs / "vm1.state"
        more = lambda than: wait_until(30, lambda: self._counts(port)[1] > than + 5, lambda: f"{self._counts(port)} goes on")
        more(0)
        if not lab.plain:
            wait_until(30, lambda: on("lane"), lambda: f"on the lane: {lanes()}")
        lab.must("drain", "vm1")
        if not lab.plain:
            wait_until(30, lambda: on("tcp"), lambda: f"drained: {lanes()}")
        begun = time.monotonic()
        qmp = lab.qmp("vm1")
        self._unplug(qmp)
        qmp.do("migrate", uri=f"exec:cat >{state}")
        done = lambda: qmp.do("query-migrate").get("status")
        wait_until(60, lambda: done() in ("completed", "failed"), "the state is written")
        check(done() == "completed", f"{qmp.do('query-migrate')}")
        qmp.do("quit")
        wait_until(20, lambda: not lab.runs("vm1"), "QEMU has ended")
        # Some have it that a front ends with its QEMU; this one waits for the next.
        lab.command("stop", "front", "vm1")
        self._nothing_left("vm1")
        before = self._counts(port, "vm2")
        lab.must("start", "front", "vm1")
        lab.must("boot", "vm1", "--no-vsock", "--incoming")
        qmp = lab.qmp("vm1")
        qmp.do("migrate-incoming", uri=f"exec:cat {state}")
        wait_until(60, lambda: qmp.do("query-status")["status"] == "running", lambda: f"{qmp.do('query-status')}")
        stood = time.monotonic() - begun
        self._plug(qmp, "vm1")
        more(before[1])
        if not lab.plain:
            lab.has_agent("vm1")
        lab.must("undrain", "vm1")
        if not lab.plain:
            wait_until(45, lambda: on("lane"), lambda: f"back on the lane: {lab.connections('vm1')}")
        more(self._counts(port)[1])
        said = lab.inside("vm1", "cat", "/tmp/counts").split()
        ids, counts = set(said[0::2]), list(map(int, said[1::2]))
        check(len(ids) == 1, f"not one connection: {ids}")
        check(counts == list(range(1, len(counts) + 1)), f"a count is missing, or there twice: {counts[-20:]}")
        lab.shell("vm1", "kill $(pidof redis-cli)")
        size = state.stat().st_size
        state.unlink()
        return f"{len(counts)} counts by one connection, {size / MIB:.0f} MiB of state, stood still {stood:.1f} s"

    def _counts(self, port, guest="vm1"):
        """How far the counter has come, by the server, asked plainly; and how many connections it has had."""
        at = ["redis-cli", "-h", ADDRESS["vm2"], "-p", str(port)]
        counter = self.lab.inside(guest, *at, "get", "counter").strip()
        return 0, int(counter or 0)

    # ---------------------------------------------------------------- guests that lie

    def _refused(self, host):
        stat = self.lab.host_stat(host)
        return {name: count for kind in ("drops", "declines") for name, count in stat[kind].items()}

    def _rose(self, host, before):
        now = self._refused(host)
        return {name: count - before.get(name, 0) for name, count in now.items() if count > before.get(name, 0)}

    def a_container_with_a_low_port_registers_nothing(self):
        lab = self.lab
        lab.need("vm1", "vm2")
        self._nested()
        other, before = Traffic(lab, "vm2", "vm1").on("lane"), self._refused("h1")
        said = set()
        for port in (1000, 1001, 0xFFFF_FFFF):
            said.add(self._in_container("hostile", "register", PORT, port).strip())
        rose = self._rose("h1", before)
        check(lab.plain or any("second" in name for name in rose), f"not counted: {rose}")
        other.on("lane").goes_on()
        return f"{'; '.join(sorted(said))}; {rose}; {other.whole()}"

    def a_hostile_machine(self):
        """Root in vm1: noise on every port, then memory it does not have. The daemon and vm2 go on."""
        lab, port = self.lab, next(self.lab.ports)
        lab.need("vm1", "vm2")
        daemon = self._daemon("h1")
        other, before = Traffic(lab, "vm2", "a").on("lane"), self._refused("h1")
        noise = lab.inside("vm1", "hostile", "flood", PORT, 4, os.getpid()).strip()
        other.on("lane").goes_on()
        rose = {"noise": self._rose("h1", before)}
        if not lab.plain:
            lab.redis("vm2", port)
            lab.must("stop", "agent", "vm1")
            before = self._refused("h1")
            lies = lab.inside("vm1", "hostile", "memory", PORT, TOKEN, f"{ADDRESS['vm2']}:{port}", limit=120)
            (lab.logs / "lies").write_text(lies)
            other.on("lane").goes_on()
            rose["lies"] = self._rose("h1", before)
            check(sum(rose["lies"].values()) >= 5, f"not counted: {rose}, {lies}")
            noise += f", {lies.splitlines()[-1]}"
            lab.must("start", "agent", "vm1")
        check(self._daemon("h1") == daemon, "the daemon is another")
        said = other.whole()
        self._integrity("vm2", "vm1", 16 * MIB, 0.5)
        return f"{noise}; {rose}; {said}"

    def _daemon(self, host):
        daemons = subprocess.run(
            [str(Path(__file__).with_name("lab")), "status", "--json"], env=self.lab.env, capture_output=True, check=True
        )
        return next(one["pid"] for one in json.loads(daemons.stdout)["daemons"] if one["name"] == host)

    def who_says_he_is_another(self):
        """Another guest's address; a front with another CID than its vport's; a second front."""
        lab, port = self.lab, next(self.lab.ports)
        lab.need("vm1", "vm2")
        before, theirs = self._refused("h1"), ADDRESS["vm2"]
        other = Traffic(lab, "vm2", "a").on("lane")
        proof = Proof(lab, "vm1")
        lab.inside("vm1", "ip", "addr", "add", f"{theirs}/32", "dev", "lo")
        try:
            lab.serve("vm1", port, "stream", "serve", f"{theirs}:{port}", "--once")
            client = lab.run("vm1", "stream", "connect", f"{theirs}:{port}", "--bytes", 4 * MIB, "--from", f"{theirs}:0")
            client.report()
        finally:
            lab.inside("vm1", "ip", "addr", "del", f"{theirs}/32", "dev", "lo")
        rose = self._rose("h1", before)
        if not lab.plain:
            lane = proof.count("vm1")[0] - proof.before["vm1"][0]
            check(lane == 0, f"{lane} bytes with vm2's address went by a lane")
            check("address-not-yours" in rose, f"not counted: {rose}")
        # To a vport whose front is there, and to one whose front is not.
        if lab.runs("vm3"):
            lab.must("kill", "machine", "vm3")
        lab.command("kill", "front", "vm3")
        there = self._refused("h2")
        for machine, cid in (("vm1", "11"), ("vm3", "12")):
            command = [str(BIN / "vsocketd"), "vm-front", "--cid", cid, "--socket", str(lab.sockets / "false.front")]
            false = subprocess.Popen(
                [*command, "--daemon", str(lab.sockets / f"{machine}.vport")],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(0.5)
            false.kill()
            false.wait()
        rose = self._rose("h1", before) | self._rose("h2", there)
        check({"second-front", "front-cid"} <= set(rose), f"not counted: {rose}")
        lab.need("vm1")
        other.on("lane").goes_on()
        return f"{rose}; {other.whole()}"

    # ---------------------------------------------------------------- memory

    def canaries(self):
        """Application, agent and daemon are killed while the host writes at full rate: no byte of others changes."""
        lab = self.lab
        lab.need("vm1")
        canary = lab.start("plain", "vm1", "--", "canary", "280", "6", "/dev/shm").prints("filled", 60)
        killed = []
        for _ in range(DEATHS):
            for victim in ("application", "agent", "daemon", "application and agent"):
                flow = Traffic(lab, "a", "vm1", pace=None).on("lane").goes_on(4 * MIB)
                if "application" in victim:
                    lab.shell("vm1", "kill -9 $(pidof stream)")
                if "agent" in victim:
                    self._kill_agent("vm1")
                if victim == "daemon":
                    lab.must("kill", "backend", "h1")
                    time.sleep(0.5)
                    lab.must("start", "backend", "h1")
                check(canary.runs(), f"{victim} killed: {canary.last()}")
                time.sleep(1)
                lab.shell("vm1", "! pidof stream >/dev/null || kill -9 $(pidof stream)")
                flow.client.kill(), flow.server.kill()
                lab.need("vm1")
                killed.append(victim)
        return f"{len(killed)} deaths; {canary.end_input().ok(60).splitlines()[-1]}"

    def compaction(self):
        """The kernel moves all memory that it may, while others take and give back theirs."""
        lab = self.lab
        lab.need("vm1", "vm2")
        moved = lambda: int(re.search(r"pgmigrate_success (\d+)", lab.inside("vm1", "cat", "/proc/vmstat"))[1])
        begun = moved()
        canary = lab.start("plain", "vm1", "--", "canary", "240", "8", "/dev/shm").prints("filled", 60)
        compact = lab.start(
            "plain", "vm1", "--", "sh", "-c", "while :; do echo 1 >/proc/sys/vm/compact_memory; sleep 0.2; done"
        )
        said = self._integrity("vm2", "vm1", 48 * MIB)
        check(compact.runs(), f"{compact.last()}")
        compact.kill()
        return f"{said}; {canary.end_input().ok(60).splitlines()[-1]}; {moved() - begun} pages moved"

    def the_doctor_misses_the_device(self):
        lab = self.lab
        if lab.runs("vm3"):
            lab.must("kill", "machine", "vm3")
        lab.must("boot", "vm3", "--no-vsock", limit=120)
        done = lab.command("vsocket", "vm3", "doctor")
        lab.must("kill", "machine", "vm3")
        said = done.stdout.decode()
        check(done.returncode == 1, f"the doctor finds nothing: {said}")
        check(lab.plain or "vsock device" in said, f"it is not named: {said}")
        return next((line for line in said.splitlines() if line.startswith("STOP")), "")


def main():
    parser = argparse.ArgumentParser(prog="vmlab test vm", description="see scripts/vmlab -h")
    parser.add_argument("--plain", action="store_true", help="without agents: the scenarios themselves, over kernel TCP")
    parser.add_argument("word", nargs="*")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")
    logs = TARGET / "vmlab" / "test-logs" / "vm"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    lab = Guests(f"t{os.getpid()}-8", logs, args.plain)
    on_signals(lab.down)
    clear_away()
    scenarios = Scenarios(lab)
    names = [name for name in vars(Scenarios) if name[0] != "_"]
    names = [name for name in names if not args.word or any(word in name for word in args.word)]
    passed = failed = 0
    if names:
        lab.up("--guests", *(["--no-agents"] if args.plain else []))
    for name in names:
        begun, text = time.monotonic(), name.replace("_", " ")
        try:
            said = getattr(scenarios, name)()
            passed += 1
            print(f"ok   {text}, {time.monotonic() - begun:.1f} s{': ' if said else ''}{said or ''}", flush=True)
        except (Failure, ValueError, KeyError, IndexError, TypeError, OSError) as failure:
            failed += 1
            why = str(failure) if isinstance(failure, Failure) else repr(failure)
            print(f"FAIL {text}, {time.monotonic() - begun:.1f} s\n     {why}\n     logs are in {logs}", flush=True)
            lab.keep_logs(name)
        lab.stop_programs()
    scenarios.table.show()
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
