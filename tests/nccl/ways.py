"""Ways to use the real class, one after the other, on two ranks; each prints its name when its numbers are right."""

import os

import torch
import torch.distributed as dist

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", rank)


def is_all(tensor, value):
    """Every element has that value."""
    assert tensor.tolist() == [value] * tensor.numel(), tensor.tolist()


def sends_and_receives():
    sent, received = torch.full((4,), rank + 1.0, device=device), torch.zeros(4, device=device)
    peer = 1 - rank
    both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    is_all(received, peer + 1.0)


def coalesced():
    tensors = [torch.full((4,), rank + 1.0, device=device) for _ in range(3)]
    with dist._coalescing_manager(device=device):
        for tensor in tensors:
            dist.all_reduce(tensor)
    for tensor in tensors:
        is_all(tensor, 3.0)


def on_a_side_stream():
    stream, tensor = torch.cuda.Stream(), torch.full((4,), rank + 1.0, device=device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        dist.all_reduce(tensor)
    torch.cuda.current_stream().wait_stream(stream)
    is_all(tensor, 3.0)


def in_a_graph():
    tensor = torch.ones(4, device=device)
    dist.all_reduce(torch.ones(4, device=device))  # a communicator cannot be made in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(tensor)
    for _ in range(3):
        graph.replay()
    is_all(tensor, float(size**3))


def new_and_split_groups():
    for group in (dist.new_group([0, 1]), dist.split_group(split_ranks=[[0, 1]])):
        tensor = torch.full((4,), rank + 1.0, device=device)
        dist.all_reduce(tensor, group=group)
        is_all(tensor, 3.0)
        dist.destroy_process_group(group)


def gathered_and_scattered():
    whole = torch.zeros(2 * size, device=device)
    dist.all_gather_into_tensor(whole, torch.full((2,), rank + 1.0, device=device))
    assert whole.tolist() == [1.0, 1.0, 2.0, 2.0]
    part = torch.zeros(2, device=device)
    dist.reduce_scatter_tensor(part, whole)
    is_all(part, 2.0 * (rank + 1))
    exchanged = torch.zeros(2, device=device)
    dist.all_to_all_single(exchanged, torch.tensor([rank * 2.0, rank * 2.0 + 1], device=device))
    assert exchanged.tolist() == [float(rank), rank + 2.0]


def pinned_memory():
    data = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=4, pin_memory=True)
    sums = [batch.to(device, non_blocking=True).sum().item() for batch in data]
    assert sums == [6.0, 22.0]


torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
everything = [
    *(sends_and_receives, coalesced, on_a_side_stream, in_a_graph),
    *(new_and_split_groups, gathered_and_scattered, pinned_memory),
]
for way in everything:
    way()
    print(way.__name__, flush=True)
dist.destroy_process_group()
