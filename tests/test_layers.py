import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_point_down_only() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_everything_below_stages_imports_without_ray_and_mlflow() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "cedm_ray").rglob("*.py"))
        if "stages" not in path.parts and path.name != "search.py"
    ]
    program = f"""
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None  # importing either raises from here on
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(modules) > 30 and done.returncode == 0, done.stderr
