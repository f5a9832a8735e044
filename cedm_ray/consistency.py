"""Settings that are each well by themselves, and do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cedm_ray.domains import Choice, Range
from cedm_ray.errors import UserError, did_you_mean
from cedm_ray.settings import SEARCHED

if TYPE_CHECKING:
    from cedm_ray.config import SearchConfig

KMEANS_HAS_NO_BOUND = (
    "grouping is kmeans, which fills every cluster whatever C is (r_C = 1), so that no upper bound can be found; "
    "give one with --bound.c-max"
)


def check_consistency(config: SearchConfig) -> None:
    """Refuse what no single section can: numbers out of range, and settings that contradict one another.

    Raises:
        UserError: With the first finding.
    """
    for name in ("resolution", "max_images", "num_neighbors"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if config.confirm < 0:
        raise UserError(f"confirm is {config.confirm}; it must not be negative")
    workers, batch = config.resources.num_workers, config.diffusion.total_batch
    if batch % workers:
        raise UserError(
            f"diffusion.total_batch is {batch}; it must be a multiple of resources.num_workers ({workers}): "
            f"set --diffusion.total-batch {batch // workers * workers + workers}"
        )
    if config.final.total_kimg < config.granularity.total_kimg:
        raise UserError(
            f"final.total_kimg is {config.final.total_kimg}; it must be at least granularity.total_kimg "
            f"({config.granularity.total_kimg})"
        )
    _check_grouping(config)
    _check_search(config)
    for path, domain in config.space.items():
        _check_domain(config, path, domain)


def _check_grouping(config: SearchConfig) -> None:
    """Refuse a grouping that lacks what it is made from, or whose C cannot be bounded."""
    if config.grouping == "kmeans" and config.bound.c_max is None:
        raise UserError(KMEANS_HAS_NO_BOUND)
    if (config.grouping == "file") != (config.assignments is not None):
        raise UserError(
            f"grouping is {config.grouping} and assignments is {config.assignments}; grouping file and a file "
            "belong together: --grouping file --assignments FILE"
        )
    if config.space and config.grouping not in SEARCHED:
        raise UserError(f"space is given, but nothing is searched over for grouping {config.grouping}; leave it out")
    if config.bound.lower and config.grouping != "temi":
        raise UserError(f"bound.lower is given, but it is TEMI's and grouping is {config.grouping}; leave it out")
    if config.bound.c_max is not None and config.grouping not in SEARCHED:
        raise UserError(
            f"bound.c_max is given, but C is not searched over for grouping {config.grouping}; leave it out"
        )


def _check_search(config: SearchConfig) -> None:
    """Refuse a way of searching that does not go with what is searched over, or with the scores."""
    granularity = config.granularity
    for name, value, way in (("rule", granularity.rule, "fitted"), ("sampler", granularity.sampler, "gp")):
        if config.space and value == way:
            raise UserError(
                f"granularity.{name} is {way}, which searches over C alone, and the search space holds "
                f"{', '.join(config.space)}; leave it out, or take the space out of the file"
            )
    if granularity.multi_objective and len(config.score.detectors) < 2:
        raise UserError(
            f"granularity.multi_objective is given, but {config.score.detector} is the only score; name others with "
            "--score.also, or take --metric fid"
        )


def _check_domain(config: SearchConfig, path: str, domain: Choice | Range) -> None:
    """Refuse a domain whose path names no setting or whose values that setting does not take."""
    node: Any = config.model_dump()
    for part in path.split("."):
        known = node if isinstance(node, dict) else {}
        if part not in known:
            raise UserError(f"space.{path} names no setting{did_you_mean(part, known)}")
        node = known[part]
    if isinstance(domain, Range) and not domain.low <= domain.high:
        raise UserError(f"space.{path}: low is {domain.low:g}; it must be at most high ({domain.high:g})")
    if isinstance(domain, Range) and domain.kind.startswith("log") and domain.low <= 0:
        raise UserError(f"space.{path}: low is {domain.low:g}; on a logarithmic scale it must be above 0")
    if isinstance(domain, Range) and domain.kind.endswith("randint") and (domain.low % 1 or domain.high % 1):
        raise UserError(
            f"space.{path}: {domain.low:g} to {domain.high:g} are no whole numbers; take uniform, or round them"
        )
    for value in domain.values if isinstance(domain, Choice) else domain.ends():
        config.with_values({path: value}, origin=f"space.{path}")
