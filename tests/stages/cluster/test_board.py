from cedm_ray.stages.cluster.board import _Works


def test_a_last_word_after_the_end_is_not_heard_until_the_work_is_opened_again() -> None:
    works = _Works()
    works.update("a", "C=7", 5, 20, "kimg")
    works.remove("a")
    works.update("a", "C=7", 6, 20, "kimg")
    assert works.works() == []
    works.open("a")
    works.update("a", "C=7", 7, 20, "kimg")
    assert [(work.label, work.done) for work in works.works()] == [("C=7", 7)]


def test_the_time_left_is_counted_from_where_the_work_was_taken_up() -> None:
    works = _Works()
    works.update("a", "C=7", 50, 100, "kimg")
    works.update("a", "C=7", 60, 100, "kimg")
    (work,) = works.works()
    assert work.started_done == 50 and work.done == 60
    works.update("a", "C=7", 10, 100, "kimg")  # went back to a checkpoint
    (work,) = works.works()
    assert work.started_done == 10


def test_several_processes_add_up() -> None:
    works = _Works()
    for _ in range(3):
        works.add("embed", "embeddings", 128, 1000, "images")
    assert works.works()[0].done == 384


def test_lines_on_the_board_are_passed_on_once() -> None:
    works = _Works()
    works.say("C=7: a node was lost")
    works.say("C=9: a node was lost")
    assert works.said() == ["C=7: a node was lost", "C=9: a node was lost"] and works.said() == []
