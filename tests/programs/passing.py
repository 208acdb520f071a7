"""passing.py serve HOST PORT ROUNDS GO | work FD GO: a server that answers the first so many messages of a connection and then passes it
to a worker, which goes on with it when the file GO exists. The client is that of handover.py."""

import os
import socket
import subprocess
import sys
import time


def answer(connection, rounds):
    while rounds:
        message = b""
        while len(message) < 64:
            more = connection.recv(64 - len(message))
            if not more:
                return
            message += more
        connection.sendall(message)
        rounds -= 1


def serve(host, port, rounds, go):
    near, far = socket.socketpair()
    command = [sys.executable, sys.argv[0], "work", str(far.fileno()), go]
    worker = subprocess.Popen(command, pass_fds=[far.fileno()])
    listener = socket.create_server((host, int(port)))
    while True:
        connection, _ = listener.accept()
        with connection:
            answer(connection, int(rounds))
            socket.send_fds(near, [b"x"], [connection.fileno()])
            print("passed", worker.pid, flush=True)


def work(fd, go):
    passed = socket.socket(fileno=int(fd))
    while True:
        _, (connection,), _, _ = socket.recv_fds(passed, 1, 1)
        while not os.path.exists(go):
            time.sleep(0.01)
        with socket.socket(fileno=connection) as connection:
            answer(connection, -1)


{"serve": serve, "work": work}[sys.argv[1]](*sys.argv[2:])
