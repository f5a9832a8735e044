from cedm_ray.config import SearchConfig
from cedm_ray.search import settings_of


def test_what_is_kept_of_the_settings_holds_no_password() -> None:
    config = SearchConfig(tracking_uri="https://me:secret@mlflow.example.org:5000/base")
    kept = settings_of(config)
    assert kept["tracking_uri"] == "https://mlflow.example.org:5000/base" and "secret" not in str(kept)
    assert settings_of(SearchConfig())["tracking_uri"] is None
    assert (
        settings_of(SearchConfig(tracking_uri="sqlite:////runs/mlflow.db"))["tracking_uri"]
        == "sqlite:////runs/mlflow.db"
    )
