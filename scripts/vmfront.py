"""vmfront.py: the vsock device of `vsocketd vm-front` under a stock QEMU and a stock guest kernel; scripts/vmlab test front.

The machine is one of scripts/vmlab; the daemon is a stand-in, in this file, which takes the streams and echoes.
"""

import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from vmlab import TARGET, Failure, Lab, check, clear_away, on_signals, wait_until
from vmqmp import Qmp

MACHINE, CID, PORT = "h1", "2", "7650"
MEMORY = int(os.environ.get("VMLAB_MEMORY", "2048")) << 20
MIB = 1 << 20

# ---------------------------------------------------------------- the daemon's stand-in

HEAD = struct.Struct("<4sHH")
HELLO, WELCOME, REGION, STREAM, RESET, GONE, PAUSED, QUIET, RESUMED = range(40, 49)


def say(*words):
    print(*words, flush=True)


def message(kind, body=b""):
    return (HEAD.pack(b"VSK\0", 2, kind) + body).ljust(128, b"\0")


def echo(end, first):
    data, count = first, 0
    while data:
        count += len(data)
        end.sendall(data)
        data = end.recv(1 << 16)
    end.shutdown(socket.SHUT_WR)
    return f"echoed {count}"


def serve_stream(number, end):
    end.settimeout(None)
    said = ""
    try:
        first = end.recv(1 << 16)
        if first[:1] == b"H":
            end.sendall(b"greeting")
            end.shutdown(socket.SHUT_WR)
            digest, count, data = hashlib.sha256(), -1, first
            while data:
                digest.update(data[1:] if count < 0 else data)
                count += len(data)
                data = end.recv(1 << 16)
            said = f"half {count} {digest.hexdigest()}"
        else:
            if first[:1] == b"S":
                time.sleep(2)
            said = echo(end, first)
    except OSError as error:
        said = f"failed: {error.strerror}"
    end.close()
    say("end", number, said)


def serve_front(front):
    regions, boot = [], int.from_bytes(os.urandom(8), "little")
    while True:
        data, fds, _, _ = socket.recv_fds(front, 256, 4)
        if not data:
            return say("front gone")
        magic, version, kind = HEAD.unpack_from(data)
        assert (len(data), magic, version) == (128, b"VSK\0", 2), data
        body = data[HEAD.size :]
        if kind == HELLO:
            pid, cid = struct.unpack_from("<IQ", body)
            pidfd = os.pidfd_open(os.getpid())
            socket.send_fds(front, [message(WELCOME, struct.pack("<Q", boot))], [pidfd])
            os.close(pidfd)
            say("front", pid, cid)
        elif kind == REGION:
            table, index, count, address, size, offset = struct.unpack_from("<QIIQQQ", body)
            regions = (regions if index else []) + [(address, size)]
            assert len(fds) == 1 and os.fstat(fds[0]).st_size >= offset + size and len(regions) == index + 1
            if len(regions) == count:
                say("memory", table, sum(size for _, size in regions), "in", count)
        elif kind == STREAM:
            number, guest_port, host_port = struct.unpack_from("<QII", body)
            say("stream", number, guest_port, host_port)
            end = socket.socket(fileno=fds.pop())
            threading.Thread(target=serve_stream, args=(number, end), daemon=True).start()
        else:
            say({RESET: "reset", GONE: "gone", PAUSED: "paused", RESUMED: "resumed"}[kind])
            if kind == PAUSED:
                front.sendall(message(QUIET))
        for fd in fds:
            os.close(fd)


def daemon(path):
    threading.stack_size(1 << 18)
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(8)
    while True:
        front, _ = listener.accept()
        threading.Thread(target=serve_front, args=(front,), daemon=True).start()


# ---------------------------------------------------------------- what a test uses


class StandIn:
    """The stand-in as a process of its own, so that it can be killed."""

    def __init__(self, state, log):
        self.socket, self.log, self.child = str(state / f"{MACHINE}.vport"), log, None

    def start(self):
        with open(self.log, "ab") as out:
            command = [sys.executable, __file__, "--daemon", self.socket]
            self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        return self

    def kill(self):
        if self.child:
            self.child.kill()
            self.child.wait()
            self.child = None

    def lines(self, start=0):
        return self.log.read_text().splitlines()[start:] if self.log.exists() else []

    def mark(self):
        return len(self.lines())

    def says(self, text, start=0, limit=10):
        found = lambda: [line for line in self.lines(start) if text in line]
        return wait_until(limit, found, lambda: f"the daemon's stand-in does not say '{text}': {self.lines(start)[-3:]}")


class Scenarios:
    """Each public method is one; what it returns is shown beside its name."""

    def __init__(self, lab):
        self.lab = lab
        self.state = TARGET / "vmlab" / "labs" / lab.env["LAB"]
        self.stand_in = StandIn(self.state, lab.logs / "stand-in")
        self.stand_in.start()
        self.stand_in.says("memory")
        self.idle = self.descriptors()

    def vsock(self, *words, limit=60):
        return self.lab.must("exec", MACHINE, "--", "vsock", words[0], CID, PORT, *map(str, words[1:]), limit=limit).strip()

    def begin(self, *words):
        """A program that runs on; its first stream has been opened."""
        start = self.stand_in.mark()
        program = self.begin_plainly(*words)
        self.stand_in.says("stream", start)
        return program

    def begin_plainly(self, *words):
        return self.lab.start("exec", MACHINE, "--", "vsock", words[0], CID, PORT, *map(str, words[1:]))

    def pid(self, name):
        return int((self.state / f"{name}.pid").read_text().split()[0])

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid(f'{MACHINE}.front')}/fd"))

    def nothing_left(self, extra=0):
        want = self.idle + extra
        wait_until(10, lambda: self.descriptors() == want, lambda: f"{self.descriptors()} descriptors, {want} when idle")

    def qmp(self):
        return Qmp(self.state / f"{MACHINE}.qmp")

    def answers(self):
        """The machine, after a boot that vmlab has not asked for."""
        ready = lambda: self.lab.command("exec", MACHINE, "--", "true", limit=30).returncode == 0
        wait_until(90, ready, "the machine does not answer")

    def bytes_go_both_ways(self):
        said = self.vsock("echo", 16 * MIB)
        self.nothing_left()
        return said

    def round_trips(self):
        return self.vsock("ping", 2000)

    def many_streams_at_once(self):
        said = self.vsock("echo", 100_000, 200, limit=120)
        self.nothing_left()
        return said

    def the_daemon_may_close_its_direction_first(self):
        start = self.stand_in.mark()
        _, count, digest = self.vsock("half", MIB).split()
        self.stand_in.says(f"half {count} {digest}", start)
        self.nothing_left()

    def who_does_not_read_stops_only_its_own_stream(self):
        slow = self.begin("slow", 2 * MIB)
        self.vsock("echo", MIB)
        slow.ok()
        self.nothing_left()

    def streams_closed_in_the_middle(self):
        self.vsock("abort", 4 * MIB, 20)
        self.nothing_left()
        self.vsock("echo", MIB)

    def another_port_is_refused(self):
        return self.lab.must("exec", MACHINE, "--", "vsock", "refused", CID, "1234").strip()

    def the_daemon_is_killed_and_comes_back(self):
        start = self.stand_in.mark()
        held = [self.begin("hold").prints("open") for _ in range(3)]
        self.stand_in.kill()
        for one in held:
            check("ended" in one.ok(10), one.last())
        self.nothing_left(-2)
        said = self.vsock("refused")
        self.stand_in.start()
        self.stand_in.says("memory", start)
        self.vsock("echo", MIB)
        self.nothing_left()
        return said

    def the_daemon_is_killed_under_load(self):
        for _ in range(3):
            busy = self.begin("echo", 64 * MIB, 8)
            start = self.stand_in.mark()
            time.sleep(0.5)
            self.stand_in.kill()
            wait_until(20, lambda: not busy.runs(), "the guest's program does not notice")
            check(busy.child.returncode == 1, f"exit status {busy.child.returncode}: {busy.last()}")
            self.stand_in.start()
            self.stand_in.says("memory", start)
        self.vsock("echo", MIB)
        self.nothing_left()

    def qemu_stops_and_continues(self):
        busy = self.begin("echo", 64 * MIB, 2)
        qmp = self.qmp()
        for _ in range(3):
            start = self.stand_in.mark()
            qmp.do("stop")
            self.stand_in.says("paused", start)
            time.sleep(0.5)
            qmp.do("cont")
            self.stand_in.says("resumed", start)
            time.sleep(0.3)
        check(busy.runs(), "over before it was stopped")
        said = busy.ok(120)
        self.nothing_left()
        return said.strip()

    def the_machine_is_reset(self):
        start = self.stand_in.mark()
        self.begin("hold").prints("open")
        self.begin("echo", 1024 * MIB)
        qmp = self.qmp()
        qmp.do("set-action", reboot="reset")
        qmp.do("system_reset")
        self.stand_in.says("reset", start, 30)
        self.stand_in.says("end", start)
        self.nothing_left()
        self.answers()
        self.vsock("echo", MIB)
        self.nothing_left()

    def qemu_is_killed(self):
        start = self.stand_in.mark()
        self.begin("hold").prints("open")
        os.kill(self.pid(MACHINE), signal.SIGKILL)
        self.stand_in.says("gone", start)
        self.stand_in.says("end", start)
        wait_until(10, lambda: self.descriptors() < self.idle, "the front keeps what it had of QEMU")
        maps = Path(f"/proc/{self.pid(f'{MACHINE}.front')}/maps").read_text()
        check("memfd" not in maps and "memory-backend" not in maps, "the front keeps the guest's memory")
        self.lab.must("boot", MACHINE, limit=120)
        self.vsock("echo", MIB)
        self.nothing_left()

    def the_front_ends_in_order(self):
        held = self.begin("hold").prints("open")
        self.lab.must("front", "term", MACHINE)
        said = held.ok(10).strip()
        self.replug()
        return said.splitlines()[-1]

    def the_front_is_killed_and_the_device_replugged(self):
        held = self.begin("hold").prints("open")
        self.lab.must("front", "kill", MACHINE)
        self.replug()
        return held.ok(10).strip().splitlines()[-1]

    def replug(self):
        start = self.stand_in.mark()
        self.lab.must("front", "start", MACHINE)
        qmp = self.qmp()
        qmp.do("device_del", id="vsock")
        qmp.event("DEVICE_DELETED")
        qmp.do("chardev-remove", id="front")
        address = {"type": "unix", "data": {"path": f"{MACHINE}.front"}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        qmp.do("chardev-add", id="front", backend=backend)
        qmp.do("device_add", driver="vhost-user-vsock-pci", id="vsock", chardev="front", bus="port1")
        self.stand_in.says("memory", start, 30)
        wait_until(
            20,
            lambda: self.lab.command("exec", MACHINE, "--", "vsock", "echo", CID, PORT, "1000").returncode == 0,
            "no stream after the device came back",
        )
        self.idle = wait_until(5, self.descriptors, "descriptors")


def main():
    if sys.argv[1:2] == ["--daemon"]:
        return daemon(sys.argv[2])
    logs = TARGET / "vmlab" / "test-logs" / "front"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.iterdir():
        old.unlink()
    lab = Lab(f"t{os.getpid()}-front", logs)
    stand_ins = []
    on_signals(lambda: [lab.down(), *(one.kill() for one in stand_ins)])
    clear_away()
    lab.up("1", "--nic", "soft", "--vsock")
    scenarios = Scenarios(lab)
    stand_ins.append(scenarios.stand_in)
    own = [name for name, what in vars(Scenarios).items() if callable(what) and "_" in name and name[0] != "_"]
    own = [name for name in own if name not in ("nothing_left", "begin_plainly")]
    passed = failed = 0
    for name in own:
        if not all(word in name for word in sys.argv[1:]):
            continue
        begun, text = time.monotonic(), name.replace("_", " ")
        try:
            said = getattr(scenarios, name)()
            passed += 1
            print(f"ok   {text}, {time.monotonic() - begun:.1f} s{': ' if said else ''}{said or ''}", flush=True)
        except (Failure, ValueError, KeyError, OSError) as failure:
            failed += 1
            print(f"FAIL {text}, {time.monotonic() - begun:.1f} s\n     {failure!r}\n     logs are in {logs}", flush=True)
            lab.keep_logs(name)
        lab.stop_programs()
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
