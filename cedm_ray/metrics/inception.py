"""The detector behind FID, KID and the Inception Score: the Inception-v3 of December 2015."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cedm_ray.metrics.detectors import check_images
from cedm_ray.metrics.float32 import full_float32
from cedm_ray.metrics.inception_weights import canonical_weights, check_inception, is_2015_graph, read_inception
from cedm_ray.weights.files import fill

__all__ = ["InceptionDetector", "check_inception", "load_inception"]

_CLASSIFIER = ("fc.weight", "fc.bias")


class InceptionDetector:
    """Inception-v3 as FID was defined on it, behind its own resize; float32, also on CUDA.

    The network is torch-fidelity's (0.4, ``FeatureExtractorInceptionV3``) rather than one of our own: its authors
    checked it against the TensorFlow original, resize included, and scores made with it compare to those that others
    report. Torchvision's network of that name pools otherwise and has other classes and weights.

    Args:
        network: torch-fidelity's network, filled.
        weights_hash: SHA-256 of the weight file.
        known: Whether the weights are those of the 2015 graph; with others it is named ``inception-<hash>``, so that
            its scores do not pass for FID.
        has_classifier: Whether the weights hold the classifier, too.
        device: Where to compute.
    """

    dim = 2048
    resize = "bilinear to 299 px on TensorFlow 1's grid, no antialiasing"

    def __init__(
        self, network: nn.Module, *, weights_hash: str, known: bool, has_classifier: bool, device: torch.device | str
    ) -> None:
        self.name = "inception" if known else f"inception-{weights_hash[:8]}"
        self.weights_hash, self.has_classifier = weights_hash, has_classifier
        self._device = torch.device(device)
        # Channels last: 25 images a second instead of 16 on two cores, and FID moves by 1e-8 of itself.
        network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = network.eval().requires_grad_(False)

    def __call__(self, images: Tensor, /) -> Tensor:
        """Pooled features ``(B, 2048)`` float32 of images ``(B, 1 or 3, H, W)`` uint8; one channel is repeated."""
        return self.features_and_logits(images)[0]

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and class scores in one pass.

        Args:
            images: Images, shape ``(B, 1 or 3, H, W)``, uint8.

        Returns:
            Pooled features ``(B, 2048)``, and the logits ``(B, 1008)`` without the bias, from which the Inception
            Score is made (the original read them before it was added), or None without a classifier; float32.

        Raises:
            ValueError: If the images have another dtype or number of channels.
        """
        check_images(images)
        with full_float32(self._device):
            outputs = self._network(images.to(self._device).expand(-1, 3, -1, -1))
        return outputs[0], outputs[1] if self.has_classifier else None


def load_inception(weights: Path | None, *, device: torch.device | str) -> InceptionDetector:
    """The detector, ready to use.

    Args:
        weights: A state dict by pytorch-fid's and torch-fidelity's names (``.safetensors``, ``.pth`` or ``.pt`` of
            tensors alone, with or without the classifier ``fc``), or StyleGAN3's TorchScript file; None for the
            canonical file, in torch.hub's checkpoint folder or fetched.
        device: Where to compute.

    Raises:
        UserError: If the weights cannot be had or do not fit.
    """
    path = canonical_weights() if weights is None else weights
    network = _empty_network()
    layers = [name.removesuffix(".conv.weight") for name in network.state_dict() if name.endswith(".conv.weight")]
    state, sha256 = read_inception(path, layers)
    wanted = "FID's Inception-v3 by pytorch-fid's names"
    fill(network, state, optional=_CLASSIFIER, source=f"detector weights {path}", wanted=wanted)
    has_classifier = "fc.weight" in state and bool(state["fc.weight"].any())  # files of features alone may hold zeros
    network.features_list = ["2048", "logits_unbiased"] if has_classifier else ["2048"]
    known = is_2015_graph(state, sha256)
    return InceptionDetector(network, weights_hash=sha256, known=known, has_classifier=has_classifier, device=device)


def _empty_network() -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unfilled(FeatureExtractorInceptionV3):  # type: ignore[misc]
        """Built without weights: torch-fidelity reads its file with the full unpickler, which can run code."""

        filled = False

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            # The constructor's own call, with the empty dict below.
            if self.filled:
                return super().load_state_dict(*args, **kwargs)
            self.filled = True
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Unfilled("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
