"""vmqmp.py: QEMU's monitor.

usage: vmqmp.py SOCKET COMMAND [KEY=VALUE…]    VALUE is JSON, or a string
"""

import json
import socket
import sys

from vmlab import Failure, check


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile()
        self.events = []
        self.lines.readline()
        self.do("qmp_capabilities")

    def do(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self.lines.readline())
            if "event" in answer:
                self.events.append(answer)
                continue
            check("return" in answer, f"QMP {command}: {answer.get('error')}")
            return answer["return"]

    def event(self, name):
        while not any(event["event"] == name for event in self.events):
            self.events.append(json.loads(self.lines.readline()))
        self.events = []


def value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def main():
    if len(sys.argv) < 3:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        answer = Qmp(sys.argv[1]).do(sys.argv[2], **{key: value(text) for key, text in (word.split("=", 1) for word in sys.argv[3:])})
    except (Failure, OSError, ValueError) as failure:
        print(f"vmqmp: {failure}", file=sys.stderr)
        return 1
    if answer:
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
