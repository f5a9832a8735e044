"""A small classifier of a labelled toy set, whose features score generated images where no large network is at hand."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cedm_ray.errors import UserError
from cedm_ray.weights.whole_file import whole_file

FEATURE_DIM = 64
_POOLED = 4


class LeNet(nn.Module):
    """Three convolutions and two linear layers for small images; calling it gives features, so it is a ``Detector``.

    The features are the 64 inputs of the last ReLU, not its outputs: before it they are spread on both sides of zero
    and close to Gaussian within a class, after it half of them would be exactly zero, which no Gaussian fits. They are
    standardised over the training images, so that the Fréchet distance has a scale (64 is the total variance of
    the real images) and no feature outweighs the others.

    Args:
        channels: Channels of the images.
        num_classes: Classes to tell apart.
    """

    name = "lenet"
    dim = FEATURE_DIM
    resize = "none"
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * _POOLED**2, FEATURE_DIM)
        self.out = nn.Linear(FEATURE_DIM, num_classes)
        self.register_buffer("feature_mean", torch.zeros(FEATURE_DIM))
        self.register_buffer("feature_std", torch.ones(FEATURE_DIM))

    def embed(self, images: Tensor) -> Tensor:
        """Raw features ``(B, 64)`` of images ``(B, C, H, W)`` uint8, before they are standardised."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; uint8, (B, {self.channels}, H, W) is due"
            )
        x = images.to(self.feature_mean.dtype) / 127.5 - 1
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.conv3(x)), _POOLED)
        features: Tensor = self.hidden(x.flatten(1))
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Class scores ``(B, num_classes)`` of images ``(B, C, H, W)`` uint8."""
        scores: Tensor = self.out(F.relu(self.embed(images)))
        return scores

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, 64)`` float32 of images ``(B, C, H, W)`` uint8, standardised over the training images."""
        return (self.embed(images) - self.feature_mean) / self.feature_std

    @property
    def weights_hash(self) -> str:
        """SHA-256 of all weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def train_lenet(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    device: torch.device | str = "cpu",
) -> LeNet:
    """Train the classifier with Adam, its learning rate falling to zero along a cosine.

    On one machine's CPU with one number of threads the same seed gives the same weights, bit for bit; elsewhere they
    differ in the last digits and so does ``weights_hash``: store the trained network rather than train it again.

    Args:
        images: Shape ``(N, C, H, W)``, uint8, H and W at least 8.
        labels: Shape ``(N,)``, int64 in ``[0, num_classes)``.
        num_classes: Number of classes.
        seed: For the first weights and the order of the images.
        epochs: Passes over the images.
        batch_size: Images per step.
        learning_rate: Of the first step.
        device: Where to train.

    Returns:
        The network in eval mode, on ``device``.

    Raises:
        ValueError: If images and labels do not match or are empty.
    """
    if len(images) == 0 or labels.shape != (len(images),) or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"{len(images)} images and labels {tuple(labels.shape)} in [0, {num_classes}) are due, one each"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LeNet(images.shape[1], num_classes).to(device)
    order = torch.Generator().manual_seed(seed)
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images), generator=order).to(device), batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model.logits(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    features = torch.cat([model.embed(block) for block in torch.split(images, 1024)]).double()
    model.feature_mean.copy_(features.mean(0))
    model.feature_std.copy_(features.std(0, correction=0).clamp_min(1e-6))
    return model


def save_lenet(model: LeNet, path: Path) -> None:
    """Write the network as one safetensors file, whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    facts = {"channels": model.channels, "num_classes": model.num_classes}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"lenet": json.dumps(facts)})


def load_lenet(path: Path, *, device: torch.device | str = "cpu") -> LeNet:
    """Read what ``save_lenet`` wrote, in eval mode.

    Raises:
        UserError: If the file is missing, damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["lenet"])
            model = LeNet(facts["channels"], facts["num_classes"])
            model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no LeNet ({error}); delete it and train it again") from error
    return model.to(device).eval().requires_grad_(False)
