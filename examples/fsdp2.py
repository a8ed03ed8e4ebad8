"""Train a small GPT under FSDP2 with Muon, save a sharded checkpoint, and go on from it with any number of ranks.

    torchrun --nproc-per-node 2 examples/fsdp2.py                   # on CPUs (gloo), on GPUs with nccl
    torchrun --nproc-per-node 4 examples/fsdp2.py --steps 60        # goes on from the checkpoint, with 4 ranks
    torchrun --nproc-per-node 2 examples/fsdp2.py --fresh --optimizer SOAP

The batch of a step is the same for every number of ranks, which take equal parts of it, so losses are too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import steepest
from steepest.tools.compare.gpt import GPT, Shape
from steepest.tools.compare.text import load, windows

SHAPE = Shape(layers=2, width=64, heads=2, context=64)
RATES = {"Muon": 0.02, "MuAdam": 1e-3, "SOAP": 4e-3}  # of the matrices
ADAMW_RATE = 4e-3
EVERY = 10  # steps between two lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as torchrun starts it, one process a rank; -> exit status."""
    options = parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        train(options, device)
        dist.barrier()  # nobody leaves while others still talk
    finally:
        dist.destroy_process_group()
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=40, help="in all, those before the checkpoint included (default: 40)")
    p.add_argument("--batch", type=int, default=24, help="windows a step, of all ranks together (default: 24)")
    p.add_argument("--optimizer", choices=RATES, default="Muon")
    p.add_argument("--text", type=Path, metavar="FILE", help="text to train on (default: Python's standard library)")
    p.add_argument("--checkpoint", type=Path, default=Path("fsdp2-checkpoint"), metavar="FOLDER")
    p.add_argument("--fresh", action="store_true", help="begin anew even where there is a checkpoint")
    return p


def train(options: argparse.Namespace, device: str) -> list[float]:
    """The losses of this run's steps, in nats per byte over all ranks. The process group is there."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if options.batch % ranks:
        raise SystemExit(f"--batch {options.batch} is no multiple of {ranks} ranks")
    mesh = init_device_mesh(device, (ranks,))
    model = GPT.create(SHAPE, seed=0).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    method = getattr(steepest, options.optimizer)
    optimizer = method(model, lr=RATES[options.optimizer], adamw_lr=ADAMW_RATE)  # after fully_shard: of its parameters

    state = {"step": torch.zeros((), dtype=torch.int64)}
    if not options.fresh and (options.checkpoint / ".metadata").exists():
        load_checkpoint(options.checkpoint, model, optimizer, state)
    say(f"{options.optimizer} on {ranks} ranks ({device}), from step {int(state['step'])}")

    text = load(options.text, SHAPE.context).train
    losses = []
    for step in range(int(state["step"]), options.steps):
        inputs, targets = windows(text, options.batch, SHAPE.context, torch.Generator().manual_seed(step))
        loss = model_loss(model, inputs.chunk(ranks)[rank].to(device), targets.chunk(ranks)[rank].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach()))
        state["step"] += 1
        if step % EVERY == EVERY - 1 or step + 1 == options.steps:
            say(f"step {step + 1:4d}  loss {losses[-1]:.4f}")

    save_checkpoint(options.checkpoint, model, optimizer, state)
    say(f"saved in {options.checkpoint}")
    return losses


def model_loss(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """The model is called as a module: hooks of fully_shard gather its weights."""
    return torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def save_checkpoint(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """On all ranks: each writes what it has."""
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments, **state}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder, overwrite=True))


def load_checkpoint(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """On all ranks: each reads what it is to have, whatever the number of ranks that saved."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments, **state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def mean(loss: Tensor) -> float:
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
