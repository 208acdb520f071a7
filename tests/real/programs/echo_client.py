"""echo_client.py HOST PORT CONNECTIONS MIB: so many connections, each of which sends so much and at the same time
compares what comes back with it; then one that asks and waits, with messages of 64 bytes."""

import random
import socket
import sys
import threading
import time

HOST, PORT, CONNECTIONS, MIB = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
BLOCK = random.Random(20261126).randbytes(1 << 20)
BLOCK += BLOCK[:8191]
SECONDS = 1.5


def expected(offset, length, seed):
    """The stream of a connection: the block again and again, each time a byte further on."""
    at = (offset + offset // (1 << 20) + seed * 977) % (1 << 20)
    return BLOCK[at : at + length]


def piece(offset, length):
    """As much of it as lies in one turn of the block."""
    return min(length, (1 << 20) - offset % (1 << 20), 8191)


def send(connection, total, seed):
    sizes = random.Random(seed)
    offset = 0
    while offset < total:
        data = b""
        for _ in range(sizes.randint(1, 12)):
            length = piece(offset + len(data), total - offset - len(data))
            if not length:
                break
            data += expected(offset + len(data), length, seed)
        connection.sendall(data)
        offset += len(data)
    connection.shutdown(socket.SHUT_WR)


def work(seed, failures):
    try:
        total = MIB << 20
        connection = socket.create_connection((HOST, PORT), timeout=60)
        sender = threading.Thread(target=send, args=(connection, total, seed))
        sender.start()
        offset = 0
        while True:
            data = connection.recv(1 << 18)
            if not data:
                break
            at = 0
            while at < len(data):
                length = piece(offset, len(data) - at)
                if data[at : at + length] != expected(offset, length, seed):
                    raise ValueError(f"connection {seed} differs near {offset}")
                at += length
                offset += length
        if offset != total:
            raise ValueError(f"connection {seed} ended at {offset}")
        sender.join()
        connection.close()
    except Exception as error:
        failures.append(repr(error))


failures = []
begun = time.monotonic()
threads = [threading.Thread(target=work, args=(seed, failures)) for seed in range(CONNECTIONS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
rate = CONNECTIONS * (MIB << 20) / (time.monotonic() - begun) / 1e6
if failures:
    sys.exit(str(failures))

connection = socket.create_connection((HOST, PORT), timeout=60)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
begun, rounds = time.monotonic(), 0
while time.monotonic() < begun + SECONDS:
    message = expected(rounds, 64, 0)
    connection.sendall(message)
    answer = b""
    while len(answer) < 64:
        more = connection.recv(64 - len(answer))
        if not more:
            sys.exit(f"ended in round {rounds}")
        answer += more
    if answer != message:
        sys.exit(f"another answer in round {rounds}")
    rounds += 1
took = time.monotonic() - begun
connection.close()
print(f"mbyte/s {rate:.1f} round trips/s {rounds / took:.1f}")
