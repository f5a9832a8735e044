import pytest

from cedm_ray.errors import UserError
from cedm_ray.settings import ResourceSettings
from cedm_ray.stages.cluster import shares


def test_as_many_trials_run_at_once_as_whole_worker_groups_fit() -> None:
    settings = ResourceSettings(num_workers=2, cpus_per_worker=1.0)
    assert shares(settings, {"CPU": 2.0}).max_trials == 1
    assert [shares(settings, {"CPU": cpus}).max_probes for cpus in (2.0, 3.0, 64.0)] == [1, 1, 32]
    assert shares(settings, {"CPU": 64.0, "GPU": 6.0}).max_probes == 6
    assert shares(settings, {"CPU": 9.0}).max_trials == 4
    gpus = shares(settings, {"CPU": 64.0, "GPU": 6.0})
    assert (gpus.max_trials, gpus.gpus_per_worker, gpus.gpus_per_probe) == (3, 1.0, 1.0)
    assert shares(ResourceSettings(num_workers=2, gpus_per_worker=0.5), {"CPU": 64.0, "GPU": 6.0}).max_trials == 6


def test_a_probe_takes_no_more_than_the_cluster_has() -> None:
    small = shares(ResourceSettings(num_workers=1, cpus_per_probe=8.0), {"CPU": 2.0})
    assert (small.cpus_per_probe, small.gpus_per_probe, small.gpus_per_worker) == (2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "total", "said"),
    [
        (ResourceSettings(num_workers=3), {"CPU": 2.0}, "num_workers is 3 with 1 CPU and 0 GPU each"),
        (ResourceSettings(num_workers=2), {"CPU": 8.0, "GPU": 1.0}, "the cluster has 8 CPU and 1 GPU in all"),
        (ResourceSettings(num_workers=1, gpus_per_worker=1.0), {"CPU": 8.0}, "1 CPU and 1 GPU each"),
    ],
)
def test_a_training_that_can_never_fit_is_refused(
    settings: ResourceSettings, total: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        shares(settings, total)
    assert said in str(caught.value) and "lower --resources.num-workers" in str(caught.value)
