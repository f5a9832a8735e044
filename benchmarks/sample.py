"""Sampling against a plain Heun loop and against the machine's matrix products.

    python benchmarks/sample.py
    python benchmarks/sample.py --channels 64 --mult 1 2 2 --blocks 2 --images 32

The network is CIFAR's unless flags say otherwise, its weights are random: neither time nor rounding needs trained ones.
The plain loop calls it without compilation, with channels outermost, in the reference's fp16 on CUDA and in float32 on
a CPU, in the reference's batches of 64; each of its steps waits for the device to look at the noise level, as published
code does. Both call the network 2 steps - 1 times for each image. First both sample the same seeds, whose images must
agree; then the plain loop and the sampler in each precision take turns, and medians of the ratios are reported.

Time is that of a whole call of the sampler, drawing of the noise and rounding to uint8 included. seconds_per_50k is
extrapolated to 50,000 images of 35 network calls each, where less was measured. matmul_share is the share of the
machine's rate of square products in the same precision, best of a few sizes, that the products and convolutions of the
network make; peak_memory_gb is of torch's tensors on CUDA and of the whole process, plain loop included, on a CPU.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from rates import DTYPES, count_flops, peak_memory_gb, product_rate, reset_peak_memory, seconds
from record import arguments, end
from torch import Tensor, nn

from cedm_ray.diffusion.compute import ComputeSettings, Precision, decide
from cedm_ray.diffusion.heun import sigma_steps
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.sample_batch import fitting_batch
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.settings import NetSettings, build_net
from cedm_ray.diffusion.starts import draw_conditions, initial_noise

CLUSTERS, SEED = 100, 0
CALLS_OF_RECORD = 35
LARGEST_MEAN = 5.0  # grey levels; unrelated images differ by more than fifty


@torch.no_grad()
def plain_loop(net: EDMPrecond, latents: Tensor, clusters: Tensor, num_steps: int) -> Tensor:
    """Heun's method, arXiv 2206.00364, Algorithm 1, with the noise levels on the device."""
    levels = sigma_steps(num_steps).to(latents.device)
    x = latents.double() * levels[0]
    for now, after in pairwise(levels):
        slope = (x - denoised(net, x, now, clusters)) / now
        euler = x + (after - now) * slope
        if after > 0:
            slope = (slope + (euler - denoised(net, euler, after, clusters)) / after) / 2
            euler = x + (after - now) * slope
        x = euler
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def denoised(net: EDMPrecond, x: Tensor, sigma: Tensor, clusters: Tensor) -> Tensor:
    """D(x; sigma) in the reference's precision."""
    with torch.autocast(x.device.type, dtype=torch.float16, enabled=x.device.type == "cuda"):
        return net(x.float(), sigma.float(), clusters).double()


class Work:
    """What is measured: the network, as it is for the plain loop and for the sampler."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        settings = NetSettings(args.channels, tuple(args.mult), args.blocks, tuple(args.attention))
        torch.manual_seed(SEED)
        net = build_net(settings, args.resolution, 3, CLUSTERS, augment=True)
        for parameter in net.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)  # initial weights would make an output of almost nothing
        self.plain = net.to(device).eval().requires_grad_(False)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.net = deepcopy(self.plain).to(memory_format=layout)
        self.args, self.device, self.probs = args, device, torch.ones(CLUSTERS)
        self.shape = (3, args.resolution, args.resolution)
        self.calls = 2 * args.steps - 1
        one = torch.zeros(1, *self.shape, device=device), torch.ones(1, device=device)
        with torch.no_grad():
            self.flop_per_call = count_flops(lambda: self.plain(*one, torch.zeros(1, dtype=torch.int64, device=device)))

    def by_plain_loop(self, count: int) -> Tensor:
        """Images from the plain loop."""
        parts = []
        for first in range(0, count, self.args.baseline_batch):
            indices = range(first, min(first + self.args.baseline_batch, count))
            latents = initial_noise(SEED, indices, self.shape, "cpu").to(self.device)
            clusters = draw_conditions(SEED, indices, self.probs).to(self.device)
            parts.append(plain_loop(self.plain, latents, clusters, self.args.steps))
        return torch.cat(parts)

    def by_sampler(self, count: int, precision: Precision, steps: int | None = None) -> Tensor:
        """Images from the package's sampler."""
        args = self.args
        return torch.cat(
            list(
                generate(
                    self.net,
                    seed=SEED,
                    indices=range(count),
                    cluster_probs=self.probs,
                    batch_size=args.batch,
                    num_steps=steps or args.steps,
                    device=self.device,
                    precision=precision,
                    compile=args.compile,
                )
            )
        )


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    cuda = torch.cuda.is_available()
    best = decide(ComputeSettings(), torch.device("cuda" if cuda else "cpu"))
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--mult", type=int, nargs="+", default=[2, 2, 2], help="channels of each level, in --channels")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of a level")
    parser.add_argument("--attention", type=int, nargs="*", default=[16], help="resolutions with attention")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU; as torch finds best if left out")
    precisions = ["fp16", "bf16"] if cuda else ["float32", "bf16"]
    parser.add_argument("--precisions", nargs="+", choices=[*DTYPES], default=precisions)
    parser.add_argument("--steps", type=int, default=18 if cuda else 2, help="of the sampler")
    parser.add_argument("--images", type=int, help="of a turn of the sampler; two batches on CUDA, 8 on a CPU")
    parser.add_argument("--batch", type=int, help="of the sampler; what fills the device if left out")
    parser.add_argument("--baseline-images", type=int, default=256 if cuda else 8, help="of a turn of the plain loop")
    parser.add_argument("--baseline-batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="how often all are measured, in turns")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=best.compile)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=best.channels_last)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def mean_difference(work: Work, precision: Precision) -> float:
    """Mean difference of the images of both, in grey levels."""
    count = min(work.args.images, work.args.baseline_images)
    apart = float((work.by_plain_loop(count).int() - work.by_sampler(count, precision).int()).abs().float().mean())
    if apart > LARGEST_MEAN:
        raise SystemExit(f"images of sampler ({precision}) and plain loop differ by {apart:.2f} grey levels on average")
    return apart


def measured(work: Work, precision: Precision, plain_rate: Callable[[], float]) -> dict[str, Any]:
    """Figures of one precision."""
    args, device = work.args, work.device
    work.by_sampler(args.images, precision, steps=1)  # past compiling
    apart = mean_difference(work, precision)
    rates, ratios, machine, memory = [], [], [], 0.0
    for _ in range(args.rounds):
        plain = plain_rate()
        reset_peak_memory(device)
        rates.append(args.images / seconds(lambda: work.by_sampler(args.images, precision), device))
        memory = max(memory, peak_memory_gb(device))
        ratios.append(rates[-1] / plain)
        machine.append(product_rate(device, DTYPES[precision]))
        print(f"{precision}: {rates[-1]:.4g} images/s; plain loop {plain:.4g}; ratio {ratios[-1]:.3f}", flush=True)
    rate, flop = median(rates), work.calls * work.flop_per_call
    return {
        "speedup_over_baseline": round(median(ratios), 3),
        "images_per_s": round(rate, 4),
        "seconds_per_50k": round(50_000 / rate * CALLS_OF_RECORD / work.calls, 1),
        "matmul_share": round(median(flop * ours / best for ours, best in zip(rates, machine, strict=True)), 3),
        "matmul_tflop_per_s": round(median(machine) / 1e12, 4),
        "peak_memory_gb": round(memory, 3),
        "mean_grey_levels_from_baseline": round(apart, 4),
    }


def main() -> None:
    args = parsed()
    device = torch.device(args.device)
    work = Work(args, device)
    args.batch = args.batch or fitting_batch(work.net, device)
    args.images = args.images or (2 * args.batch if device.type == "cuda" else 8)
    print(f"{work.flop_per_call / 1e9:.4g} GFLOP for a network call and image; batches of {args.batch}", flush=True)
    work.by_plain_loop(min(args.baseline_images, args.baseline_batch))

    def plain_rate() -> float:
        return args.baseline_images / seconds(lambda: work.by_plain_loop(args.baseline_images), device)

    by_precision = {precision: measured(work, precision, plain_rate) for precision in args.precisions}
    first: Precision = args.precisions[0]
    figures = {
        **by_precision[first],
        "precision": first,
        "by_precision": by_precision,
        "gflop_per_call": round(work.flop_per_call / 1e9, 2),
        "network_calls_per_image": work.calls,
        "images_of_a_turn": args.images,
        "batch": min(args.batch, args.images),
        "baseline_batch": args.baseline_batch,
        "compiled": args.compile,
        "channels_last": args.channels_last,
        "extrapolated": f"seconds_per_50k from {args.images} images of {work.calls} network calls each",
    }
    end(figures, args.json)


if __name__ == "__main__":
    main()
