"""From the JSON in the folder of a search to the view from which its figures are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cedm_ray.errors import UserError
from cedm_ray.report.run import Run, damaged

RESULT_FILE = "result.json"
SO_FAR_FILE = "so_far.json"
CONFIG_FILE = "config.json"
EXPORTED = Path("export") / "model.json"


def read_run(folder: Path) -> Run:
    """The view of a search from its folder; of one that goes on, what it has found so far.

    Args:
        folder: Folder of a run, which holds ``result.json`` (or ``so_far.json`` while the search goes on).

    Raises:
        UserError: If it is no such folder, or if the file is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of a run, such as runs/digits-1a2b3c4d")
    file = next((folder / name for name in (RESULT_FILE, SO_FAR_FILE) if (folder / name).is_file()), None)
    if file is None:
        if (folder / CONFIG_FILE).is_file():
            raise UserError(f"{folder} is not finished: it has no {RESULT_FILE} yet; run the same search to its end")
        raise UserError(f"{folder} holds no {RESULT_FILE}; give the folder of a run, such as runs/digits-1a2b3c4d")
    tree = _read(file)
    exported = folder / EXPORTED
    if "images_sha256" not in tree and exported.is_file():
        tree["images_sha256"] = _read(exported).get("images_sha256")
    return Run.from_tree(tree, folder)


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); make it readable") from error
    except (ValueError, RecursionError) as error:
        raise UserError(damaged(str(file), "it is no JSON")) from error
    if not isinstance(tree, dict):
        raise UserError(damaged(str(file), "it holds no map"))
    return tree
