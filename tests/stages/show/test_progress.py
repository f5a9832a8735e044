import pytest

from cedm_ray.stages.show.progress import Work, WorkCounter, duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (360000, "100 h 00 min")],
)
def test_durations_are_said_in_the_two_largest_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_time_left_follows_from_what_was_done_since_the_start() -> None:
    work = Work("C=17", 96, 200, "kimg", started_s=100.0, started_done=90.0)
    assert work.left_s(112.0) == 208.0  # 104 kimg at 0.5 kimg/s
    assert work.text(112.0) == "C=17 96/200 kimg, 3 min 28 s left"
    assert Work("C=17", 200, 200, "kimg", 100.0).text(112.0) == "C=17 200/200 kimg"


def test_a_counter_counts_itself() -> None:
    counter = WorkCounter("images", 10, "images")
    counter.add(2)
    counter.add(1)
    (work,) = counter.works()
    assert (work.done, work.total) == (3, 10)
