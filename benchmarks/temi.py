"""TEMI training at the paper's size against a plain loop over heads and against the machine's matrix products.

    python benchmarks/temi.py --threads 1
    python benchmarks/temi.py --images 2000 --dim 192 --heads 8 --clusters 50

The features are standard normal; neither time depends on their values. The plain loop has one nn.Module for each head,
an ordinary AdamW and a teacher that follows parameter by parameter, in torch's default precision. First both train two
steps from the same weights, whose losses must agree; then products of square matrices, steps of the trainer and steps
of the loop alternate, and the medians of their ratios are reported. Where other programs have the cores too, the share
in CPU time says more than the share in time.

Counted are the products that a step needs, for both images of each pair: student forward, teacher forward, and the
student's backward without a gradient for the features. The machine's rate is the best of a few sizes in the precision
of the trainer: TF32 on CUDA, float32 on a CPU. The defaults take some minutes on one core, the second line seconds.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from rates import finish
from record import arguments, end
from torch import Tensor, nn

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.temi import TemiTrainer
from cedm_ray.clustering.temi_precision import fast_matmul
from cedm_ray.clustering.temi_settings import TemiSettings

LR = 1e-4


class PlainHead(nn.Module):
    """One head, with the weights of head ``index`` of ``heads``."""

    def __init__(self, heads: Heads, index: int) -> None:
        super().__init__()
        _, hidden_dim, in_dim = heads.hidden_weight.shape
        _, num_clusters, bottleneck_dim = heads.last_direction.shape
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim))
        last = nn.Linear(bottleneck_dim, num_clusters, bias=False)
        self.last = torch.nn.utils.parametrizations.weight_norm(last)
        ours = [heads.hidden_weight, heads.hidden_bias, heads.bottleneck_weight, heads.bottleneck_bias]
        ours += [heads.last_gain, heads.last_direction]
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), ours, strict=True):
                parameter.copy_(value[index])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


class PlainLoop:
    """TEMI with a loop over heads."""

    def __init__(self, heads: Heads, settings: TemiSettings, device: torch.device) -> None:
        self.settings = settings
        num_heads, num_clusters, _ = heads.last_direction.shape
        self.students = [PlainHead(heads, index).to(device) for index in range(num_heads)]
        self.teachers = [PlainHead(heads, index).to(device).requires_grad_(False) for index in range(num_heads)]
        self.probs = [torch.full((num_clusters,), 1 / num_clusters, device=device) for _ in range(num_heads)]
        parameters = [value for student in self.students for value in student.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [value for value in parameters if value.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [value for value in parameters if value.ndim == 1], "weight_decay": 0.0},
            ],
            lr=LR,
        )

    def step(self, both: Tensor) -> Tensor:
        """Train on images and then their partners, ``(2B, D)``; returns the loss of each head."""
        settings = self.settings
        with torch.no_grad():
            teachers = [teacher(both).unflatten(0, (2, -1)) for teacher in self.teachers]
            q = [torch.softmax(logits / settings.teacher_temperature, dim=-1) for logits in teachers]
            weight = torch.stack([(one[0] * one[1]).sum(dim=-1) for one in q]).mean(dim=0)
        losses = [self.loss(index, teachers[index], both, weight) for index in range(len(self.students))]
        self.optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(self.teachers, self.students, strict=True):
                for followed, value in zip(teacher.parameters(), student.parameters(), strict=True):
                    followed.mul_(settings.teacher_momentum).add_(value, alpha=1 - settings.teacher_momentum)
        return torch.stack(losses).detach()

    def loss(self, index: int, teacher_logits: Tensor, both: Tensor, weight: Tensor) -> Tensor:
        """Loss of one head, arXiv 2303.17896, Sec. 3."""
        settings = self.settings
        log_t = torch.log_softmax(teacher_logits / settings.teacher_temperature, dim=-1)
        batch_probs = log_t.exp().mean(dim=(0, 1))
        self.probs[index] = torch.lerp(batch_probs, self.probs[index], settings.probs_momentum)
        log_s = torch.log_softmax(self.students[index](both).unflatten(0, (2, -1)) / settings.student_temperature, -1)
        joint = settings.gamma * (log_s + log_t.flip(0)) - self.probs[index].log()
        return -(weight * torch.logsumexp(joint, dim=-1).mean(dim=0)).mean()


def step_flop(args: argparse.Namespace) -> int:
    """Operations of the matrix products of one step; a multiplication and an addition are two."""
    first, others = args.dim * args.hidden, args.hidden * args.bottleneck + args.bottleneck * args.clusters
    forward, weight_gradient, input_gradient = first + others, first + others, others
    return 2 * 2 * args.batch * args.heads * (2 * forward + weight_gradient + input_gradient)


@dataclass(frozen=True)
class Taken:
    """Time that some work took, for each repeat of it."""

    wall_s: float
    cpu_s: float
    """Of all threads of this process: what is left of the time where others have the cores too."""


def taken(work: Callable[[], object], repeats: int, device: torch.device) -> Taken:
    """Time of the work, until the device has done it."""
    finish(device)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        work()
    finish(device)
    return Taken((time.perf_counter() - wall_s) / repeats, (time.process_time() - cpu_s) / repeats)


class Products:
    """Square matrix products, of the size that is fastest in the precision of the trainer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        sizes = [4096, 8192] if device.type == "cuda" else [2048, 3072, 4096]
        self.size = max(sizes, key=self._best_rate)
        self._use(self.size)
        self.flop = 2 * self.size**3

    def _best_rate(self, size: int) -> float:
        self._use(size)
        return size**3 / min(self.taken(1).wall_s for _ in range(5))

    def _use(self, size: int) -> None:
        self.matrix = torch.randn(size, size, device=self.device)
        self.out = torch.empty_like(self.matrix)

    def taken(self, repeats: int) -> Taken:
        """Time of a product."""
        with fast_matmul(self.device, tf32=True):
            return self.taken_by_default(repeats)

    def taken_by_default(self, repeats: int) -> Taken:
        """Time of a product in the precision that torch has by itself."""
        return taken(lambda: torch.mm(self.matrix, self.matrix, out=self.out), repeats, self.device)


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=768, help="features of an image")
    parser.add_argument("--heads", type=int, default=50)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=512, help="pairs of images of a step")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--bottleneck", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU; as torch finds best if left out")
    parser.add_argument("--rounds", type=int, default=7, help="how often all are measured, in turns")
    parser.add_argument("--steps", type=int, help="steps of the trainer in a round; 2 on a CPU, 100 on CUDA")
    parser.add_argument("--loop-steps", type=int, help="steps of the loop in a round; 1 on a CPU, 5 on CUDA")
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    args.steps = args.steps or (100 if cuda else 2)
    args.loop_steps = args.loop_steps or (5 if cuda else 1)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def trainer_of(args: argparse.Namespace) -> TemiTrainer:
    """The trainer past the epochs in which the last layer rests."""
    settings = TemiSettings(
        num_heads=args.heads,
        hidden_dim=args.hidden,
        bottleneck_dim=args.bottleneck,
        batch_size=args.batch,
        lr=LR,
        warmup_epochs=0,
        freeze_last_layer_epochs=0,
    )
    random = np.random.default_rng(0)
    features = random.standard_normal((args.images, args.dim), dtype=np.float32)
    neighbors = random.integers(0, args.images, (args.images, 50), dtype=np.int32)
    return TemiTrainer(features, neighbors, args.clusters, settings, seed=0, device=args.device)


def largest_difference(trainer: TemiTrainer, loop: PlainLoop, args: argparse.Namespace) -> float:
    """Largest relative difference of the losses of both in two steps from the same weights."""
    worst = 0.0
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        both = torch.randn(2 * args.batch, args.dim, generator=generator).to(trainer.device)
        with fast_matmul(trainer.device, tf32=True):
            ours = trainer.learner.step(*both.chunk(2), lr=LR)
        worst = max(worst, float((ours / loop.step(both) - 1).abs().max()))
    bound = 1e-2 if trainer.device.type == "cuda" else 1e-4
    if worst > bound:
        raise SystemExit(f"the losses of trainer and loop differ by {worst:.1e} of their size; {bound} is allowed")
    return worst


def drawn(trainer: TemiTrainer, steps: int) -> Tensor:
    """The batches of so many steps, of as many epochs as it takes."""
    rows = [trainer.draw_rows()]
    while sum(map(len, rows)) < steps:
        rows.append(trainer.draw_rows())
    return torch.cat(rows)[:steps]


@dataclass(frozen=True)
class Round:
    """Everything once, one after another."""

    step: Taken
    loop_step: Taken
    product: Taken
    """In the precision of the trainer: the mean of before and after the steps."""
    default_product: Taken


def one_round(trainer: TemiTrainer, loop: PlainLoop, products: Products, args: argparse.Namespace) -> Round:
    """Measure, the products for as long as the steps."""
    device, rows = trainer.device, drawn(trainer, args.steps)
    both = torch.randn(2 * args.batch, args.dim, device=device)
    repeats = max(1, round(args.steps * step_flop(args) / products.flop / 2))
    before = products.taken(repeats)
    steps = taken(lambda: trainer.train(rows), 1, device)
    after = products.taken(repeats)
    return Round(
        step=Taken(steps.wall_s / args.steps, steps.cpu_s / args.steps),
        loop_step=taken(lambda: loop.step(both), args.loop_steps, device),
        product=Taken((before.wall_s + after.wall_s) / 2, (before.cpu_s + after.cpu_s) / 2),
        default_product=products.taken_by_default(repeats),
    )


def main() -> None:
    args = parsed()
    trainer = trainer_of(args)
    loop, products = PlainLoop(trainer.learner.student, trainer.settings, trainer.device), Products(trainer.device)
    difference = largest_difference(trainer, loop, args)
    cuda, flop, rounds = trainer.device.type == "cuda", step_flop(args), []
    trainer.train(drawn(trainer, 5 if cuda else 1))  # past capturing the graph
    for _ in range(args.rounds):
        rounds.append(one_round(trainer, loop, products, args))
        one, rate = rounds[-1], products.flop / rounds[-1].product.wall_s
        print(f"step {one.step.wall_s:.4f} s, {flop / one.step.wall_s / rate:.3f} of {rate / 1e12:.4g} TFLOP/s; "
              f"loop {one.loop_step.wall_s:.4f} s", flush=True)  # fmt: skip
    scale = flop / products.flop
    step_s, loop_s = median(r.step.wall_s for r in rounds), median(r.loop_step.wall_s for r in rounds)
    cpu_share = round(median(scale * r.product.cpu_s / r.step.cpu_s for r in rounds), 3)
    figures = {
        "speedup_over_loop": round(median(r.loop_step.wall_s / r.step.wall_s for r in rounds), 3),
        "matmul_share": round(median(scale * r.product.wall_s / r.step.wall_s for r in rounds), 3),
        "matmul_share_cpu_time": None if cuda else cpu_share,
        "images_per_s": round(args.batch / step_s, 1),
        "steps_per_s": round(1 / step_s, 4),
        "loop_steps_per_s": round(1 / loop_s, 4),
        "step_tflops": round(flop / step_s / 1e12, 4),
        "matmul_tflops": round(products.flop / median(r.product.wall_s for r in rounds) / 1e12, 4),
        "matmul_tflops_default": round(products.flop / median(r.default_product.wall_s for r in rounds) / 1e12, 4),
        "matmul_size": products.size,
        "step_gflop": round(flop / 1e9, 2),
        "precision": "tf32" if cuda else "float32",
        "device": trainer.device.type,
        "threads": torch.get_num_threads(),
        "placement": trainer.features.placement,
        "loss_difference": difference,
        "size": {name: getattr(args, name) for name in ("images", "dim", "heads", "clusters", "batch")},
    }
    for name, value in figures.items():
        print(f"{name:>21}: {value}")
    end(figures, args.json)


if __name__ == "__main__":
    main()
