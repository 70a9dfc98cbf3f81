"""A proxy as a sidecar is one: what is redirected to it goes on to where it was meant to go.

    proxy.py PORT MARK IDLE

Connections that it makes carry MARK, so that they are not redirected again; those that are idle for IDLE seconds are
closed at both ends.
"""

import asyncio
import socket
import struct
import sys

SO_ORIGINAL_DST = 80


async def pump(reader, writer, idle):
    try:
        while data := await asyncio.wait_for(reader.read(65536), idle):
            writer.write(data)
            await writer.drain()
    except (asyncio.TimeoutError, OSError):
        pass
    finally:
        writer.close()


async def serve(reader, writer, mark, idle):
    found = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
    port, host = struct.unpack_from("!2xH4s", found)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (socket.inet_ntoa(host), port))
    except OSError:
        writer.close()
        sock.close()
        return
    far_reader, far_writer = await asyncio.open_connection(sock=sock)
    await asyncio.gather(pump(reader, far_writer, idle), pump(far_reader, writer, idle))


async def main():
    port, mark, idle = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    server = await asyncio.start_server(lambda r, w: serve(r, w, mark, idle), "127.0.0.1", port)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
