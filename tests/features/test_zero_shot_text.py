from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from cedm_ray.errors import UserError
from cedm_ray.features import zero_shot_text
from cedm_ray.features.backbones import load_backbone
from cedm_ray.features.zero_shot_text import PROMPTS, class_text_features, read_class_names

ARCHITECTURE = "ViT-S-32-alt"
NAME = f"open_clip:{ARCHITECTURE}"
NAMES = ("cat", "fire engine", "{}", "Köln cathedral")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return open_clip.create_model(ARCHITECTURE, pretrained=None).eval()


@pytest.fixture(scope="module")
def weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "w.pt"
    torch.save(model.state_dict(), path)
    return path


def test_text_features_are_open_clips(model: Any, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot_text, "_BATCH", 7)  # several batches, the last one incomplete
    features = class_text_features(NAME, weights, NAMES, device="cpu")
    assert features.shape == (4, 5, 256) and features.dtype == np.float32
    tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
    with torch.inference_mode():
        for names, by_prompt in zip(NAMES, features, strict=True):
            texts = tokenizer([prompt.replace("{}", names) for prompt in PROMPTS])
            wanted = torch.nn.functional.normalize(model.encode_text(texts), dim=-1)
            np.testing.assert_allclose(by_prompt, wanted.numpy(), atol=1e-6)


def test_the_mean_over_prompts_is_open_clips_zero_shot_classifier(model: Any, weights: Path) -> None:
    features = class_text_features(NAME, weights, NAMES[:2], device="cpu").mean(axis=1)
    classifier = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(ARCHITECTURE), NAMES[:2], list(PROMPTS)
    )
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(units, classifier.T.numpy(), atol=1e-6)


def test_text_and_images_meet_as_in_open_clip(model: Any, weights: Path) -> None:
    text = class_text_features(NAME, weights, NAMES, PROMPTS[:1], device="cpu")[:, 0]
    backbone = load_backbone(NAME, weights, device="cpu")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.normalize(backbone(images), dim=1).numpy()
    assert text.shape[1] == backbone.dim
    tokens = open_clip.get_tokenizer(ARCHITECTURE)([PROMPTS[0].replace("{}", name) for name in NAMES])
    with torch.inference_mode():
        logits, _ = model.get_logits(backbone.transform(images), tokens)  # type: ignore[attr-defined]
        scale = model.logit_scale.exp()
    np.testing.assert_allclose(features @ text.T, (logits / scale).numpy(), atol=1e-5)


def test_mistakes_are_named(weights: Path) -> None:
    with pytest.raises(ValueError, match="0 class names and 5 prompts"):
        class_text_features(NAME, weights, (), device="cpu")
    for prompt in ("a photo", "{} and {}"):
        with pytest.raises(ValueError, match=r"must hold one \{\}"):
            class_text_features(NAME, weights, NAMES, [prompt], device="cpu")
    with pytest.raises(UserError, match="text tower; name one as open_clip:ARCH/TAG"):
        class_text_features("vit_base_patch16_224.dino", weights, NAMES, device="cpu")
    with pytest.raises(UserError, match="did you mean"):
        class_text_features("open_clip:ViT-S-32-alto", weights, NAMES, device="cpu")


def test_class_names_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for encoding, newline in (("utf-8", "\n"), ("utf-8-sig", "\r\n")):
        path.write_bytes(newline.join(["zebra ", "fire engine", "Köln"]).encode(encoding))
        assert read_class_names(path) == ("zebra", "fire engine", "Köln")
    path.write_text("zebra\ncat\n")
    assert read_class_names(path) == ("zebra", "cat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "hold no line"),
        (b"cat\n\ndog\n", "have a blank line 2"),
        (b"cat\ndog\n cat\n", "have 'cat' in lines 1 and 3"),
        (b"caf\xe9\n", r"are not UTF-8 \(byte 3\)"),
    ],
)
def test_class_names_that_are_none_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_class_names(tmp_path / "names.txt")


def test_a_missing_file_of_class_names_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt cannot be read \(No such file or directory\); pass a text file"):
        read_class_names(tmp_path / "gone.txt")
