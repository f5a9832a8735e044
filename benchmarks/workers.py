"""Training images per second against the number of processes, the total batch held constant; no Ray.

    python benchmarks/workers.py

Each process trains the product's way (cedm_ray.diffusion.train under torch.distributed, NCCL on GPUs and Gloo on a CPU)
on its part of the batch. On GPUs each process has one, and only as many processes run as there are GPUs. On a CPU each
process has --threads threads (1): with more processes than cores they share cores, which the table says.

Two efficiencies. "efficiency" is the rate over that of one process with the same threads (one GPU) times the number of
processes: 1 is perfect scaling, and what is lost goes to communication, to smaller parts of the batch, and to shared
memory bandwidth. "efficiency_same_cores" is the rate over that of one process on all the cores that the processes have
together: whether to split at all. Every round runs all of them one after another; the ratios are medians over rounds.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rates import finish, seconds
from record import arguments, end

from cedm_ray.diffusion.compute import ComputeSettings, decide
from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net
from cedm_ray.diffusion.train import train
from cedm_ray.diffusion.train_state import new_state

NUM_IMAGES, NUM_CLUSTERS = 2_048, 100


@dataclass(frozen=True)
class Setup:
    """Processes and the threads of each."""

    workers: int
    threads: int


def parsed() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--batch", type=int, default=1024 if cuda else 64, help="of all processes together")
    parser.add_argument("--steps", type=int, default=20 if cuda else 4, help="steps of a measurement")
    parser.add_argument("--warmup", type=int, default=10 if cuda else 1, help="steps before it")
    parser.add_argument("--rounds", type=int, default=3, help="how often all are measured, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of each process on a CPU")
    parser.add_argument("--channels", type=int, default=128 if cuda else 32)
    parser.add_argument("--blocks", type=int, default=4 if cuda else 2, help="residual blocks per level")
    args = parser.parse_args()
    if min(*args.workers, args.batch, args.steps, args.rounds, args.threads) < 1:
        parser.error("--workers, --batch, --steps, --rounds and --threads must be at least 1")
    if any(args.batch % workers for workers in args.workers):
        parser.error("--batch must be a multiple of each number of --workers")
    return args


def work(rank: int, setup: Setup, args: argparse.Namespace, folder: str) -> None:
    """One process: train, and let the first one write down how long the steps took."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(setup.threads)
    if setup.workers > 1:
        # Gloo takes the network of the machine's name otherwise, which not every machine has.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if cuda else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=setup.workers
        )
    took_s = measured(device, args, rank, setup.workers)
    if rank == 0:
        Path(folder, "rate.json").write_text(json.dumps(args.batch * args.steps / took_s))
    if setup.workers > 1:
        dist.destroy_process_group()


def measured(device: torch.device, args: argparse.Namespace, rank: int, workers: int) -> float:
    """Seconds of the measured steps."""
    torch.manual_seed(0)
    network = NetSettings(model_channels=args.channels, num_blocks=args.blocks)
    net = build_net(network, 32, 3, NUM_CLUSTERS, augment=True).to(device)
    images = torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8).to(device)
    clusters = torch.randint(0, NUM_CLUSTERS, (NUM_IMAGES,)).to(device)
    steps = train(
        new_state(net),
        ResidentImages(images, clusters),
        settings=TrainSettings(total_batch=args.batch),
        stop_nimg=args.batch * (args.warmup + args.steps),
        seed=0,
        compute=decide(ComputeSettings(), device),
        rank=rank,
        world_size=workers,
    )
    for _ in range(args.warmup):
        next(steps)
    finish(device)
    if workers > 1:
        dist.barrier()

    def rest() -> None:
        for _ in steps:
            pass
        if workers > 1:
            dist.barrier()

    return seconds(rest, device)


def rate(setup: Setup, args: argparse.Namespace) -> float:
    """Images per second of all processes together."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (setup, args, folder), nprocs=setup.workers)
        return float(json.loads(Path(folder, "rate.json").read_text()))


def setups(args: argparse.Namespace) -> tuple[list[Setup], dict[Setup, Setup]]:
    """What is measured, and for each setup the single process on the same cores."""
    gpus = torch.cuda.device_count()
    counts = sorted({1, *args.workers})
    if gpus:
        measured = [Setup(workers, args.threads) for workers in counts if workers <= gpus]
        return measured, {setup: measured[0] for setup in measured}
    measured = [Setup(workers, args.threads) for workers in counts]
    cores = os.cpu_count() or 1
    same = {setup: Setup(1, min(setup.workers * args.threads, max(cores, args.threads))) for setup in measured}
    return measured, same


def by_workers(measured: list[Setup], value: Callable[[Setup], float], digits: int) -> dict[str, float]:
    return {str(setup.workers): round(value(setup), digits) for setup in measured}


def main() -> None:
    args = parsed()
    measured, same = setups(args)
    wanted = list(dict.fromkeys([*measured, *same.values()]))
    rounds: list[dict[Setup, float]] = []
    for _ in range(args.rounds):
        rounds.append({setup: rate(setup, args) for setup in wanted})
        shown = (f"{setup.workers} x {setup.threads}: {each:,.1f}" for setup, each in rounds[-1].items())
        print("images/s by processes x threads:", ", ".join(shown), flush=True)
    one = measured[0]

    def ratio(setup: Setup, base: Setup, times: int) -> float:
        return statistics.median(each[setup] / each[base] / times for each in rounds)

    cores = os.cpu_count() or 1
    figures: dict[str, Any] = {
        "images_per_s": by_workers(measured, lambda setup: statistics.median(each[setup] for each in rounds), 1),
        "efficiency": by_workers(measured, lambda setup: ratio(setup, one, setup.workers), 3),
        "efficiency_same_cores": by_workers(measured, lambda setup: ratio(setup, same[setup], 1), 3),
        "one_process_images_per_s": {
            str(setup.threads): round(statistics.median(each[setup] for each in rounds), 1)
            for setup in wanted
            if setup.workers == 1
        },
        "threads_per_worker": args.threads,
        "oversubscribed": [
            setup.workers
            for setup in measured
            if not torch.cuda.is_available() and setup.workers * args.threads > cores
        ],
        "batch": args.batch,
        "network": {"channels": args.channels, "blocks": args.blocks},
        "backend": "nccl" if torch.cuda.is_available() else "gloo",
    }
    for setup in measured:
        key = str(setup.workers)
        note = f" (more processes than the {cores} cores)" if setup.workers in figures["oversubscribed"] else ""
        shares = f"{figures['efficiency'][key]:.2f}, {figures['efficiency_same_cores'][key]:.2f} on the same cores"
        print(f"{key} processes: {figures['images_per_s'][key]:,} images/s, efficiency {shares}{note}")
    end(figures, args.json)


if __name__ == "__main__":
    main()
