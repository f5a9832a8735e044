import logging
import urllib.error
import urllib.request

import pytest
from huggingface_hub import constants

from cedm_ray.errors import UserError
from cedm_ray.weights.hub import fetching


def answering(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def answer(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", answer)


@pytest.mark.parametrize(
    ("error", "offline"),
    [
        (urllib.error.HTTPError("hub", 403, "Forbidden", {}, None), False),  # type: ignore[arg-type]
        (urllib.error.URLError("no route to host"), True),
        (TimeoutError(), True),
    ],
)
def test_where_the_hub_does_not_answer_its_cache_alone_is_looked_into(
    error: Exception, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answering(monkeypatch, error)
    with fetching("weights", "pass a file"):
        assert offline == constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_a_user_who_is_offline_on_purpose_has_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("the hub was asked"))
    with fetching("weights", "pass a file"):
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE


def test_whatever_the_libraries_raise_becomes_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, OSError())
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    said = r"^the weights cannot be fetched \(KeyError\); pass a file$"
    with pytest.raises(UserError, match=said), fetching("the weights", "pass a file"):
        assert logger.level == logging.CRITICAL
        raise KeyError("a\nlong story")
    assert logger.level == before


def test_a_mistake_of_the_user_keeps_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, OSError())
    with pytest.raises(UserError, match=r"^the name is unknown$"), fetching("weights", "pass a file"):
        raise UserError("the name is unknown")
