import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

from cedm_ray.errors import UserError
from cedm_ray.metrics import dinov2
from cedm_ray.metrics.detectors import metric_name
from cedm_ray.metrics.dinov2 import DINOV2_DIM, DinoV2Detector, check_dinov2, load_dinov2
from cedm_ray.weights.listing import file_sha256

SMALL = "vit_small_patch14_dinov2"  # the smallest of the family; the detector itself is ViT-L
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """The whole file's tensors, with position embeddings and layer scales large enough to matter."""
    generator = torch.Generator().manual_seed(0)
    state = timm.create_model(SMALL, pretrained=False, num_classes=0).state_dict()
    for name, value in state.items():
        scale = 0.3 if name.endswith(("gamma", "pos_embed", "cls_token", "bias")) else 0.05
        state[name] = torch.randn(value.shape, generator=generator) * scale + (1.0 if "norm" in name else 0.0)
    return state


@pytest.fixture(scope="module")
def path(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("weights") / "dinov2.pth"
    torch.save(state, target)
    return target


@pytest.fixture(scope="module")
def detector(path: Path) -> DinoV2Detector:
    return dinov2._load(path, "cpu", SMALL)


def some_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -3/4."""
    a, x = -0.75, np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def by_formula(grid: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """``(n, n, D)`` to ``(side, side, D)`` at the scale (side + 0.1) / n, the edges repeated, no antialiasing."""
    n = len(grid)
    centre = (np.arange(side) + 0.5) * n / (side + 0.1) - 0.5
    matrix = np.zeros((side, n))
    for i, at in enumerate(centre):
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            matrix[i, np.clip(j, 0, n - 1)] += cubic(np.array(at - j))
    return np.einsum("ia,jb,abd->ijd", matrix, matrix, grid)


def test_position_embeddings_are_resampled_as_dinov2_itself_does_it(state: State, detector: DinoV2Detector) -> None:
    original, used = state["pos_embed"], detector._model.pos_embed
    assert original.shape == (1, 1 + 37 * 37, 384) and used.shape == (1, 1 + 16 * 16, 384)
    expected = by_formula(original[0, 1:].double().numpy().reshape(37, 37, -1), 16)
    np.testing.assert_allclose(used[0, 1:].reshape(16, 16, -1), expected, atol=2e-5)
    assert torch.equal(used[:, 0], original[:, 0])
    timms = resample_abs_pos_embed(original, [16, 16])
    assert float((timms - used).abs().max()) > 0.1


def features_by_timm(state: State, images: list[Tensor]) -> Tensor:
    model = timm.create_model(SMALL, pretrained=False, num_classes=0, img_size=224).eval()
    grid = by_formula(state["pos_embed"][0, 1:].double().numpy().reshape(37, 37, -1), 16).reshape(1, 256, -1)
    pos_embed = torch.cat([state["pos_embed"][:, :1], torch.from_numpy(grid).float()], 1)
    model.load_state_dict(state | {"pos_embed": pos_embed})
    with torch.inference_mode():
        tokens: Tensor = model.forward_features(torch.stack(images))
    return tokens[:, 0]


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 40, 61), (1, 3, 300, 250)])
def test_features_are_the_class_token_of_images_resized_by_pil(
    state: State, detector: DinoV2Detector, shape: tuple[int, ...]
) -> None:
    images = some_images(*shape)
    prepared = []
    for image in images.permute(0, 2, 3, 1).numpy():
        # In two steps, widths first: Pillow 13 takes tall images the other way round, which no version before did.
        wide = Image.fromarray(image).resize((224, image.shape[0]), Image.Resampling.BICUBIC)
        unit = to_tensor(wide.resize((224, 224), Image.Resampling.BICUBIC))
        prepared.append(normalize(unit, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    ours = dinov2._prepared(images)
    step = 1 / 255 / 0.224
    difference = (ours - torch.stack(prepared)).abs()
    assert float(difference.max()) < 1.05 * step and float((difference > 0.5 * step).float().mean()) < 0.01
    features = detector(images)
    assert features.dtype == torch.float32 and features.shape == (shape[0], detector.dim) and detector.dim == 384
    expected = features_by_timm(state, prepared)
    assert float((features - expected).abs().max()) < 2e-3 * float(expected.abs().max())
    torch.testing.assert_close(features, features_by_timm(state, list(ours)), rtol=1e-4, atol=1e-4)


def test_a_single_channel_is_repeated_and_the_batch_changes_nothing(detector: DinoV2Detector) -> None:
    grey = some_images(2, 1, 28, 28)
    whole = detector(grey)
    torch.testing.assert_close(whole, detector(grey.repeat(1, 3, 1, 1)), rtol=0, atol=0)
    torch.testing.assert_close(detector(grey[1:]), whole[1:], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(detector(grey), whole, rtol=0, atol=0)


def test_wrong_images_are_refused(detector: DinoV2Detector) -> None:
    for images in (torch.zeros(1, 3, 8, 8), some_images(3, 8, 8), some_images(1, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"uint8, \(B, 1 or 3, H, W\) is due"):
            detector(images)


def test_a_safetensors_file_and_the_official_names_give_the_same_features(
    state: State, detector: DinoV2Detector, tmp_path: Path
) -> None:
    image = some_images(1, 3, 32, 32)
    torch.save(state | {"mask_token": torch.ones(1, 384)}, tmp_path / "official.pth")
    save_file(state, tmp_path / "w.safetensors")
    for file in (tmp_path / "official.pth", tmp_path / "w.safetensors"):
        other = dinov2._load(file, "cpu", SMALL)
        torch.testing.assert_close(other(image), detector(image), rtol=0, atol=0)
        assert other.weights_hash == check_dinov2(file) == file_sha256(file)


def test_its_score_is_fdd(detector: DinoV2Detector) -> None:
    assert metric_name(detector.name) == "fdd"


def test_the_detector_is_vit_large_for_224_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"{dinov2._ARCHITECTURE}.{dinov2._TAG}", pretrained=False, num_classes=0)
        built: list[str] = []

        def create_model(name: str, *, pretrained: bool, num_classes: int) -> Any:
            assert pretrained and num_classes == 0
            built.append(name)
            return model

        monkeypatch.setattr(timm, "create_model", create_model)
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())
        detector = load_dinov2(None, device="meta")
    assert built == [detector.weights_hash] == [check_dinov2(None)] == ["vit_large_patch14_dinov2.lvd142m"]
    assert detector.dim == DINOV2_DIM and detector._model.pos_embed.shape == (1, 257, 1024)
    assert len(detector._model.blocks) == 24 and detector._model.num_reg_tokens == 0


def message_of(*args: Any) -> str:
    with pytest.raises(UserError) as caught:
        dinov2._load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_weights_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("gone.pth", "weights.bin", "rubbish.pth", "rubbish.safetensors"):
        if name != "gone.pth":
            (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
        assert name in message_of(tmp_path / name, "cpu", SMALL)
        with pytest.raises(UserError, match=name):
            check_dinov2(tmp_path / name)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"cls_token": Trap(tmp_path / "ran")}, tmp_path / "trap.pth")
    assert "trap.pth cannot be read" in message_of(tmp_path / "trap.pth", "cpu", SMALL)
    assert not (tmp_path / "ran").exists()


def bad_states(state: State) -> Iterator[tuple[State, str]]:
    yield {"fc.weight": torch.zeros(1)}, "lack cls_token, pos_embed"
    yield {name: value for name, value in state.items() if name != "norm.bias"}, r"lack norm.bias; pass the weights of"
    yield state | {"register_tokens": torch.zeros(1, 4, 384)}, "have unknown register_tokens"
    yield state | {"pos_embed": state["pos_embed"][:, :257]}, "another shape for pos_embed"


def test_weights_of_another_network_are_refused(state: State, tmp_path: Path) -> None:
    for content, message in bad_states(state):
        torch.save(content, tmp_path / "w.pth")
        assert message in message_of(tmp_path / "w.pth", "cpu", SMALL)


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host\nand a second line")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(timm, "create_model", no_network)
    assert message_of(None, "cpu", SMALL).endswith("(OSError); pass a file with them: --dinov2-weights FILE")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features(path: Path, detector: DinoV2Detector) -> None:
    images = some_images(2, 3, 32, 32)
    on_gpu, expected = dinov2._load(path, "cuda", SMALL)(images).cpu(), detector(images)
    assert float((on_gpu - expected).abs().max()) < 1e-4 * float(expected.abs().max())
