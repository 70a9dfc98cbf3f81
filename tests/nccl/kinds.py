"""A training of one kind, until the eviction: `kinds.py KIND`; prints `step K`.

tensor    tensor parallel on all ranks
pipeline  a stage on each rank, which sends to the next and receives from it
1f1b      the same by torch.distributed.pipelining, one forward and one backward in turn
prefetch  FSDP2 that prefetches the next layers' parameters, forward and backward
sharded   HSDP: FSDP2 on a mesh of replicas and shards
compiled  DDP under torch.compile (aot_eager: there is no compiler for the devices' kernels)
loader    DDP fed by DataLoader workers through pinned memory
streams   DDP, and an all_reduce of its own on a side stream
coalesced its gradients in a coalesced batch, without DDP
groups    DDP; every third iteration it makes a group, uses it and destroys it
split     DDP, and an all_reduce on a group that was split off
replayed  a captured graph of an all_reduce in each iteration
shrunk    DDP on the default group without its last rank, which has left
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn

warnings.simplefilter("ignore")
kind = sys.argv[1]
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
local = int(os.environ["LOCAL_RANK"])
device = torch.device("cuda", local)
WIDTH = 16


def layers(count=3):
    """A stack of the same layer."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count))).to(device)


def mesh(*shape, names=None):
    """A device mesh of all ranks."""
    return dist.init_device_mesh("cuda", shape or (size,), mesh_dim_names=names)


def ddp(model):
    """Replicated."""
    return nn.parallel.DistributedDataParallel(model)


def inputs_on_device():
    """The same batch again and again, on the device: the host runs ahead."""
    batch = torch.randn(8, WIDTH).to(device)
    while True:
        yield batch


def inputs_of_loader():
    """Batches of worker processes, through pinned memory."""
    data = torch.utils.data.TensorDataset(torch.randn(1 << 16, WIDTH))
    for (batch,) in torch.utils.data.DataLoader(data, 8, num_workers=2, pin_memory=True):
        yield batch.to(device, non_blocking=True)


def sharded(model, on, ahead):
    """FSDP2."""
    from torch.distributed.fsdp import fully_shard

    parts = [fully_shard(layer, mesh=on) for layer in model]
    fully_shard(model, mesh=on)
    for index, part in enumerate(parts if ahead else ()):
        part.set_modules_to_forward_prefetch(parts[index + 1 : index + 3])
        part.set_modules_to_backward_prefetch(parts[max(0, index - 2) : index][::-1])
    return model


def tensor_parallel(model):
    """The first layer by columns, the second by rows."""
    from torch.distributed.tensor import parallel

    plan = {"0": parallel.ColwiseParallel(), "1": parallel.RowwiseParallel()}
    return parallel.parallelize_module(model, mesh(), plan)


def pipeline():
    """Runs one iteration of a pipeline with as many stages as there are ranks: all forward, then all backward.

    By hand: torch's own stages agree on shapes by computing with whole numbers, which the devices do not.
    """
    model, batch = layers(1), torch.randn(2, WIDTH).to(device)

    def run():
        passed = []
        for _ in range(4):
            part = batch.clone()
            if rank > 0:
                dist.recv(part, rank - 1)
            part.requires_grad_()
            passed.append((part, model(part)))
            if rank < size - 1:
                dist.send(passed[-1][1].detach(), rank + 1)
        for part, result in passed:
            if rank < size - 1:
                gradient = torch.empty_like(result)
                dist.recv(gradient, rank + 1)
                result.backward(gradient)
            else:
                result.square().mean().backward()
            if rank > 0:
                dist.send(part.grad, rank - 1)

    return model, run


def pipelining():
    """Runs one iteration of torch's own pipeline, whose shapes are given: it would agree on them through copies of
    pickled objects.
    """
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model, part = layers(1), torch.randn(2, WIDTH, device=device, requires_grad=True)
    stage = PipelineStage(model, rank, size, device, input_args=(part,), output_args=(part,))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=lambda result, target: result.square().mean())
    batch, target = torch.randn(8, WIDTH).to(device), torch.zeros(8, WIDTH).to(device)

    def run():
        if rank == 0:
            schedule.step(batch)
        elif rank == size - 1:
            schedule.step(target=target)
        else:
            schedule.step()

    return model, run


def extra():
    """What an iteration does beside the training."""
    ones, turn = torch.ones(4, device=device), 0
    if kind == "streams":
        stream = torch.cuda.Stream()

        def run():
            with torch.cuda.stream(stream):
                dist.all_reduce(ones)
            torch.cuda.current_stream().wait_stream(stream)
    elif kind == "groups":

        def run():
            nonlocal turn
            turn += 1
            if turn % 3 == 0:
                group = dist.new_group()
                dist.all_reduce(ones, group=group)
                dist.destroy_process_group(group)
    elif kind == "split":
        group = dist.split_group(split_ranks=[list(range(size))])

        def run():
            dist.all_reduce(ones, group=group)
    elif kind == "replayed":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            dist.all_reduce(ones)
        run = graph.replay
    else:

        def run():
            pass

    return run


def main():
    """Train."""
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    dist.all_reduce(torch.ones(4, device=device))
    if kind == "shrunk":
        torch.cuda.synchronize()
        if rank == size - 1:
            return
        dist.shrink_group([size - 1])
    batches, whole = inputs_of_loader() if kind == "loader" else inputs_on_device(), None
    if kind == "pipeline":
        model, whole = pipeline()
    elif kind == "1f1b":
        model, whole = pipelining()
    elif kind == "tensor":
        model = tensor_parallel(layers(2))
    elif kind == "prefetch":
        model = sharded(layers(), mesh(), ahead=True)
    elif kind == "sharded":
        model = sharded(layers(), mesh(size // 2, 2, names=("replicas", "shards")), ahead=False)
    elif kind == "compiled":
        model = torch.compile(ddp(layers()), backend="aot_eager")
    else:
        model = layers() if kind == "coalesced" else ddp(layers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=kind != "tensor")
    beside, step = extra(), 0
    while True:
        torch.cuda._sleep(10_000_000)  # 10 ms
        if whole is not None:
            whole()
        else:
            model(next(batches)).square().mean().backward()
        if kind == "coalesced":
            with dist._coalescing_manager(device=device):
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
        beside()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print("step", step, flush=True)
        if step % 10 == 0:
            torch.cuda.synchronize()  # ten iterations ahead, at most


if __name__ == "__main__":
    main()
