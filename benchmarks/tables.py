"""The README's tables of speed, and of the real run, made from benchmarks/results/*.json.

    python benchmarks/tables.py            # writes them between the two markers of README.md
    python benchmarks/tables.py --check    # exit status 1 where README.md says anything else

A result of another machine stands beside the first one under the benchmark's name and a suffix: train.json,
train-h200.json. Nothing is measured here.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
REAL_RUN = "cifar10_real"

Record = Mapping[str, Any]


class TableError(Exception):
    """A result or the README is not as it must be; the message is one line."""


def number(value: Any) -> str:
    """Three digits; whole from 100 on, and never with an exponent."""
    if not isinstance(value, int | float):
        return "-"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.10f}".rstrip("0").rstrip(".")


def unit(name: str) -> Callable[[Any], str]:
    return lambda value: f"{number(value)} {name}".strip() if value is not None else "-"


def percent(value: Any) -> str:
    return "-" if value is None else f"{number(100 * value)} %"


def by_key(show: Callable[[Any], str]) -> Callable[[Any], str]:
    """Values by a number (images, workers), or by a name and then a number."""

    def shown(value: Any) -> str:
        if not isinstance(value, Mapping):
            return show(value)
        nested = any(isinstance(each, Mapping) for each in value.values())
        parts = [f"{_key(key)}: {shown(each)}" for key, each in value.items()]
        return "; ".join(parts) if nested else ", ".join(parts)

    return shown


def fid_changes(value: Mapping[str, Any]) -> str:
    """By precision."""
    return ", ".join(f"{name}: {number(each['fid_change_in_scatters'])}" for name, each in value.items())


def peaks(rows: Sequence[Mapping[str, Any]]) -> str:
    """By number of images."""
    return ", ".join(f"{row['images']:,}: {number(row['peak_mib'])}" for row in rows)


def _key(key: str) -> str:
    return f"{int(key):,}" if key.isdecimal() else key


@dataclass(frozen=True)
class Line:
    """One figure of one benchmark."""

    benchmark: str
    figure: str
    what: str
    show: Callable[[Any], str]
    wanted: str = ""


LINES = (
    Line("train", "images_per_s", "training, images/s", number),
    Line("train", "speedup_over_baseline", "training, times the plain loop", unit("x"), "1.3 (CPU), 2 (GPU)"),
    Line("train", "matmul_share", "training, share of the measured matmul rate", percent, "40 % (GPU)"),
    Line("train", "peak_memory_gb", "training, peak memory", unit("GB")),
    Line("sample", "speedup_over_baseline", "sampling, times the plain loop", unit("x")),
    Line("sample", "seconds_per_50k", "50,000 samples of 35 evaluations, from fewer", unit("s"), "200 s (GPU)"),
    Line("precision", "by_precision", "change of FID by the sampler's precision, of its scatter by seed", fid_changes),
    Line("frechet", "seconds_2048", "Fréchet distance, 2,048 features", unit("s"), "below 1 s"),
    Line("neighbors", "seconds", "50 neighbours, s by images", by_key(number)),
    Line("embed", "share_of_bare_loop", "embedding by Ray Data, of the bare loop's rate", percent, "90 %"),
    Line("embed_memory", "by_size", "embedding, peak MiB by images", peaks, "flat"),
    Line("workers", "images_per_s", "training, images/s by processes", by_key(number)),
    Line("workers", "efficiency_same_cores", "of one process with the same devices", by_key(percent)),
    Line("workers", "efficiency", "of so many times one process with one share of them", by_key(percent)),
    Line(
        "ray_overhead", "overhead_share", "Ray and MLflow, share of a trial of the paper's size", percent, "below 2 %"
    ),
)
BENCHMARKS = tuple(dict.fromkeys(line.benchmark for line in LINES))


def read_results(folder: Path) -> dict[str, Record]:
    """The results by the names of their files, those of one benchmark side by side.

    Raises:
        TableError: If a file is no record of a benchmark.
    """
    found = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stem):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            found[file.stem] = {name: record[name] for name in ("machine", "date", "command", "figures")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TableError(f"{file} is no benchmark's result ({type(error).__name__}); run it again") from error
    return found


def results_of(results: Mapping[str, Record], benchmark: str) -> dict[str, Record]:
    """Those of one benchmark, of whatever machine."""
    return {stem: record for stem, record in results.items() if stem.split("-")[0] == benchmark}


def machine(record: Record) -> str:
    """A machine in words."""
    facts = record["machine"]
    gpus = [f"{facts['gpus'].count(name)} x {name}" for name in dict.fromkeys(facts["gpus"])]
    return ", ".join([facts["processor"], f"{facts['cores']} cores", *(gpus or ["no GPU"])])


def command(record: Record) -> str:
    """The command without the file that its result went to."""
    words = shlex.split(record["command"])
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return shlex.join(words)


def speed_table(results: Mapping[str, Record], letters: Mapping[str, str]) -> list[str]:
    """The figures that the results hold."""
    rows = ["| benchmark | figure | wanted | measured | on | date |", "|---|---|---:|---:|---|---|"]
    for line in LINES:
        for stem, record in results_of(results, line.benchmark).items():
            if line.figure not in record["figures"]:
                raise TableError(f"{stem}.json has no figure {line.figure}; run benchmarks/{line.benchmark}.py again")
            shown = line.show(record["figures"][line.figure])
            on = letters[machine(record)]
            rows.append(f"| `{stem}` | {line.what} | {line.wanted} | {shown} | {on} | {record['date']} |")
    return rows


def real_table(record: Record) -> list[str]:
    """FID by condition and by images seen."""
    figures = record["figures"]
    kimg = [str(each) for each in figures["kimg"]]
    rows = [
        f"CIFAR-10, {figures['metric'].upper()} of {figures['num_images']:,} generated against "
        f"{figures['num_real']:,} training images, one training each, by thousands of images seen "
        f"({figures['terms']}; {machine(record)}; {record['date']}):",
        "",
        "| condition | C | " + " | ".join(f"{int(each):,} kimg" for each in kimg) + " |",
        "|---|---:|" + "---:|" * len(kimg),
    ]
    for each in figures["conditions"]:
        cells = [f"{each['fid'][at]:.2f}" if at in each["fid"] else "-" for at in kimg]
        rows.append(f"| {each['label']} | {each['num_clusters']} | " + " | ".join(cells) + " |")
    return rows


def section(results: Mapping[str, Record]) -> str:
    """Everything that stands between the markers."""
    known = {stem: record for name in (*BENCHMARKS, REAL_RUN) for stem, record in results_of(results, name).items()}
    letters = {text: chr(ord("A") + place) for place, text in enumerate(dict.fromkeys(map(machine, known.values())))}
    parts = []
    if any(results_of(results, name) for name in BENCHMARKS):
        parts.append("\n".join(speed_table(results, letters)))
    if letters:
        parts.append("\n".join(f"- {letter}: {text}" for text, letter in letters.items()))
    missing = [name for name in (*BENCHMARKS, REAL_RUN) if not results_of(results, name)]
    if missing:
        parts.append(f"Not measured: {', '.join(f'`{name}`' for name in missing)}.")
    if not any(record["machine"]["gpus"] for record in known.values()):
        parts.append("Nothing here has been measured on a GPU: none was at hand.")
    parts += ["\n".join(real_table(record)) for record in results_of(results, REAL_RUN).values()]
    if known:
        commands = dict.fromkeys(f"    {command(record)}" for record in known.values())
        parts.append("\n".join(["The commands:", "", *commands]))
    return "\n\n".join(parts)


def with_section(text: str, made: str) -> str:
    """A README with the tables between its markers.

    Raises:
        TableError: If it does not hold each marker once, in their order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise TableError(f"the README must hold {BEGIN} and then {END}, once each: add the two lines")
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{made}\n{END}", text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where the README differs")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    args = parser.parse_args(argv)
    try:
        old = args.readme.read_text(encoding="utf-8")
        new = with_section(old, section(read_results(args.results)))
    except (OSError, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.check:
        if new != old:
            print(f"{args.readme} differs from the results; run: python benchmarks/tables.py", file=sys.stderr)
        return int(new != old)
    if new != old:
        args.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
