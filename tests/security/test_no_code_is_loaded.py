"""The package itself: nothing in it can turn a file into code, but for exceptions that are listed with their reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cedm_ray"
REFUSED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "imp", "pty", "telnetlib"}
REFUSED_CALLS = {
    "eval", "exec", "compile", "__import__", "execfile", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl",
    "pickle.load", "pickle.loads", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "torch.jit.load", "torch.hub.load", "pandas.read_pickle", "pd.read_pickle", "runpy.run_path",
}  # fmt: skip
REFUSED_METHODS = {
    "extractall", "extract", "unpack_archive", "read_pickle", "broadcast_object_list", "all_gather_object",
    "gather_object", "scatter_object_list", "recv_object_list",
}  # fmt: skip
NEEDED_ARGUMENTS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
ALLOWED = {
    # Reads CIFAR's pickles with a class that looks no name up; test_evil_files.py has files that try.
    ("data/safe_pickle.py", "import pickle"),
    # One TorchScript file that is known by its SHA-256, from the very bytes that were hashed.
    ("metrics/inception_weights.py", "torch.jit.load"),
}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` as it stands there; what is not made of names counts as a dot."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(source: str) -> Iterator[str]:
    """What in a source could run code that it is given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in REFUSED_MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {word.arg: word.value for word in node.keywords}
        if name in REFUSED_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in REFUSED_METHODS):
            yield name
        if name in NEEDED_ARGUMENTS:
            word, value = NEEDED_ARGUMENTS[name]
            if word not in given or ast.unparse(given[word]) != str(value):
                yield f"{name} without {word}={value}"
        if (
            "shell" in given
            or name.startswith("os.exec")
            or name in ("subprocess.getoutput", "subprocess.getstatusoutput")
        ):
            yield f"{name} with a shell"
        if name.split(".")[0] == "subprocess" and node.args and not isinstance(node.args[0], (ast.List, ast.Name)):
            yield f"{name} of a text"


def test_nothing_in_the_package_can_turn_a_file_into_code() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    found = {(str(file.relative_to(PACKAGE)), what) for file in files for what in findings(file.read_text())}
    assert found == ALLOWED and len(files) > 100


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "import pickle"),
        ("from dill import loads", "import dill"),
        ("eval(text)", "eval"),
        ("archive.extractall(folder)", "archive.extractall"),
        ("yaml.load(text, Loader)", "yaml.load"),
        ("dist.broadcast_object_list(paths)", "dist.broadcast_object_list"),
        ("torch.load(file)", "torch.load without weights_only=True"),
        ("torch.load(file, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(file, allow_pickle=True)", "np.load without allow_pickle=False"),
        ("subprocess.run(command, shell=True)", "subprocess.run with a shell"),
        ("subprocess.run('rm ' + name)", "subprocess.run of a text"),
    ],
)
def test_what_is_looked_for_is_found(source: str, what: str) -> None:
    assert list(findings(source)) == [what]
