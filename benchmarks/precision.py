"""What the precision of the sampler does to images and to FID: the same seeds in float32, bf16 and fp16.

    python benchmarks/precision.py --model runs/cifar10/model --data-dir data --inception inception.pt --images 10000
    python benchmarks/precision.py --train-kimg 20 --data-dir data --inception inception.pt

The model is an exported one, or a small one that is trained on CIFAR-10's labels first. All sets have as many images;
each is compared with the set of the first seed in float32: difference in grey levels, share of the values that differ,
FID against CIFAR-10's first training images, and the change of FID by the precision in units of the scatter of FID
between seeds, the standard deviation over sets in float32 of --seeds seeds. FID between the two sets themselves shows a
change even where FID against real images happens to stay. It takes 2,048 images at least.

No CPU of today has fp16's convolutions at a useful speed. There, products in fp16 are computed in float32, from fp16's
values to fp16's values: what a GPU does, whose products are exact and are summed up in float32.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from record import arguments, end
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cedm_ray.data.cifar import CIFAR10, open_cifar
from cedm_ray.diffusion.compute import ComputeSettings, Precision, decide
from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.model_file import load_model
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net
from cedm_ray.diffusion.train import train
from cedm_ray.diffusion.train_state import new_state
from cedm_ray.metrics.frechet import FeatureSums, frechet_distance
from cedm_ray.metrics.inception import InceptionDetector, load_inception

SEED = 0
SMALL_NET = NetSettings(model_channels=32, channel_mult=(1, 2, 2), num_blocks=1, dropout=0.0)
SHORT_TRAINING = TrainSettings(
    total_batch=128, lr=2e-3, lr_rampup_kimg=2.0, augment_prob=0.0, ema_halflife_kimg=2.0, ema_rampup_ratio=0.2
)
PRODUCTS = {torch.ops.aten.convolution.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default}
PRODUCTS |= {torch.ops.aten.bmm.default}
Gaussian = tuple[Tensor, Tensor]


class QuickHalf(TorchDispatchMode):
    """Products in fp16 from float32's: rounded before and after, exact and summed up in float32 between."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not any(is_half(value) for value in args):
            return func(*args, **kwargs)
        return func(*(value.float() if is_half(value) else value for value in args), **kwargs).half()


def is_half(value: object) -> bool:
    """Whether it is a tensor of fp16."""
    return isinstance(value, Tensor) and value.dtype == torch.float16


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", type=Path, help="folder of an exported model of CIFAR-10")
    parser.add_argument("--train-kimg", type=float, default=20.0, help="without --model: images to train on, thousands")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--inception", type=Path, help="weights of the detector; fetched if left out")
    parser.add_argument("--images", type=int, default=10_000 if cuda else 2_048, help="of each set, the real one too")
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp16"], default=["bf16", "fp16"])
    parser.add_argument("--seeds", type=int, default=5 if cuda else 2, help="sets in float32, at least 2")
    parser.add_argument("--steps", type=int, default=18, help="of the sampler")
    parser.add_argument("--batch", type=int, help="of the sampler; what fills the device if left out")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU; as torch finds best if left out")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}; a scatter takes at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def trained(images: Tensor, labels: Tensor, kimg: float, device: torch.device) -> EDMPrecond:
    """A small network that has seen so many images."""
    torch.manual_seed(SEED)
    compute = decide(ComputeSettings(compile=False), device)
    state = new_state(build_net(SMALL_NET, images.shape[-1], images.shape[1], 10, augment=False).to(device))
    source = ResidentImages(images.to(device), labels.to(device))
    stop = round(kimg * 1000)
    for progress in train(state, source, settings=SHORT_TRAINING, stop_nimg=stop, seed=SEED, compute=compute):
        if progress.nimg % 5120 == 0 or progress.nimg >= stop:
            print(f"{progress.nimg} images seen, loss {float(progress.loss):.1f}", flush=True)
    return state.ema


class Sets:
    """The sets of images of one model, and their features' Gaussians."""

    def __init__(self, net: EDMPrecond, detector: InceptionDetector, args: argparse.Namespace) -> None:
        self.net, self.detector, self.args = net, detector, args
        self.probs = torch.ones(net.label_dim) if net.label_dim else None

    def of(self, precision: Precision, seed: int) -> tuple[Tensor, Gaussian]:
        """Images ``(N, C, R, R)`` uint8 on the CPU, mean and covariance of their features."""
        start = time.perf_counter()
        emulated = precision == "fp16" and torch.device(self.args.device).type == "cpu"
        mode: AbstractContextManager[object] = QuickHalf() if emulated else nullcontext()
        with mode:
            images = torch.cat([batch.cpu() for batch in self.batches(precision, seed)])
        sampled = time.perf_counter()
        gaussian = self.gaussian(images)
        print(
            f"{precision}, seed {seed}: sampled in {sampled - start:.0f} s, "
            f"features in {time.perf_counter() - sampled:.0f} s",
            flush=True,
        )
        return images, gaussian

    def batches(self, precision: Precision, seed: int) -> Iterator[Tensor]:
        """The images of a seed, batch by batch."""
        args = self.args
        return generate(
            self.net,
            seed=seed,
            indices=range(args.images),
            cluster_probs=self.probs,
            batch_size=args.batch,
            num_steps=args.steps,
            device=args.device,
            precision=precision,
        )

    def gaussian(self, images: Tensor) -> Gaussian:
        """Mean ``(2048,)`` and covariance ``(2048, 2048)`` of the features."""
        sums = FeatureSums(self.detector.dim, device=self.args.device)
        for part in images.split(64):
            sums.update(self.detector(part.to(self.args.device)))
        return sums.mean_cov()


def compared(images: Tensor, plain: Tensor) -> dict[str, float]:
    """How far images are from those in float32, in grey levels."""
    apart = (images.int() - plain.int()).abs()
    return {
        "mean_grey_levels": round(float(apart.float().mean()), 4),
        "max_grey_levels": int(apart.max()),
        "share_that_differs": round(float((apart > 0).float().mean()), 4),
    }


def main() -> None:
    args = parsed()
    device = torch.device(args.device)
    source = open_cifar(CIFAR10, args.data_dir.expanduser())
    real, labels = torch.from_numpy(source.read(0, len(source))), source.labels()
    assert labels is not None
    detector = load_inception(args.inception, device=device)
    if args.model is None:
        net = trained(real, torch.from_numpy(labels), args.train_kimg, device)
    else:
        net = load_model(args.model, device=device)
    sets = Sets(net.eval(), detector, args)
    truth = sets.gaussian(real[: args.images])
    plain, own = sets.of("float32", SEED)
    fids = [frechet_distance(*own, *truth)]
    for seed in range(SEED + 1, SEED + args.seeds):
        fids.append(frechet_distance(*sets.of("float32", seed)[1], *truth))
    scatter = stdev(fids)
    print(f"float32: FID {', '.join(f'{fid:.3f}' for fid in fids)}; scatter {scatter:.3f}", flush=True)
    by_precision = {}
    for precision in args.precisions:
        images, gaussian = sets.of(precision, SEED)
        fid = frechet_distance(*gaussian, *truth)
        by_precision[precision] = {
            **compared(images, plain),
            "fid": round(fid, 4),
            "fid_change": round(fid - fids[0], 4),
            "fid_change_in_scatters": round(abs(fid - fids[0]) / scatter, 4),
            "fid_between_the_sets": round(frechet_distance(*gaussian, *own), 5),
        }
        print(f"{precision}: {by_precision[precision]}", flush=True)
    figures = {
        "images": args.images,
        "steps": args.steps,
        "model": "trained here" if args.model is None else args.model.name,
        "train_kimg": args.train_kimg if args.model is None else None,
        "fid_float32": [round(fid, 4) for fid in fids],
        "fid_scatter": round(scatter, 4),
        "by_precision": by_precision,
    }
    end(figures, args.json)


if __name__ == "__main__":
    main()
