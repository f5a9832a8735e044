from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cedm_ray.errors import UserError
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.stats import FeatureStats, StatsFacts, load_stats, load_sums, save_stats, save_sums

FACTS = StatsFacts("lenet", "ab", "none", "float32", 3, 40)


def sums(seed: int = 0) -> FeatureSums:
    found = FeatureSums(3)
    found.update(torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)))
    return found


def test_sums_come_back_from_disk_and_add_up_to_those_of_all_images(tmp_path: Path) -> None:
    save_sums(sums(0), tmp_path / "0.safetensors")
    save_sums(sums(1), tmp_path / "1.safetensors")
    both = load_sums(tmp_path / "0.safetensors")
    both.merge(load_sums(tmp_path / "1.safetensors"))
    features = torch.cat([torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    mean, cov = both.mean_cov()
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(cov, torch.cov(features.double().T))


def test_a_file_of_other_things_holds_no_sums(tmp_path: Path) -> None:
    path = tmp_path / "sums.safetensors"
    for tensors in (
        {"a": torch.zeros(1)},
        {"count": torch.ones(1, dtype=torch.int64), "sum": torch.zeros(3), "outer": torch.zeros(3, 2)},
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=r"sums\.safetensors holds no sums of features .*delete it and compute"):
            load_sums(path)
    save_sums(sums(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="holds no sums of features"):
        load_sums(path)
    with pytest.raises(UserError, match="holds no sums of features"):
        load_sums(tmp_path / "nowhere.safetensors")


def test_statistics_come_back_from_their_file(tmp_path: Path) -> None:
    stats = FeatureStats(*sums().mean_cov(), FACTS)
    save_stats(stats, tmp_path / "real.safetensors")
    back = load_stats(tmp_path / "real.safetensors")
    assert back.facts == FACTS and torch.equal(back.mu, stats.mu) and torch.equal(back.sigma, stats.sigma)
    assert [path.name for path in tmp_path.iterdir()] == ["real.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"rubbish" * 10])
def test_a_damaged_statistics_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "real.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"real\.safetensors holds no feature statistics"):
        load_stats(path)


@pytest.mark.parametrize(("fact", "value"), [("detector", "dinov2"), ("weights_hash", "cd"), ("dim", 2)])
def test_statistics_of_other_facts_have_no_distance(fact: str, value: object) -> None:
    stats = FeatureStats(*sums().mean_cov(), FACTS)
    more = replace(stats, facts=replace(FACTS, count=7))
    assert stats.distance(more) == pytest.approx(0, abs=1e-12)  # how many they were does not matter
    other = replace(stats, facts=replace(FACTS, **{fact: value}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{fact} is .* on one side and {value!r} on the other"):
        stats.distance(other)


def test_statistics_whose_shapes_are_not_those_of_their_facts_are_refused(tmp_path: Path) -> None:
    mean, cov = sums().mean_cov()
    for stats in (
        FeatureStats(mean, cov, replace(FACTS, dim=4)),
        FeatureStats(mean, cov.float(), FACTS),
    ):
        save_stats(stats, tmp_path / "stats.safetensors")
        with pytest.raises(UserError, match=r"holds no feature statistics .* do not fit dim"):
            load_stats(tmp_path / "stats.safetensors")
