"""A uvicorn server on the main thread, a rank on another: it reports on its training. `fw_server.py`"""

import os
import threading
import time

import torch
import torch.distributed as dist
import uvicorn


async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"training"})


def train():
    dist.init_process_group("gloo")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    step = 0
    while True:
        weight.grad = torch.ones(1)
        dist.all_reduce(weight.grad)
        optimizer.step()
        step += 1
        if server.started:
            print(f"rank {dist.get_rank()} pid {os.getpid()} step {step}", flush=True)
        time.sleep(0.02)


server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off"))
threading.Thread(target=train, daemon=True).start()
server.run()
print("served", flush=True)
