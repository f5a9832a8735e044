from pathlib import Path

import pytest
import yaml

from cedm_ray.config import fingerprint_tree, load, space_file
from cedm_ray.errors import UserError
from cedm_ray.flags import flag_value

SPACES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_search_space_is_valid_and_says_what_it_changes(path: Path) -> None:
    config = load(["--search-space", str(path)])
    tree = config.model_dump(mode="json")
    stated = yaml.safe_load(path.read_text())
    for section, value in stated.items():
        if isinstance(value, dict):
            assert {name: tree[section][name] for name in value} == value
        else:
            assert tree[section] == value


def test_the_paper_s_settings_are_the_defaults_for_cifar() -> None:
    config = load(["--dataset", "cifar100"])
    temi, diffusion = config.temi, config.diffusion
    assert (temi.num_heads, temi.hidden_dim, temi.bottleneck_dim, temi.gamma) == (50, 512, 256, 0.6)
    assert (temi.probs_momentum, temi.teacher_momentum, temi.batch_size, temi.epochs) == (0.9, 0.996, 512, 200)
    assert (temi.lr, temi.weight_decay, temi.student_temperature, temi.teacher_temperature) == (1e-4, 1e-4, 0.1, 0.1)
    assert (diffusion.total_batch, diffusion.lr, diffusion.dropout, diffusion.augment_prob) == (1024, 1e-3, 0.13, 0.12)
    assert (diffusion.model_channels, diffusion.channel_mult, diffusion.num_blocks) == (128, (2, 2, 2), 4)
    assert (config.granularity.total_kimg, config.final.total_kimg, config.bound.cutoff) == (100_000, 200_000, 0.96)
    assert config.backbone == "vit_base_patch16_224.dino" and config.num_neighbors == 50
    assert config.score.detectors == ("inception", "dinov2") and config.score.conditions == "cluster_probs"
    assert (config.score.num_images, config.final.num_images, config.final.num_sets) == (50_000, 50_000, 3)


def test_a_flag_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("temi: {gamma: 0.7, num_heads: 3}\n")
    config = load(["--search-space", str(path), "--temi.num-heads", "5"])
    assert (config.temi.gamma, config.temi.num_heads, config.temi.hidden_dim) == (0.7, 5, 512)


@pytest.mark.parametrize("flag", ["--search-space", "--search_space"])
def test_a_flag_may_be_written_with_underscores(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("temi: {gamma: 0.7}\n")
    assert load([flag, str(path)]).temi.gamma == load([f"{flag}={path}"]).temi.gamma == 0.7
    assert load([flag, str(path), "--temi.num_heads", "5"]).temi.num_heads == 5


def test_of_a_flag_that_is_given_twice_the_last_one_counts() -> None:
    assert flag_value(["--a-b", "1", "--a_b=2", "--c", "3"], "--a-b") == "2"
    assert flag_value(["--a-b=1", "--a-b", "2=2"], "--a-b") == "2=2"
    assert flag_value(["--a-bc", "1", "--a-b"], "--a-b") is None


def test_a_folder_starts_from_the_folder_s_file() -> None:
    assert space_file("/some/pictures").name == "folder.yaml"
    assert load(["--dataset=/some/pictures", "--resolution", "32"]).resolution == 32


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--temi.gamma", "3"], "gamma is 3.0; it must lie in (0, 1]"),
        (["--bound.c-start", "1"], "c_start is 1; it must be at least 2"),
        (["--bound.cutoff", "1.2"], "cutoff is 1.2; it must lie in (0, 1]"),
        (["--temi.gamma", "x"], "could not convert string to float: 'x'"),
        (["--zzz", "1"], "--zzz, 1 (python -m cedm_ray.search --help-all lists every flag)"),
        (["--temi.gama", "1"], "--temi.gama, 1; did you mean --temi.gamma? (python -m cedm_ray.search --help-all"),
        (["--seeed", "1", "--datase", "x"], "--seeed, 1, --datase, x; did you mean --dataset or --seed? ("),
        (["--resolution", "0"], "resolution is 0; it must be at least 1"),
        (
            ["--resources.num-workers", "3"],
            "must be a multiple of resources.num_workers (3): set --diffusion.total-batch",
        ),
        (["--final.total-kimg", "1"], "final.total_kimg is 1; it must be at least granularity.total_kimg"),
        (["--granularity.grace-kimg", "100000"], "it must be at least grace_kimg (100000)"),
        (["--search-space", "gone.yaml"], "search space gone.yaml cannot be read"),
        (["--grouping", "kmeans"], "fills every cluster whatever C is (r_C = 1), so that no upper bound can be found"),
        (["--grouping", "file"], "grouping is file and assignments is None; grouping file and a file belong together"),
        (["--assignments", "a.npy"], "grouping is temi and assignments is a.npy"),
        (["--grouping", "labels", "--bound.c-max", "9"], "C is not searched over for grouping labels"),
        (["--grouping", "words"], "invalid choice 'words'"),
        (["--bound.c-max", "2"], "c_max is 2; it must be at least 3"),
        (["--score.also", "lenet"], "also is ('lenet',); it must name each detector once"),
        (["--score.num-sets", "0"], "num_sets is 0; it must be at least 1"),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_value_and_the_bound(argv: list[str], said: str) -> None:
    assert said in refused(*argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temi: {gamm: 1}", "temi.gamm is not a setting; did you mean gamma?"),
        ("tem: {}", "tem is not a setting; did you mean temi?"),
        ("temi: {gamma: 9}", "temi: gamma is 9.0; it must lie in (0, 1]"),
        ("bound: 3", "bound is 3;"),
        ("- 1", "holds no settings"),
        ("a: [", "is not plain YAML"),
        ("a: !!python/object/apply:os.system [id]", "is not plain YAML"),
        ("space: {diffusion.dropou: {kind: choice, values: [0.1]}}", "space.diffusion.dropou names no setting"),
        ("space: {diffusion.dropout: {kind: uniform, low: 0.1, high: 2}}", "dropout is 2.0; it must lie in [0, 1)"),
        ("space: {temi.epochs: {kind: randint, low: 9, high: 2}}", "low is 9; it must be at most high (2)"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_path_of_the_setting(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    assert said in refused("--search-space", str(path))


def test_help_ends_with_status_0_and_names_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--dataset", "--backbone-weights", "--temi.num-heads", "--bound.cutoff"))


def test_where_things_are_kept_does_not_change_what_is_computed() -> None:
    base = fingerprint_tree(load([]))
    elsewhere = ["--storage-path", "/x", "--data-dir", "/y", "--resources.cpus-per-worker", "0.5"]
    assert fingerprint_tree(load(elsewhere)) == base
    files = ["--detector-weights", "a.pt", "--dinov2-weights", "b.pt", "--clip.weights", "c.pt"]
    assert fingerprint_tree(load(files)) == base  # what they hold counts, and enters the key as a hash
    for argv in (
        ["--seed", "1"],
        ["--temi.gamma", "0.5"],
        ["--resources.num-workers", "4"],
        ["--score.conditions", "uniform"],
        ["--score.also", "backbone"],
        ["--grouping", "none"],
        ["--on-bad-image", "skip"],
    ):
        assert fingerprint_tree(load(argv)) != base


@pytest.mark.parametrize(
    ("flags", "detectors"),
    [
        (["--metric", "fid"], ("inception", "dinov2")),
        (["--metric", "fdd"], ("dinov2", "inception")),
        (["--metric", "fdd", "--score.also", "backbone"], ("dinov2", "inception", "backbone")),
        (["--metric", "fid", "--score.also", "dinov2", "backbone"], ("inception", "dinov2", "backbone")),
        (["--metric", "fid", "--score.detector", "backbone"], ("inception", "dinov2")),
        ([], ("lenet",)),
    ],
)
def test_a_metric_stands_for_the_detectors_of_fid_and_fdd_the_one_to_minimise_first(
    flags: list[str], detectors: tuple[str, ...]
) -> None:
    assert load(flags).score.detectors == detectors


def test_rungs_grow_by_the_reduction_factor_and_end_at_the_budget() -> None:
    settings = load(["--dataset", "cifar10"]).granularity
    assert settings.rungs_kimg() == (12_500, 25_000, 50_000, 100_000)
    flags = {"grace-kimg": 10, "reduction-factor": 3, "total-kimg": 70}
    uneven = load(["--dataset", "cifar10", *(f"--granularity.{name}={value}" for name, value in flags.items())])
    assert uneven.granularity.rungs_kimg() == (10, 30, 70)


def test_other_values_are_checked_again() -> None:
    config = load([])
    assert config.with_values({"diffusion.dropout": 0.3}).diffusion.dropout == 0.3
    assert config.diffusion.dropout != 0.3
    with pytest.raises(UserError, match="dropout is 7"):
        config.with_values({"diffusion.dropout": 7.0})
