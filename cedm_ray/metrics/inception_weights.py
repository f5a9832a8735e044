"""Weights of FID's Inception-v3: where they are, which files are known to be it, and how each is read."""

import hashlib
import io
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cedm_ray.errors import UserError, first_line
from cedm_ray.metrics.detector_weights import read_tensors
from cedm_ray.weights.files import WeightKind, check_weight_file
from cedm_ray.weights.listing import file_sha256

INCEPTION = WeightKind("detector", "--detector-weights")
CANONICAL_NAME = "weights-inception-2015-12-05-6726825d.pth"
CANONICAL_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the file that pytorch-fid and torch-fidelity publish, each under a name of its own."""
TORCHSCRIPT_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
"""Of the features-only network that StyleGAN3's authors converted from the same graph."""
FEATURES_DIGEST = "a686fdaa90ba94809ce7b8d1327514c04710496786a1796f2e9eef8e6e046585"
"""What ``features_digest`` gives for the 2015 graph; a state dict's own hash differs with the torch that saved it."""

_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{CANONICAL_NAME}"
_PROBE_TIMEOUT_S = 10
_A_LAYER = "Mixed_7c.branch_pool.conv.weight"


def check_inception(weights: Path | None) -> str:
    """Refuse weights that cannot work, without building the network.

    Args:
        weights: File with the weights; None for the canonical file, in torch.hub's folder or on the network.

    Returns:
        SHA-256 of the file.

    Raises:
        UserError: If there is no such file and it cannot be fetched, or it holds something else.
    """
    if weights is None:
        if not _canonical_path().is_file():
            _knock()
            return CANONICAL_SHA256
        weights = canonical_weights()
    check_weight_file(weights, INCEPTION)
    sha256 = file_sha256(weights)
    if sha256 in (CANONICAL_SHA256, TORCHSCRIPT_SHA256):
        return sha256
    _refuse_torchscript(weights)
    if _A_LAYER not in read_tensors(weights, INCEPTION):
        raise UserError(
            f"detector weights {weights} lack {_A_LAYER}; pass weights of Inception-v3 by pytorch-fid's names"
        )
    return sha256


def canonical_weights() -> Path:
    """The canonical file, fetched (91 MB) into torch.hub's checkpoint folder where it is not there yet.

    Raises:
        UserError: If it cannot be fetched, or is another file than it should be.
    """
    path = _canonical_path()
    if not path.is_file():
        _knock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(_URL, str(path), hash_prefix=CANONICAL_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise _unreachable(error) from error
    elif (sha256 := file_sha256(path)) != CANONICAL_SHA256:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {sha256[:8]}..., not {CANONICAL_SHA256[:8]}...; "
            "delete it, or pass a file of your own: --detector-weights FILE"
        )
    return path


def _canonical_path() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / CANONICAL_NAME


def _knock() -> None:
    # torch.hub waits for ever where a firewall swallows packets.
    try:
        urllib.request.urlopen(urllib.request.Request(_URL, method="HEAD"), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> UserError:
    return UserError(
        f"the weights of FID's Inception-v3 are not at {_canonical_path()} and {_URL} cannot be fetched "
        f"({first_line(error)}); pass a file with them: --detector-weights FILE"
    )


def read_inception(path: Path, layers: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """Read a state dict or the known TorchScript file.

    Args:
        path: The file.
        layers: Names of the network's convolutions with batch normalisation, in the order of the graph.

    Returns:
        Tensors by torch-fidelity's names, on the CPU, and the SHA-256 of the file.

    Raises:
        UserError: If the file is missing, damaged, holds more than tensors, or is a TorchScript file of another hash.
    """
    check_weight_file(path, INCEPTION)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 == TORCHSCRIPT_SHA256:
        return _from_torchscript(content, layers), sha256  # the very bytes that were hashed, not the file once more
    _refuse_torchscript(path)
    return read_tensors(path, INCEPTION), sha256


def _refuse_torchscript(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):  # no archive, or a damaged one: reading its tensors says which
        return
    if any("/code/" in name for name in names):
        raise UserError(
            f"detector weights {path} are TorchScript, which can run code, and not the one known file "
            f"(SHA-256 {TORCHSCRIPT_SHA256[:8]}...); save the tensors alone, by pytorch-fid's names"
        )


def _from_torchscript(content: bytes, layers: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the known TorchScript file by torch-fidelity's names; both list the layers in the graph's order.

    The graph's batch normalisation has an offset (beta) and no scale.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tensors = torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    stems = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    state: dict[str, Tensor] = {}
    for layer, stem in zip(layers, stems, strict=True):
        state[f"{layer}.conv.weight"] = tensors[f"{stem}.weight"]
        state[f"{layer}.bn.weight"] = torch.ones_like(tensors[f"{stem}.beta"])
        state[f"{layer}.bn.bias"] = tensors[f"{stem}.beta"]
        state[f"{layer}.bn.running_mean"] = tensors[f"{stem}.mean"]
        state[f"{layer}.bn.running_var"] = tensors[f"{stem}.var"]
    return state


def features_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors that features depend on: by name in alphabetical order, as float32.

    Args:
        state: Tensors by torch-fidelity's names; the classifier and the counters of batch normalisation are left out.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_2015_graph(state: Mapping[str, Tensor], sha256: str) -> bool:
    """Whether weights are known to be those that FID is defined on, by the file's hash or by its tensors.

    The TorchScript file goes by its tensors, too, which shows that they were put under the right names.
    """
    return sha256 == CANONICAL_SHA256 or features_digest(state) == FEATURES_DIGEST
