import pytest

from cedm_ray.diffusion.streams import Purpose, torch_seed


def test_streams_of_other_counters_and_purposes_have_other_seeds() -> None:
    seeds = {
        torch_seed(seed, purpose, nimg, rank)
        for seed in range(3) for purpose in Purpose for nimg in range(0, 80, 8) for rank in range(4)
    }  # fmt: skip
    assert len(seeds) == 3 * len(Purpose) * 10 * 4
    with pytest.raises(ValueError, match="seed is -1"):
        torch_seed(-1, Purpose.STEP)
