"""echo_server.py asyncio|threading|forking HOST PORT"""

import asyncio
import socketserver
import sys

KIND, HOST, PORT = sys.argv[1], sys.argv[2], int(sys.argv[3])


async def echo(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def serve():
    server = await asyncio.start_server(echo, HOST, PORT)
    async with server:
        await server.serve_forever()


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


if KIND == "asyncio":
    asyncio.run(serve())
else:
    kinds = {"threading": socketserver.ThreadingTCPServer, "forking": socketserver.ForkingTCPServer}
    kinds[KIND].allow_reuse_address = True
    kinds[KIND]((HOST, PORT), Echo).serve_forever()
