"""A training step of C-EDM against a plain one and against the machine's matrix products.

    python benchmarks/train.py
    python benchmarks/train.py --channels 32 --num-blocks 1 --batch 16

The network is the paper's for CIFAR on random images; neither time depends on their values. The plain step is what one
writes first: eager, channels outermost, fp16 autocast with a scaled loss on a GPU and float32 on a CPU, averaged
weights and cleaned gradients parameter by parameter, the loss read at every step. Both augment by the same code, in
steps that alternate; medians of their ratios are reported. ``--precision``, ``--no-channels-last``, ``--compile`` and
``--device-batch`` choose how ours is computed.

The products of a step are counted in the network: forward, and twice that backward. The machine's rate is the best of a
few sizes in the same precision. On a CPU the peak memory is that of the process, the plain step included.
"""

import argparse
import copy
from collections.abc import Iterator
from statistics import median

import torch
from rates import DTYPES, count_flops, peak_memory_gb, product_rate, reset_peak_memory, seconds
from record import arguments, end
from torch import Tensor, nn

from cedm_ray.diffusion.augment import augment
from cedm_ray.diffusion.compute import Compute, ComputeSettings, decide
from cedm_ray.diffusion.ema import ema_beta
from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.loss import edm_loss_per_pixel, sample_sigma
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net
from cedm_ray.diffusion.train import train
from cedm_ray.diffusion.train_state import new_state


class PlainStep:
    """A training as one writes it first."""

    def __init__(self, net: EDMPrecond, images: Tensor, clusters: Tensor, settings: TrainSettings) -> None:
        self.net, self.ema = net.train(), copy.deepcopy(net).eval().requires_grad_(False)
        self.images, self.clusters, self.settings = images, clusters, settings
        self.optimizer = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
        self.half = images.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(images.device.type, init_scale=1024.0, enabled=self.half)
        self.seen = 0

    def step(self) -> float:
        settings, device = self.settings, self.images.device
        chosen = torch.randint(len(self.images), (settings.total_batch,))
        y, labels = augment(self.images[chosen.to(device)].float() / 127.5 - 1, settings.augment_prob)
        sigma = sample_sigma(len(y), settings.P_mean, settings.P_std, None, device)
        self.optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16, enabled=self.half):
            clusters = self.clusters[chosen.to(device)]
            loss = edm_loss_per_pixel(self.net, y, sigma, torch.randn_like(y), clusters, labels).sum() / len(y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for parameter in self.net.parameters():
            torch.nan_to_num_(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5)
        self.seen += len(y)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(self.seen / (settings.lr_rampup_kimg * 1000), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        beta = ema_beta(len(y), self.seen, settings.ema_halflife_kimg * 1000)
        with torch.no_grad():
            for mean, parameter in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                mean.copy_(parameter.lerp(mean, beta))
        return loss.item()


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = decide(
        ComputeSettings(args.precision, "auto", args.channels_last, args.compile, args.device_batch), device
    )
    net = NetSettings(args.channels, tuple(args.mult), args.num_blocks, (16,))
    settings = TrainSettings(total_batch=args.batch)
    images = torch.randint(0, 256, (args.images, 3, args.resolution, args.resolution), dtype=torch.uint8, device=device)
    clusters = torch.randint(0, args.clusters, (args.images,), device=device)
    torch.backends.cudnn.benchmark = True

    def build() -> EDMPrecond:
        torch.manual_seed(0)
        return build_net(net, args.resolution, 3, args.clusters, augment=True).to(device)

    flops = 3 * flops_of(build(), device)
    rate = product_rate(device, DTYPES[compute.precision])
    plain = PlainStep(build(), images, clusters, settings)
    steps = train(
        new_state(build()),
        ResidentImages(images, clusters),
        settings=settings,
        stop_nimg=10**12,
        seed=0,
        compute=compute,
    )
    memory, plain_s, ours_s = {}, [], []
    for each, step in (("plain", plain.step), ("ours", lambda: next(steps))):
        reset_peak_memory(device)
        for _ in range(2):
            step()
        memory[each] = peak_memory_gb(device)
    for _ in range(args.rounds):
        plain_s.append(time_of(plain.step, args.steps, device))
        ours_s.append(time_of(lambda: next(steps), args.steps, device))
    report(args, compute, flops, rate, plain_s, ours_s, memory)


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--mult", type=int, nargs="+", default=[2, 2, 2])
    parser.add_argument("--num-blocks", type=int, default=4)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--batch", type=int, default=512 if on_gpu else 8)
    parser.add_argument("--images", type=int, default=50_000 if on_gpu else 2_000)
    parser.add_argument("--precision", choices=["auto", *DTYPES], default="auto" if on_gpu else "bf16")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--device-batch", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 1, help="in a row")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def flops_of(net: nn.Module, device: torch.device) -> int:
    """Operations of the network's products for one image, forward."""
    x = torch.randn(1, net.img_channels, net.img_resolution, net.img_resolution, device=device)
    clusters = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        return count_flops(lambda: net(x, torch.ones(1, device=device), clusters))


def time_of(step: object, count: int, device: torch.device) -> float:
    def work() -> None:
        for _ in range(count):
            step()

    return seconds(work, device) / count


def report(
    args: argparse.Namespace,
    compute: Compute,
    flops: int,
    rate: float,
    plain_s: list[float],
    ours_s: list[float],
    memory: dict[str, float],
) -> None:
    speedup = median(theirs / ours for theirs, ours in zip(plain_s, ours_s, strict=True))
    images_per_s = args.batch / median(ours_s)
    share = images_per_s * flops / rate
    for line in lines(compute, flops, rate, plain_s, ours_s, args.batch):
        print(line)
    print(f"speedup {speedup:.2f}, share of the matrix products' rate {share:.2f}")
    end(
        {
            "speedup_over_baseline": round(speedup, 3),
            "speedup_range": [round(f(a / b for a, b in zip(plain_s, ours_s, strict=True)), 3) for f in (min, max)],
            "matmul_share": round(share, 3),
            "images_per_s": round(images_per_s, 2),
            "baseline_images_per_s": round(args.batch / median(plain_s), 2),
            "peak_memory_gb": round(memory["ours"], 2),
            "gflop_per_image": round(flops / 1e9, 2),
            "product_gflop_per_s": round(rate / 1e9, 1),
            "precision": compute.precision,
            "channels_last": compute.channels_last,
            "compile": compute.compile,
            "batch": args.batch,
        },
        args.json,
    )


def lines(
    compute: Compute, flops: int, rate: float, plain_s: list[float], ours_s: list[float], batch: int
) -> Iterator[str]:
    """What a person reads."""
    yield f"{compute}"
    yield f"{flops / 1e9:.1f} GFLOP an image seen; products at {rate / 1e9:.0f} GFLOP/s"
    for name, times in (("plain", plain_s), ("ours", ours_s)):
        yield f"{name:6} {batch / median(times):9.2f} images/s ({1000 * median(times):.1f} ms a step)"


if __name__ == "__main__":
    main()
