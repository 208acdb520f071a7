"""redis_check.py HOST CLIENTS TRANSACTIONS: each client increments three counters in transactions, and publishes each
result; a subscriber hears every message, those of one client in order. Knows RESP and nothing else."""

import socket
import sys
import threading
import time

HOST, CLIENTS, TRANSACTIONS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class Redis:
    def __init__(self):
        self.socket = socket.create_connection((HOST, 6379), timeout=60)
        self.lines = self.socket.makefile("rb")

    def send(self, *words):
        words = [str(word).encode() for word in words]
        text = b"*%d\r\n" % len(words)
        text += b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        self.socket.sendall(text)

    def reply(self):
        line = self.lines.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"*":
            return [self.reply() for _ in range(int(rest))]
        if kind == b"$":
            return self.lines.read(int(rest) + 2)[:-2] if rest != b"-1" else None
        if kind == b":":
            return int(rest)
        assert kind == b"+", line
        return rest

    def ask(self, *words):
        self.send(*words)
        return self.reply()


def listen(redis, heard):
    while len(heard) < CLIENTS * TRANSACTIONS:
        kind, _, text = redis.reply()
        assert kind == b"message"
        heard.append(text)


def work(number, failures):
    try:
        redis = Redis()
        for n in range(TRANSACTIONS):
            assert redis.ask("MULTI") == b"OK"
            for key in ("one", "two", "three"):
                assert redis.ask("INCR", key) == b"QUEUED"
            # Nobody comes between: the three are always equal.
            one, two, three = redis.ask("EXEC")
            assert one == two == three, (one, two, three)
            assert redis.ask("PUBLISH", "channel", f"{number} {n} " + "x" * 500) == 1
    except Exception as error:
        failures.append(repr(error))


redis = Redis()
redis.ask("FLUSHALL")
ear = Redis()
assert ear.ask("SUBSCRIBE", "channel")[0] == b"subscribe"
heard, failures = [], []
listener = threading.Thread(target=listen, args=(ear, heard), daemon=True)
listener.start()
begun = time.monotonic()
threads = [threading.Thread(target=work, args=(n, failures)) for n in range(CLIENTS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
took = time.monotonic() - begun
assert not failures, failures
listener.join(30)
assert len(heard) == CLIENTS * TRANSACTIONS, len(heard)
for number in range(CLIENTS):
    mine = [int(text.split()[1]) for text in heard if int(text.split()[0]) == number]
    assert mine == list(range(TRANSACTIONS)), number
for key in ("one", "two", "three"):
    assert int(redis.ask("GET", key)) == CLIENTS * TRANSACTIONS
print(f"rate {CLIENTS * TRANSACTIONS / took:.1f}")
