import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.neighbors import NearestNeighbors

from cedm_ray.clustering.temi import TemiProgress, TemiTrainer, fit_temi
from cedm_ray.clustering.temi_settings import TemiSettings

SMALL = TemiSettings(
    num_heads=3,
    hidden_dim=32,
    bottleneck_dim=16,
    lr=3e-3,
    teacher_momentum=0.95,
    batch_size=64,
    epochs=40,
    warmup_epochs=2,
    standardize=True,
)
Data = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]


@pytest.fixture(scope="module")
def blobs() -> Data:
    points, labels = make_blobs(300, n_features=8, centers=5, cluster_std=0.5, random_state=0)
    neighbors = NearestNeighbors(n_neighbors=11).fit(points).kneighbors(points, return_distance=False)[:, 1:]
    return points.astype(np.float32), neighbors.astype(np.int32), labels


def short(**changes: int | float | bool) -> TemiSettings:
    small = {"num_heads": 2, "hidden_dim": 8, "bottleneck_dim": 4, "epochs": 3, "warmup_epochs": 1}
    return TemiSettings(**(small | changes))  # type: ignore[arg-type]


def test_separated_blobs_are_found(blobs: Data) -> None:
    points, neighbors, labels = blobs
    clustering = fit_temi(points, neighbors, 5, SMALL, seed=0, device="cpu")
    assert adjusted_mutual_info_score(labels, clustering.assignments) > 0.95
    assert clustering.utilization_ratio == 1.0 and clustering.max_prob.mean() > 0.9
    assert clustering.best_head == int(np.argmin(clustering.head_losses))


def test_the_same_seed_gives_the_same_clustering_and_another_seed_another(blobs: Data) -> None:
    first, again, other = (fit_temi(*blobs[:2], 5, short(), seed=seed, device="cpu") for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.head_losses, again.head_losses)
    np.testing.assert_array_equal(first.max_prob, again.max_prob)
    assert not np.array_equal(first.head_losses, other.head_losses)


def test_assignments_come_from_the_teacher_of_the_best_head(blobs: Data) -> None:
    trainer = TemiTrainer(*blobs[:2], 5, short(lr=0.05, teacher_momentum=0.99), seed=0, device="cpu")
    progress = list(trainer.epochs())
    clustering = trainer.clustering()
    assert clustering.best_head == progress[-1].best_head
    x = torch.from_numpy(blobs[0])
    with torch.no_grad():
        both = (trainer.learner.teacher, trainer.learner.student)
        teacher, student = (heads(x)[progress[-1].best_head] for heads in both)
    np.testing.assert_array_equal(clustering.assignments, teacher.argmax(1).numpy())
    np.testing.assert_allclose(clustering.max_prob, teacher.div(0.1).softmax(1).amax(1).numpy(), rtol=1e-5)
    assert not np.array_equal(clustering.assignments, student.argmax(1).numpy())


def test_the_share_of_used_clusters_is_known_for_every_head(blobs: Data) -> None:
    settings = short(num_heads=5, epochs=6, batch_size=50, lr=0.02, standardize=True)
    trainer = TemiTrainer(*blobs[:2], 40, settings, seed=0, device="cpu")
    list(trainer.epochs())
    x = torch.from_numpy((blobs[0] - blobs[0].mean(0)) / blobs[0].std(0))
    with torch.no_grad():
        picked = [trainer.learner.teacher.head(index)(x)[0].argmax(1).numpy() for index in range(5)]
    expected = [len(np.unique(clusters)) / 40 for clusters in picked]
    found = trainer.head_utilization()
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float64 and found.max() < 1 and len(set(expected)) > 1
    clustering = trainer.clustering()
    assert clustering.best_head is not None and found[clustering.best_head] == clustering.utilization_ratio


def test_progress_counts_epochs_and_warms_up(blobs: Data) -> None:
    settings = short(epochs=4, warmup_epochs=2, batch_size=128, lr=1e-3)
    progress = list(TemiTrainer(*blobs[:2], 3, settings, seed=0, device="cpu").epochs())
    assert [(item.epoch, item.epochs) for item in progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # 300 images are two whole batches of 128; the full rate is lr * 128 / 256.
    assert [item.lr for item in progress] == pytest.approx([2.5e-4, 5e-4, 5e-4, 5e-4])


def test_the_callback_sees_every_epoch_and_can_stop(blobs: Data) -> None:
    seen: list[int] = []

    def stop_at_two(progress: TemiProgress) -> None:
        seen.append(progress.epoch)
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_temi(*blobs[:2], 3, short(), seed=0, device="cpu", on_progress=stop_at_two)
    assert seen == [1, 2]


def test_the_last_layer_is_frozen_in_the_first_epoch_only(blobs: Data) -> None:
    trainer = TemiTrainer(*blobs[:2], 3, short(weight_decay=0.5), seed=0, device="cpu")
    student = trainer.learner.student
    start = [value.detach().clone() for value in (student.last_direction, student.last_gain, student.hidden_weight)]
    epochs = trainer.epochs()
    next(epochs)
    assert torch.equal(student.last_direction, start[0]) and torch.equal(student.last_gain, start[1])
    assert not torch.equal(student.hidden_weight, start[2])
    next(epochs)
    assert not torch.equal(student.last_direction, start[0]) and not torch.equal(student.last_gain, start[1])


def test_only_biases_are_spared_from_decay(blobs: Data) -> None:
    optimizer = TemiTrainer(*blobs[:2], 3, short(), seed=0, device="cpu").learner.optimizer
    decays = {len(group["params"]): group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {4: 1e-4, 2: 0.0}


def test_fewer_images_than_a_batch_are_one_batch(blobs: Data) -> None:
    clustering = fit_temi(*blobs[:2], 5, short(batch_size=1000), seed=0, device="cpu")
    assert len(clustering.assignments) == 300


def test_read_only_features_are_neither_copied_nor_warned_of(blobs: Data) -> None:
    points, neighbors = blobs[0].copy(), blobs[1].copy()
    points.flags.writeable = neighbors.flags.writeable = False
    before = points.copy(), neighbors.copy()
    torch.set_warn_always(True)  # or torch warns once in a process, which may have been long ago
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer = TemiTrainer(points, neighbors, 3, short(), seed=0, device="cpu")
            list(trainer.epochs())
            trainer.clustering()
    finally:
        torch.set_warn_always(False)
    np.testing.assert_array_equal(points, before[0])
    np.testing.assert_array_equal(neighbors, before[1])
    assert trainer.features.source.data_ptr() == points.ctypes.data
    assert trainer.neighbors.data_ptr() == neighbors.ctypes.data


def test_standardising_undoes_a_change_of_unit(blobs: Data) -> None:
    points, neighbors, _ = blobs
    scaled = np.ascontiguousarray(points * 2.0 ** np.arange(8) + 4, dtype=np.float32)
    first, second = (fit_temi(x, neighbors, 5, short(standardize=True), seed=0, device="cpu") for x in (points, scaled))
    np.testing.assert_allclose(first.head_losses, second.head_losses, rtol=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.dtype(">i4")])
def test_neighbours_may_be_any_integers(blobs: Data, dtype: np.typing.DTypeLike) -> None:
    points, neighbors, _ = blobs[0][:200], blobs[1][:200] % 200, blobs[2]
    expected = fit_temi(points, neighbors, 3, short(epochs=1), seed=0, device="cpu")
    found = fit_temi(points, neighbors.astype(dtype), 3, short(epochs=1), seed=0, device="cpu")
    np.testing.assert_array_equal(found.head_losses, expected.head_losses)


def test_a_constant_feature_is_standardised_to_zero(blobs: Data) -> None:
    points = blobs[0].copy()
    points[:, 2] = 0.1
    trainer = TemiTrainer(points, blobs[1], 3, short(standardize=True), seed=0, device="cpu")
    expected = (points - points.mean(0)) / points.std(0)
    expected[:, 2] = 0
    held = torch.cat(list(trainer.features.blocks(128)))
    np.testing.assert_allclose(held.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("num_clusters", [1, 301])
def test_more_clusters_than_images_or_fewer_than_two_are_refused(blobs: Data, num_clusters: int) -> None:
    with pytest.raises(ValueError, match=rf"num_clusters is {num_clusters}; it must lie in \[2, 300\]"):
        fit_temi(*blobs[:2], num_clusters, short(), seed=0, device="cpu")


def test_arrays_that_do_not_fit_are_refused(blobs: Data) -> None:
    points, neighbors, _ = blobs
    broken = points.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_temi(broken, neighbors, 5, short(), seed=0, device="cpu")
    with pytest.raises(ValueError, match="float64"):
        fit_temi(points.astype(np.float64), neighbors, 5, short(), seed=0, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"integers in \[0, 300\)"):
        fit_temi(points, neighbors + 1, 5, short(), seed=0, device="cpu")
    with pytest.raises(ValueError, match=r"\(300, k\)"):
        fit_temi(points, neighbors[:-1], 5, short(), seed=0, device="cpu")


def test_clusters_before_any_epoch_are_refused(blobs: Data) -> None:
    with pytest.raises(RuntimeError, match="no epoch"):
        TemiTrainer(*blobs[:2], 5, short(), seed=0, device="cpu").clustering()
    with pytest.raises(RuntimeError, match="no epoch"):
        TemiTrainer(*blobs[:2], 5, short(), seed=0, device="cpu").head_utilization()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 2.0}, r"gamma is 2.0; it must lie in \(0, 1\]"),
        ({"teacher_momentum": 1.0}, r"teacher_momentum is 1.0; it must lie in \[0, 1\)"),
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"lr": float("nan")}, "lr is nan; it must be above 0"),
        ({"warmup_epochs": 4}, "warmup_epochs is 4; it must lie in .0, epochs. with epochs = 3"),
    ],
)
def test_settings_name_the_field_the_value_and_the_bound(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short(**change)
