import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from cedm_ray.errors import UserError
from cedm_ray.metrics import inception_weights
from cedm_ray.metrics.detectors import metric_name
from cedm_ray.metrics.float32 import full_float32
from cedm_ray.metrics.inception import InceptionDetector, _empty_network, check_inception, load_inception
from cedm_ray.metrics.inception_weights import features_digest, read_inception
from cedm_ray.weights.listing import file_sha256

State = dict[str, Tensor]


def random_state(seed: int) -> State:
    """Weights that keep the signal alive through 94 layers, unlike the constructor's."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in _empty_network().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("conv.weight"):
            state[name] = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 1 + 0.1 * noise.clamp(-3, 3)
        else:
            state[name] = value if name.endswith("num_batches_tracked") else 0.1 * noise
    return state


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(0)


@pytest.fixture(scope="module")
def path(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, target)
    return target


@pytest.fixture(scope="module")
def detector(path: Path) -> InceptionDetector:
    return load_inception(path, device="cpu")


def some_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def network_input(detector: InceptionDetector, images: Tensor) -> Tensor:
    """What the first layer gets: resized and scaled images."""
    seen: list[Tensor] = []
    hook = detector._network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    detector(images)
    hook.remove()
    return seen[0]


def assert_near(a: Tensor, b: Tensor, relative: float) -> None:
    assert float((a - b).abs().max()) <= relative * float(b.abs().max())


def test_features_and_logits_are_torch_fidelitys(detector: InceptionDetector, path: Path) -> None:
    images = some_images(3, 3, 32, 32)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    expected, expected_logits = theirs(images)
    features, logits = detector.features_and_logits(images)
    assert features.dtype == torch.float32 and features.shape == (3, detector.dim) == (3, 2048)
    assert float((expected[0] - expected[1]).abs().max()) > 0.01 * float(expected.abs().max())  # images are told apart
    assert_near(features, expected, 1e-6)
    assert detector.has_classifier and logits is not None and logits.shape == (3, 1008)
    assert_near(logits, expected_logits, 1e-6)
    assert not features.requires_grad


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 20, 47), (1, 3, 400, 310)])
def test_images_are_resized_as_tensorflow_1_did(detector: InceptionDetector, shape: tuple[int, ...]) -> None:
    images = some_images(*shape)
    seen = network_input(detector, images) * 128 + 128
    expected = tensorflow_1(images[0].double().numpy(), 299)
    np.testing.assert_allclose(seen[0], expected, atol=0.02)  # positions in float32, as TensorFlow has them
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    torch.testing.assert_close(seen, theirs, atol=1e-4, rtol=0)
    for antialias in (False, True):
        torchvisions = F.interpolate(images.float(), (299, 299), mode="bilinear", antialias=antialias)
        assert float((seen - torchvisions).abs().max()) > 10


def tensorflow_1(image: np.ndarray, size: int) -> np.ndarray:
    """``(C, H, W)`` by the old rule: output pixel i lies at i * H / size, with no half-pixel centres."""
    for axis in (1, 2):
        at = np.arange(size) * image.shape[axis] / size
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, image.shape[axis] - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        image = image.take(low, axis) * (1 - share) + image.take(high, axis) * share
    return image


def test_a_single_channel_is_repeated(detector: InceptionDetector) -> None:
    grey = some_images(1, 1, 28, 28)
    torch.testing.assert_close(detector(grey), detector(grey.repeat(1, 3, 1, 1)), rtol=0, atol=0)


def test_the_batch_changes_no_features(detector: InceptionDetector) -> None:
    images = some_images(3, 3, 32, 32)
    one_by_one = torch.cat([detector(image[None]) for image in images])
    assert_near(one_by_one, detector(images), 1e-5)


def test_wrong_images_are_refused(detector: InceptionDetector) -> None:
    for images in (torch.zeros(1, 3, 8, 8), some_images(3, 8, 8), some_images(1, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"uint8, \(B, 1 or 3, H, W\) is due"):
            detector(images)


def test_features_stay_float32_under_autocast(detector: InceptionDetector) -> None:
    images = some_images(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        under = detector(images)
    torch.testing.assert_close(under, detector(images), rtol=0, atol=0)


@pytest.mark.parametrize("older", ["highest", "high", "medium"])
def test_tf32_is_off_while_a_detector_computes_and_as_before_afterwards(older: str) -> None:
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    first = torch.get_float32_matmul_precision(), conv.fp32_precision, matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision(older)
        conv.fp32_precision = "tf32"
        before = torch.get_float32_matmul_precision(), conv.fp32_precision, matmul.fp32_precision
        with full_float32(torch.device("cuda")):
            assert (conv.fp32_precision, matmul.fp32_precision, matmul.allow_tf32) == ("ieee", "ieee", False)
        assert (torch.get_float32_matmul_precision(), conv.fp32_precision, matmul.fp32_precision) == before
    finally:
        torch.set_float32_matmul_precision(first[0])
        conv.fp32_precision, matmul.fp32_precision = first[1:]


def in_old_format(state: State, target: Path) -> None:
    torch.save(state, target, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("suffix", "save"), [(".safetensors", save_file), (".pt", torch.save), (".pth", in_old_format)]
)
def test_every_kind_of_file_gives_the_same_features(
    state: State, detector: InceptionDetector, tmp_path: Path, suffix: str, save: Callable[[State, Path], None]
) -> None:
    bare = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    save(bare, tmp_path / f"w{suffix}")
    assert check_inception(tmp_path / f"w{suffix}") == file_sha256(tmp_path / f"w{suffix}")
    other = load_inception(tmp_path / f"w{suffix}", device="cpu")
    image = some_images(1, 3, 32, 32)
    torch.testing.assert_close(other(image), detector(image), rtol=0, atol=0)
    assert other.weights_hash == file_sha256(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("classifier", ["missing", "zero"])
def test_without_a_classifier_there_are_no_logits(state: State, tmp_path: Path, classifier: str) -> None:
    headless = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if classifier == "zero":
        headless |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(headless, tmp_path / "w.pth")
    detector = load_inception(tmp_path / "w.pth", device="cpu")
    assert not detector.has_classifier
    features, logits = detector.features_and_logits(some_images(1, 3, 32, 32))
    assert features.shape == (1, 2048) and logits is None


def test_only_known_weights_are_named_inception(path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = load_inception(path, device="cpu")
    assert unknown.name == f"inception-{file_sha256(path)[:8]}"
    assert metric_name(unknown.name) == f"fd_inception_{file_sha256(path)[:8]}"
    with monkeypatch.context() as patch:
        patch.setattr(inception_weights, "FEATURES_DIGEST", features_digest(state))
        by_tensors = load_inception(path, device="cpu")
        assert by_tensors.name == "inception" and metric_name(by_tensors.name) == "fid"
        assert by_tensors.weights_hash == file_sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(inception_weights, "CANONICAL_SHA256", file_sha256(path))
        assert load_inception(path, device="cpu").name == "inception"


def test_the_digest_is_of_the_feature_layers_alone(state: State) -> None:
    digest = features_digest(state)
    bare = {name: value for name, value in state.items() if not name.startswith("fc.") and "tracked" not in name}
    assert features_digest(dict(reversed(bare.items()))) == digest
    for name in ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"):
        changed = state[name].clone()
        changed.flatten()[0] += 1e-3
        assert features_digest(state | {name: changed}) != digest


def message_of(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["gone.pth", "weights.bin", "rubbish.pth", "rubbish.pt", "rubbish.safetensors"])
def test_what_is_no_weight_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    if name != "gone.pth":
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
    for call in (lambda: check_inception(tmp_path / name), lambda: load_inception(tmp_path / name, device="cpu")):
        assert name in message_of(call)


@pytest.mark.parametrize(
    ("suffix", "save"), [(".safetensors", save_file), (".pt", torch.save), (".pth", in_old_format)]
)
def test_truncated_files_are_refused(
    state: State, tmp_path: Path, suffix: str, save: Callable[[State, Path], None]
) -> None:
    target = tmp_path / f"short{suffix}"
    save({name: value for name, value in state.items() if name.startswith("Mixed_7c")}, target)
    content = target.read_bytes()
    target.write_bytes(content[: len(content) // 2])
    for call in (lambda: check_inception(target), lambda: load_inception(target, device="cpu")):
        assert f"short{suffix}" in message_of(call)


def test_a_damaged_archive_is_refused(state: State, tmp_path: Path) -> None:
    torch.save({name: value for name, value in state.items() if name.startswith("Mixed_7c")}, tmp_path / "bad.pth")
    content = (tmp_path / "bad.pth").read_bytes()
    (tmp_path / "bad.pth").write_bytes(content.replace(b"PK\x01\x02", b"PK\x09\x09"))  # its list of members
    for call in (
        lambda: check_inception(tmp_path / "bad.pth"),
        lambda: load_inception(tmp_path / "bad.pth", device="cpu"),
    ):
        assert "bad.pth" in message_of(call)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"fc.weight": Trap(tmp_path / "ran")}, tmp_path / "zip.pth")
    in_old_format({"fc.weight": Trap(tmp_path / "ran")}, tmp_path / "old.pth")  # type: ignore[dict-item]
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    for name in ("zip.pth", "old.pth", "bare.pth"):
        assert name in message_of(check_inception, tmp_path / name)
        assert name in message_of(load_inception, tmp_path / name, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused(state: State, tmp_path: Path) -> None:
    def saved(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    other = saved("resnet.pth", {"conv1.weight": torch.zeros(3)})
    assert "resnet.pth lack Mixed_7c" in message_of(check_inception, other)
    assert "resnet.pth lack Conv2d_1a_3x3.conv.weight" in message_of(load_inception, other, device="cpu")
    torchvisions = saved("torchvision.pth", state | {"AuxLogits.fc.weight": torch.zeros(3)})
    assert "unknown AuxLogits.fc.weight" in message_of(load_inception, torchvisions, device="cpu")
    classes = saved("classes.pth", state | {"fc.weight": torch.zeros(1000, 2048)})
    assert "another shape for fc.weight" in message_of(load_inception, classes, device="cpu")
    assert "hold no state dict" in message_of(check_inception, saved("list.pth", [torch.zeros(3)]))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "beta", "mean", "var"):
            self.register_buffer(name, torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_opened_only_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, path = torch.jit.script(nn.Sequential(Layer(2), Layer(3))), tmp_path / "script.pt"
    torch.jit.save(script, str(path))
    with monkeypatch.context() as patch:
        patch.delattr(torch.jit, "load")
        assert "TorchScript, which can run code" in message_of(check_inception, path)
        assert "script.pt are TorchScript" in message_of(load_inception, path, device="cpu")
    monkeypatch.setattr(inception_weights, "TORCHSCRIPT_SHA256", file_sha256(path))
    assert check_inception(path) == file_sha256(path)
    state, sha256 = read_inception(path, ["first", "second.x"])
    assert sha256 == file_sha256(path) and len(state) == 10
    torch.testing.assert_close(state["second.x.conv.weight"], script.state_dict()["1.weight"])
    torch.testing.assert_close(state["second.x.bn.bias"], script.state_dict()["1.beta"])
    torch.testing.assert_close(state["first.bn.running_mean"], script.state_dict()["0.mean"])
    torch.testing.assert_close(state["first.bn.running_var"], script.state_dict()["0.var"])
    torch.testing.assert_close(state["first.bn.weight"], torch.ones(2))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the canonical file belongs; the folder is not there yet."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / inception_weights.CANONICAL_NAME


def test_the_canonical_file_is_fetched_once_and_checked(
    hub: Path, path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception_weights, "_URL", path.as_uri())
    assert "cannot be fetched (invalid hash value" in message_of(load_inception, None, device="cpu")
    assert not list(hub.parent.iterdir())
    monkeypatch.setattr(inception_weights, "CANONICAL_SHA256", file_sha256(path))
    assert check_inception(None) == file_sha256(path)
    assert not hub.exists()  # to check is not to fetch
    assert load_inception(None, device="cpu").name == "inception"
    monkeypatch.setattr(inception_weights, "_URL", "file:///nowhere")
    assert check_inception(None) == file_sha256(path)
    assert load_inception(None, device="cpu").weights_hash == file_sha256(path)
    hub.write_bytes(hub.read_bytes()[:-1])
    for call in (lambda: check_inception(None), lambda: load_inception(None, device="cpu")):
        assert "is damaged" in message_of(call)


def test_without_a_network_the_way_out_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, timeout: float) -> None:
        assert timeout <= 15
        raise OSError("no route to host\nand a second line")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for call in (lambda: check_inception(None), lambda: load_inception(None, device="cpu")):
        message = message_of(call)
        assert "cannot be fetched (no route to host)" in message and message.endswith("--detector-weights FILE")
    assert not hub.parent.exists()


@pytest.fixture
def real_files() -> tuple[Path, Path]:
    folder = Path(os.environ.get("CEDM_RAY_INCEPTION", ""))
    files = folder / "pt_inception-features.pth", folder / "inception-2015-12-05-features.pt"
    if "CEDM_RAY_INCEPTION" not in os.environ or not all(file.is_file() for file in files):
        pytest.skip("set CEDM_RAY_INCEPTION to a folder that holds the state dict and the TorchScript file")
    return files


@pytest.mark.slow
def test_both_real_files_are_the_2015_graph(real_files: tuple[Path, Path]) -> None:
    for file in real_files:
        detector = load_inception(file, device="cpu")
        assert detector.name == "inception" and not detector.has_classifier
        assert detector.weights_hash == check_inception(file) == file_sha256(file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_networks_are_the_torchscript_run_as_it_is(real_files: tuple[Path, Path]) -> None:
    images = some_images(8, 3, 32, 32)
    script = torch.jit.load(str(real_files[1]), map_location="cpu")
    for file in real_files:
        detector = load_inception(file, device="cpu")
        with torch.no_grad():
            expected = script(network_input(detector, images))
        features = detector(images)
        print(f"\n{file.name}: {float((features - expected).abs().max()):.3g} of {float(expected.max()):.3g}")
        assert_near(features, expected, 2e-6)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features_with_tf32_switched_on(path: Path, detector: InceptionDetector) -> None:
    images = some_images(4, 3, 32, 32)
    assert_near(load_inception(path, device="cuda")(images).cpu(), detector(images), 1e-4)
