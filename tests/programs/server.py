"""A uvicorn server in the same process as a rank. `server.py main|thread asyncio|uvloop`: its thread, and its loop.

Training runs on the other thread.
"""

import sys
import threading
import time

import torch
import torch.distributed as dist
import uvicorn


async def app(scope, receive, send):
    """Says what the server does, and answers every request."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("server shut down", "with a group" if dist.is_initialized() else "without a group", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


class Server(uvicorn.Server):
    """Says when it is up."""

    async def startup(self, sockets=None):
        await super().startup(sockets)
        print("port", self.servers[0].sockets[0].getsockname()[1], flush=True)


def train():
    """Step for ever."""
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = 0
    while True:
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        step += 1
        print("step", step, flush=True)
        time.sleep(0.01)


where, loop = sys.argv[1:]
server = Server(uvicorn.Config(app, port=0, log_level="warning", loop=loop))
one, other = (server.run, train) if where == "main" else (train, server.run)
threading.Thread(target=other, daemon=True).start()
one()
print("main is over", flush=True)
