"""What keeping versions costs, against `sha256sum` and `cp` in the same run: the DVC store, local disk, both sides warm.

    python -m benchmarks.stores               # 1 GB, 10,000 images, 1,000 versions: minutes
    python -m benchmarks.stores --quick       # 64 MB, 500 images, 100 versions: under a minute
    python -m benchmarks.stores --json        # the same lines, and as the last one a JSON object

A round makes a new store, hashes and copies the folder with the two commands, puts it, gets it back, and puts it again; the
file system is synchronised before each timing. A ratio is the median over the rounds of (ours / theirs) within a round. Reading
verifies every byte, so `get` too is held against hashing and copying. The last rows are single calls on a store opened anew.
Everything lies in a temporary folder (`--folder` says where), which is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from safetensors.numpy import save_file

from infra.progress import Progress
from infra.stores.base import ArtifactRef
from infra.stores.dvc import DvcStore
from models.shards import ShardWriter

COPY_BOUND = 2.0  # of the time of sha256sum + cp
UNCHANGED_BOUND = 0.1  # of the time of the first put
CALL_BOUND_S = 1.0
ROUNDS = 3  # ours
MOVES = 10  # ours: one stage move for so many versions
PIXELS = 64  # ours: side of an image


@dataclass(frozen=True)
class Size:
    checkpoint: int  # bytes
    images: int
    versions: int


FULL = Size(10**9, 10_000, 1_000)
QUICK = Size(64 * 10**6, 500, 100)


@dataclass(frozen=True)
class Row:
    """One measure and its bound."""

    what: str
    value: float
    bound: float
    unit: str  # "x" of the other side's time, or "s"
    seconds: dict[str, list[float]]  # every timing behind it

    @property
    def passed(self) -> bool:
        return self.value <= self.bound


def commit() -> str:
    """The repository's commit, with `-dirty` behind it when files of it have changed."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def make_checkpoint(folder: Path, size: int) -> None:
    """One safetensors file of random weights."""
    draw = np.random.default_rng(0)
    parts = 16
    save_file({f"layer.{i}": draw.integers(0, 256, size // parts, dtype=np.uint8) for i in range(parts)}, folder / "model.safetensors")


def make_images(folder: Path, count: int) -> None:
    """Images of noise, in shards."""
    draw = np.random.default_rng(0)
    with ShardWriter(folder) as shards:
        for i in range(count):
            shards.add(f"image-{i:05d}", Image.fromarray(draw.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)))


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def hash_and_copy(folder: Path, target: Path) -> None:
    """What a careful person does by hand."""
    files = sorted(str(path) for path in folder.iterdir())
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cp", "-r", str(folder), str(target)], check=True)


def one_round(folder: Path, place: Path, progress: Progress) -> dict[str, float]:
    """Seconds of each side, in a new store."""
    root = place / "registry"
    DvcStore(root)
    refs: list[ArtifactRef] = []
    os.sync()
    theirs = seconds(lambda: hash_and_copy(folder, place / "copy"))
    os.sync()
    put = seconds(lambda: refs.append(DvcStore(root).put("artifact", folder, key="k", progress=progress)))
    os.sync()
    get = seconds(lambda: DvcStore(root).get(refs[0], progress))
    unchanged = seconds(lambda: refs.append(DvcStore(root).put("artifact", folder, key="k")))
    if len(set(refs)) != 1 or len(DvcStore(root).versions()) != 1:
        raise AssertionError("an unchanged put made another version")
    return {"sha256sum_cp": theirs, "put": put, "get": get, "unchanged": unchanged}


def copies(what: str, folder: Path, work: Path, progress: Progress) -> list[Row]:
    """Put, get and unchanged put of a folder."""
    timings: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        with tempfile.TemporaryDirectory(dir=work) as place:
            found = one_round(folder, Path(place), progress)
        for name, value in found.items():
            timings.setdefault(name, []).append(value)
        progress.say(f"{what}, round {number + 1} of {ROUNDS}: " + ", ".join(f"{name} {value:.2f} s" for name, value in found.items()))
    theirs = timings["sha256sum_cp"]
    rows = []
    for name, ours, other, bound in (
        ("put", "put", theirs, COPY_BOUND),
        ("get", "get", theirs, COPY_BOUND),
        ("unchanged put", "unchanged", timings["put"], UNCHANGED_BOUND),
    ):
        ratios = [a / b for a, b in zip(timings[ours], other, strict=True)]
        rows.append(Row(f"{name}, {what}", statistics.median(ratios), bound, "x", {"ours": timings[ours], "theirs": other}))
    return rows


def calls(count: int, work: Path, progress: Progress) -> list[Row]:
    """Single calls on a store with that many versions."""
    root, folder = work / "many", work / "small"
    store = DvcStore(root)
    folder.mkdir()
    with progress.bar("versions", total=count, unit="version") as bar:
        for number in range(count):
            (folder / "number").write_text(str(number))
            ref = store.put("release", folder, key=str(number), run_id="benchmark", config={"number": number})
            if number % MOVES == 0:
                store.assign(ref, "production", approver="benchmark", reason=str(number))
            bar.advance()
    oldest = store.versions("release")[0].ref
    each: dict[str, Callable[[DvcStore], Any]] = {
        "stage": lambda store: store.stage("release", "production"),
        "assign": lambda store: store.assign(oldest, "production", approver="benchmark", reason="measured"),
        "find the oldest": lambda store: store.find("release", "0"),
        "versions": lambda store: store.versions(),
    }
    rows = []
    for name, call in each.items():
        timings = [seconds(partial(call, DvcStore(root))) for _ in range(ROUNDS)]
        rows.append(Row(f"{name}, {count:,} versions", statistics.median(timings), CALL_BOUND_S, "s", {"ours": timings}))
    return rows


def bench(size: Size, folder: Path | None, progress: Progress) -> list[Row]:
    """Every row. Removes what it made."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="stores-") as place:
        work = Path(place)
        checkpoint, images = work / "checkpoint", work / "images"
        checkpoint.mkdir()
        images.mkdir()
        progress.say(f"making {size.checkpoint / 1e6:,.0f} MB of weights and {size.images:,} images")
        make_checkpoint(checkpoint, size.checkpoint)
        make_images(images, size.images)
        return [
            *copies(f"{size.checkpoint / 1e6:,.0f} MB checkpoint", checkpoint, work, progress),
            *copies(f"{size.images:,} images in shards", images, work, progress),
            *calls(size.versions, work, progress),
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    arguments = parser.parse_args()
    source = commit()  # of what runs: the tree may move on meanwhile
    rows = bench(QUICK if arguments.quick else FULL, arguments.folder, Progress(lambda line: print(line, file=sys.stderr, flush=True)))
    for row in rows:
        print(f"{row.what:36} {row.value:8.3f} {row.unit}   bound {row.bound:g} {row.unit}   {'passed' if row.passed else 'NOT PASSED'}")
    passed = all(row.passed for row in rows)
    if arguments.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "load": round(os.getloadavg()[0], 1),
        }
        figures = [{**asdict(row), "passed": row.passed} for row in rows]
        print(json.dumps({"passed": passed, "quick": arguments.quick, "commit": source, "machine": machine, "rows": figures}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
