"""demo.py: the measuring half of scripts/demo, which installs and builds before it runs this.

Each workload runs plainly (A) and accelerated (B) in turn, A B A B…, so that whatever else the machine does falls on
both alike; the medians are compared. The client is always guest a; the server is b (same host) or c (across hosts).
Servers run once per path and mode: a plain client meets a plain server, an accelerated one an accelerated one.

With one request under way at a time, the kernel's figure is that of a wake-up, and changes twofold (redis) to tenfold
(sockperf) with whether the scheduler happens to put both ends on one core. Those workloads have their ends held on two
cores, in both modes, which is also where the scheduler leaves them in longer runs.
"""

import argparse
import atexit
import csv
import datetime
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAB_SCRIPT = str(Path(__file__).resolve().with_name("lab"))
CLIENT = "a"
PATHS = {"same-host": ("b", "198.51.100.2"), "cross-host": ("c", "198.51.100.3")}
MODES = ("plain", "vsocket")


class Failure(Exception):
    """A measurement that could not be made; its text goes into the workload's row."""


def two_cores():
    """Two CPUs on different cores, or None: where the ends of a latency test run."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return None
    try:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpus[0]}/topology/thread_siblings_list").read_text()
        same_core = set()
        for part in siblings.strip().split(","):
            low, _, high = part.partition("-")
            same_core.update(range(int(low), int(high or low) + 1))
    except (OSError, ValueError):
        same_core = {cpus[0]}
    return cpus[0], next((cpu for cpu in cpus if cpu not in same_core), cpus[1])


class Progress:
    """One line that is rewritten on a terminal; elsewhere only the lines that stay."""

    def __init__(self):
        self.tty = sys.stderr.isatty()
        self.started = time.monotonic()

    def step(self, text):
        if self.tty:
            width = shutil.get_terminal_size().columns
            print(f"\r\033[K{self.clock()} {text}"[: width + 3], end="", file=sys.stderr, flush=True)

    def line(self, text):
        lead = "\r\033[K" if self.tty else ""
        print(f"{lead}{self.clock()} {text}", file=sys.stderr, flush=True)

    def clear(self):
        if self.tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def clock(self):
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60}:{seconds % 60:02}"


class Lab:
    """A lab of our own, by way of scripts/lab."""

    def __init__(self):
        self.name = f"demo{os.getpid()}"
        self.env = dict(os.environ, LAB=self.name)
        self.scratch = tempfile.mkdtemp(prefix="vsocket-demo-")
        self.children = []
        self.is_down = False

    def up(self):
        result = subprocess.run(
            [LAB_SCRIPT, "up"], env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if result.returncode:
            raise Failure(f"lab up failed:\n{result.stderr.strip()}")

    def down(self):
        if self.is_down:
            return
        for child in list(self.children):
            self.stop(child)
        subprocess.run([LAB_SCRIPT, "down"], env=self.env, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.is_down = True

    def spawn(self, mode, guest, command, cpu=None, **options):
        """Start a command in a guest, in a process group of its own."""
        verb = "run" if mode == "vsocket" else "exec"
        pin = None if cpu is None else (lambda: os.sched_setaffinity(0, {cpu}))
        child = subprocess.Popen(
            [LAB_SCRIPT, verb, guest, "--", *command],
            env=self.env,
            cwd=self.scratch,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=pin,
            **options,
        )
        self.children.append(child)
        return child

    def stop(self, child):
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
        if child in self.children:
            self.children.remove(child)

    def client(self, mode, command, cpu=None):
        return self.spawn(
            mode, CLIENT, command, cpu, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )

    def output(self, child, timeout):
        """What a client printed, once it has ended well."""
        what = child.args[4]
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failure(f"{what} did not end within {timeout:.0f} s") from None
        finally:
            self.stop(child)
        if child.returncode:
            last = (err.strip() or out.strip() or "no output").splitlines()[-1].strip()
            raise Failure(f"{what} ended with {child.returncode}: {last}")
        return out

    def serve(self, mode, guest, port, command, cpu=None):
        """Start a server; `listening` waits for it."""
        log = os.path.join(self.scratch, f"{command[0]}-{guest}-{mode}.log")
        with open(log, "wb") as file:
            child = self.spawn(mode, guest, command, cpu, stdout=file, stderr=subprocess.STDOUT)
        child.where = (guest, port, log)
        return child

    def listening(self, server):
        guest, port, log = server.where
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and server.poll() is None:
            found = subprocess.run(
                [LAB_SCRIPT, "exec", guest, "--", "ss", "-Hltn", f"sport = :{port}"],
                env=self.env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if found.stdout.strip():
                return
            time.sleep(0.01)
        with open(log, errors="replace") as file:
            last = (file.read().strip() or "no output").splitlines()[-1]
        raise Failure(f"server {server.args[4]} in guest {guest} does not listen: {last}")

    def stat(self, guest):
        result = subprocess.run(
            [LAB_SCRIPT, "vsocket", guest, "stat", "--json"],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
        if result.returncode:
            raise Failure(f"vsocket stat of guest {guest}: {result.stderr.strip()}")
        return json.loads(result.stdout)


class Redis:
    """redis-benchmark; n is scaled so that a run lasts as long as wished."""

    unit, better = "req/s", "more"
    program, port = "redis-server", 6390

    def __init__(self, name, test, connections, pipeline, first):
        self.name, self.connections, self.first = name, connections, first
        self.pinned = connections == 1
        self.options = ["-t", test, "-c", str(connections)] + (["-P", str(pipeline)] if pipeline > 1 else [])

    @staticmethod
    def server(address, port):
        return (
            f"redis-server --bind {address} --port {port} --appendonly no --protected-mode no --loglevel warning --save"
        ).split() + [""]

    @staticmethod
    def prepare(lab, mode, address, port):
        """The key that GET asks for."""
        command = f"redis-benchmark -h {address} -p {port} -t set -c 1 -n 1 -q".split()
        lab.output(lab.client(mode, command), 10)

    def measure(self, lab, mode, address, port, amount, cpu):
        command = ["redis-benchmark", "-h", address, "-p", str(port), *self.options, "-n", str(amount), "--csv"]
        out = lab.output(lab.client(mode, command, cpu), 30)
        rows = list(csv.DictReader(out.splitlines()))
        try:
            rate = float(rows[0]["rps"])
        except (IndexError, KeyError, ValueError):
            raise Failure("redis-benchmark printed no rate") from None
        return rate, amount / rate if rate else 0.0


class Iperf:
    """iperf3, one stream; the bytes are scaled so that a run lasts as long as wished."""

    name, unit, better = "iperf3-1", "Gbit/s", "more"
    program, port, connections, first = "iperf3", 5301, 1, 100_000_000
    pinned = False

    @staticmethod
    def server(address, port):
        return ["iperf3", "-s", "-B", address, "-p", str(port)]

    @staticmethod
    def prepare(lab, mode, address, port):
        pass

    def measure(self, lab, mode, address, port, amount, cpu):
        command = ["iperf3", "-c", address, "-p", str(port), "-J", "-n", str(amount)]
        out = lab.output(lab.client(mode, command, cpu), 30)
        try:
            received = json.loads(out)["end"]["sum_received"]
            return received["bits_per_second"] / 1e9, received["seconds"]
        except (ValueError, KeyError):
            raise Failure("iperf3 printed no result") from None


class Sockperf:
    """sockperf ping-pong of 64 bytes: the median one-way latency.

    A client sleeps for two seconds before it measures, so the next one is started in that time: they measure one
    after the other all the same.
    """

    name, unit, better = "sockperf-pingpong-64", "µs", "less"
    program, port, connections, pinned = "sockperf", 6401, 1, True

    @staticmethod
    def server(address, port):
        return ["sockperf", "server", "--tcp", "-i", address, "-p", str(port)]

    @staticmethod
    def prepare(lab, mode, address, port):
        pass

    @staticmethod
    def client(address, port, seconds):
        # It records every message it might send, and aborts when the rate it is given asks for too many.
        options = f"--tcp --msg-size 64 --time {seconds} --mps 400000"
        return ["sockperf", "ping-pong", "-i", address, "-p", str(port), *options.split()]

    @staticmethod
    def parse(out):
        found = re.search(r"percentile 50\.0+ *= *([0-9.]+)", out)
        if not found:
            raise Failure("sockperf printed no median")
        return float(found[1])


WORKLOADS = [
    Redis("redis-get-c50", "get", 50, 1, 10_000),
    Redis("redis-set-c50", "set", 50, 1, 10_000),
    Redis("redis-get-c1", "get", 1, 1, 2_000),
    Redis("redis-get-p16", "get", 50, 16, 100_000),
    Iperf(),
    Sockperf(),
]


class Demo:
    def __init__(self, lab, progress, rounds, seconds):
        self.lab, self.progress, self.rounds, self.seconds = lab, progress, rounds, seconds
        self.cores = two_cores()
        self.rows, self.errors, self.notes = [], [], []
        self.least_share = None

    def run(self):
        done = 0
        while done < len(WORKLOADS):
            first = WORKLOADS[done]
            group = list(
                itertools.takewhile(lambda w: (w.program, w.pinned) == (first.program, first.pinned), WORKLOADS[done:])
            )
            servers, broken = self.start_servers(first)
            for workload in group:
                for path in PATHS:
                    self.row(workload, path, broken)
            for server in servers:
                self.lab.stop(server)
            done += len(group)

    def start_servers(self, workload):
        """Servers of all paths and modes; a failure is remembered for the rows it concerns."""
        servers, broken = [], {}
        cpu = self.cores[1] if workload.pinned and self.cores else None
        self.progress.step(f"starting {workload.program}")
        for path, (guest, address) in PATHS.items():
            for mode in MODES:
                port = self.port(workload, mode)
                server = self.lab.serve(mode, guest, port, workload.server(address, port), cpu)
                server.key = path, mode
                servers.append(server)
        for server in servers:
            path, mode = server.key
            try:
                self.lab.listening(server)
                workload.prepare(self.lab, mode, PATHS[path][1], self.port(workload, mode))
            except Failure as failure:
                broken[path] = failure
        return servers, broken

    @staticmethod
    def port(workload, mode):
        return workload.port + MODES.index(mode)

    def row(self, workload, path, broken):
        row = dict.fromkeys(
            ("workload", "path", "kernel_tcp", "vsocket", "unit", "ratio", "lane", "accelerated_connections")
        )
        row.update(workload=workload.name, path=path, unit=workload.unit)
        self.rows.append(row)
        title = f"{workload.name} {path}"
        try:
            if path in broken:
                raise broken[path]
            if isinstance(workload, Sockperf):
                plan = self.sockperf_rounds
            else:
                plan = self.scaled_rounds
            values = plan(workload, path, row)
            plain, fast = (statistics.median(values[mode]) for mode in MODES)
            if not plain > 0 or not fast > 0:
                raise Failure(f"measured nothing: {plain} and {fast} {workload.unit}")
            ratio = fast / plain if workload.better == "more" else plain / fast
            row.update(kernel_tcp=rounded(plain), vsocket=rounded(fast), ratio=rounded(ratio))
            if not row["accelerated_connections"]:
                raise Failure(self.unaccelerated)
            self.progress.line(
                f"{title}: {number(plain)} and {number(fast)} {workload.unit}, {row['ratio']:.3g}x, {row['lane']}"
            )
        except (Failure, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as failure:
            text = str(failure) or repr(failure)
            row["error"] = text
            self.errors.append(f"{title}: {text}")
            self.progress.line(f"{title}: error: {text}")

    def scaled_rounds(self, workload, path, row):
        """Find how much work fills the time, in each mode, then take turns."""
        address = PATHS[path][1]
        cpu = self.cores[0] if workload.pinned and self.cores else None
        amount = {}
        for mode in MODES:
            self.progress.step(f"{workload.name} {path}: how fast is {mode}?")
            amount[mode] = workload.first
            for _ in range(4):
                _, took = workload.measure(self.lab, mode, address, self.port(workload, mode), amount[mode], cpu)
                filled = took >= self.seconds / 2
                amount[mode] = int(amount[mode] * min(self.seconds / max(took, 0.002), 50))
                if filled:
                    break
        before = self.stats(path)
        values = {mode: [] for mode in MODES}
        for index in range(self.rounds):
            for mode in MODES:
                self.progress.step(f"{workload.name} {path}: round {index + 1} of {self.rounds}, {mode}")
                value, _ = workload.measure(self.lab, mode, address, self.port(workload, mode), amount[mode], cpu)
                values[mode].append(value)
        self.account(workload, path, row, before)
        return values

    def sockperf_rounds(self, workload, path, row):
        address = PATHS[path][1]
        seconds = max(1, round(self.seconds))
        cpu = self.cores[0] if self.cores else None
        before = self.stats(path)
        started, values = [], {mode: [] for mode in MODES}
        begin = time.monotonic()
        turns = [(index, mode) for index in range(self.rounds) for mode in MODES]
        try:
            for turn, (index, mode) in enumerate(turns):
                wait = begin + turn * (seconds + 0.2) - time.monotonic()
                if wait > 0:
                    time.sleep(wait)
                self.progress.step(f"{workload.name} {path}: round {index + 1} of {self.rounds}, {mode}")
                command = workload.client(address, self.port(workload, mode), seconds)
                started.append(self.lab.client(mode, command, cpu))
            for (_, mode), child in zip(turns, started):
                values[mode].append(workload.parse(self.lab.output(child, 10 + 2 * seconds)))
        finally:
            for child in started:
                if child.returncode is None:
                    self.lab.stop(child)
        self.account(workload, path, row, before)
        return values

    def stats(self, path):
        return [self.lab.stat(guest) for guest in (CLIENT, PATHS[path][0])]

    def account(self, workload, path, row, before):
        """What the agents counted during the rounds: connections accelerated, their lane, bytes off it."""
        after = self.stats(path)
        rose = {
            key: after[0]["connections"][key] - before[0]["connections"][key]
            for key in ("upgraded_total", "direct_total", "fabric_total")
        }
        lanes = [lane for lane in ("direct", "fabric") if rose[f"{lane}_total"] > 0]
        row["lane"] = "+".join(lanes) or "tcp"
        row["accelerated_connections"] = rose["upgraded_total"]
        declined = {
            reason: count - before[0].get("declined", {}).get(reason, 0)
            for reason, count in after[0].get("declined", {}).items()
        }
        reasons = ", ".join(f"{count} {reason}" for reason, count in declined.items() if count > 0)
        self.unaccelerated = f"not accelerated: {reasons or 'no reason counted'}"
        title = f"{workload.name} {path}"
        expected = workload.connections * self.rounds
        if 0 < rose["upgraded_total"] < expected:
            self.notes.append(f"{title}: only {rose['upgraded_total']} of {expected} connections accelerated, {reasons}")
        for guest, old, new in zip((CLIENT, PATHS[path][0]), before, after):
            moved = {
                lane: sum(new["bytes"][lane][way] - old["bytes"][lane][way] for way in ("tx", "rx"))
                for lane in ("tcp", "direct", "fabric")
            }
            if sum(moved.values()) == 0:
                continue
            share = 100 * (1 - moved["tcp"] / sum(moved.values()))
            self.least_share = share if self.least_share is None else min(share, self.least_share)
            if share < 99:
                self.notes.append(f"{title}: {share:.1f} % of the bytes on a lane, by the agent of guest {guest}")


def rounded(value):
    """Four significant digits, as many as the measurement can bear."""
    return float(f"{value:.4g}")


def number(value):
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def machine():
    cpu, system = "CPU", "Linux"
    try:
        cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].strip()
    except (OSError, TypeError):
        pass
    try:
        system = re.search(r'^PRETTY_NAME="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M)[1]
    except (OSError, TypeError):
        pass
    return f"{len(os.sched_getaffinity(0))} x {cpu}, {system}, Linux {os.uname().release}"


def print_table(demo, elapsed):
    print(f"{datetime.date.today()}, {machine()}")
    print(f"Median of {demo.rounds} rounds, kernel TCP and vsocket in turn; {elapsed:.0f} s in all")
    print()
    heads = ("workload", "path", "kernel TCP", "vsocket", "unit", "ratio", "lane", "conns")
    line = "{:<20} {:<10} {:>10} {:>9} {:<6} {:>6} {:<6} {:>5}"
    print(line.format(*heads))
    for row in demo.rows:
        if "error" in row:
            print(f"{row['workload']:<20} {row['path']:<10} error: {row['error'].splitlines()[0]}"[:79])
            continue
        ratio = f"{row['ratio']:.{2 if row['ratio'] < 10 else 1 if row['ratio'] < 100 else 0}f}x"
        cells = (row["workload"], row["path"], number(row["kernel_tcp"]), number(row["vsocket"]), row["unit"], ratio)
        print(line.format(*cells, row["lane"], row["accelerated_connections"]))
    print()
    print("conns: connections accelerated. µs: median one-way latency; its ratio is kernel TCP / vsocket.")
    if demo.cores:
        print("redis-get-c1 and sockperf: each end on a core of its own, in both modes.")
    if demo.least_share is not None:
        print(f"Bytes on lanes, by the agents of both ends: at least {demo.least_share:.2f} % in every row.")
    for note in demo.notes:
        print(f"note: {note}")


def write_json(rows, file):
    rows = [{key: value for key, value in row.items() if key != "error"} for row in rows]
    with open(file, "w", encoding="utf-8") as out:
        out.write("[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


def rounds_argument(text):
    value = int(text)
    if value < 3:
        raise argparse.ArgumentTypeError("at least 3")
    return value


class Interrupts:
    """The first signal ends the demo; further ones must not leave half a lab."""

    def __init__(self):
        self.on = True
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self.handle)

    def handle(self, signum, _frame):
        if self.on:
            self.on = False
            raise SystemExit(128 + signum)


def main():
    parser = argparse.ArgumentParser(prog="demo", description="see scripts/demo -h")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=rounds_argument)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.json and not os.access(os.path.dirname(os.path.abspath(args.json)), os.W_OK):
        parser.error(f"cannot write {args.json}")
    # A terminal that cannot show µ shows ? instead.
    sys.stdout.reconfigure(errors="replace")

    progress = Progress()
    interrupts = Interrupts()
    lab = Lab()
    atexit.register(lab.down)
    rounds = args.rounds or (3 if args.quick else 5)
    demo = Demo(lab, progress, rounds, seconds=0.25 if args.quick else 2.0)
    try:
        progress.line(f"bringing up lab {lab.name} (should this be killed: LAB={lab.name} scripts/lab down)")
        lab.up()
        demo.run()
        progress.step("taking the lab down")
    except Failure as failure:
        progress.clear()
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    finally:
        interrupts.on = False
        lab.down()
    progress.clear()
    print_table(demo, time.monotonic() - progress.started)
    if args.json:
        write_json(demo.rows, args.json)
    if demo.errors:
        print(f"\ndemo: {len(demo.errors)} of {len(demo.rows)} rows could not be measured:", file=sys.stderr)
        for error in demo.errors:
            print(f"  {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
