"""handover.py serve HOST PORT ROUNDS | ask HOST PORT ROUNDS: a server whose child answers the first so many messages of a
connection and ends; then the server goes on with it. The client says how many of its messages were answered."""

import os
import socket
import sys
import time

WHAT, HOST, PORT, ROUNDS = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


def receive(connection):
    message = b""
    while len(message) < 64:
        more = connection.recv(64 - len(message))
        if not more:
            return None
        message += more
    return message


def answer(connection, rounds):
    while rounds and (message := receive(connection)):
        connection.sendall(message)
        rounds -= 1


def serve():
    listener = socket.create_server((HOST, PORT))
    while True:
        connection, _ = listener.accept()
        child = os.fork()
        if not child:
            answer(connection, ROUNDS)
            os._exit(0)
        os.waitpid(child, 0)
        answer(connection, -1)
        connection.close()


def ask():
    connection = socket.create_connection((HOST, PORT), timeout=10)
    for n in range(ROUNDS):
        message = n.to_bytes(8, "big") * 8
        connection.sendall(message)
        if receive(connection) != message:
            sys.exit(f"no answer to message {n}")
        # The agents are to have a moment for what they have in mind.
        time.sleep(0.0005)
    print("answered", ROUNDS)


{"serve": serve, "ask": ask}[WHAT]()
