import importlib.util
from pathlib import Path

import pytest
from ray.tune.execution import class_cache

from cedm_ray.stages import RAY_ENVIRONMENT
from cedm_ray.stages.cluster.connection import _keep_credentials, _keep_private


def test_the_token_is_for_its_owner_alone(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    _keep_private(token)  # none was made
    token.write_text("secret")
    token.chmod(0o644)
    _keep_private(token)
    assert token.stat().st_mode & 0o777 == 0o600


def test_tune_passes_no_credentials_on_to_its_trials_but_all_that_train_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec(class_cache.__name__)  # as Ray has it: another test may have kept them already
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", set(fresh.ENV_VARS_TO_PROPAGATE))
    wanted = {name: "1" for name in RAY_ENVIRONMENT if name in class_cache.ENV_VARS_TO_PROPAGATE}
    assert "AWS_SECRET_ACCESS_KEY" in class_cache.ENV_VARS_TO_PROPAGATE and "RAY_TRAIN_V2_ENABLED" in wanted
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN", *wanted):
        monkeypatch.setenv(name, "1")

    def passed_on() -> dict[str, str]:
        options = class_cache._ActorClassCache().get(type("Trial", (), {}))._default_options
        return dict(options["runtime_env"]["env_vars"])

    assert "AWS_SECRET_ACCESS_KEY" in passed_on()
    _keep_credentials()
    assert wanted.items() <= passed_on().items() and not any("AWS" in name for name in passed_on())
