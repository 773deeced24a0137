"""What happens to versions and stage pointers when things break: the fault matrix, run for real.

    python -m benchmarks.faults               # a table of every point, minutes
    python -m benchmarks.faults --quick       # fewer kill points, under a minute
    python -m benchmarks.faults --json        # the same table, its last line one JSON object
    python -m benchmarks.faults --page benchmarks/results/faults.json > docs/faults.md

Each row is a point: what was done, the state found when the registry was opened again, the error that was shown, and whether every
invariant of benchmarks/fault_points.py held. A point that cannot be made on this machine has not survived. The kill points are
spread evenly over all changes of the file system that the operation makes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import fault_kinds as kinds
from benchmarks import fault_points as points
from benchmarks import fault_servers as servers
from benchmarks.fault_points import Lost, Seen
from benchmarks.rows import machine

WORKERS = 4  # points made at once: some wait, for locks and for servers; ours
KILLS = {"put": 40, "promote": 24, "rollback": 20}  # ours; every change where there are fewer
QUICK_KILLS = {"put": 8, "promote": 6, "rollback": 6}  # ours
COLUMNS = {"point": 24, "done": 52, "state": 20, "error": 60}
PAGE = """\
# When things break

What happens to versions and stage pointers when a process is killed, a disk is full, bytes rot, people race, clocks and tags go
wrong, or a server is away. `python -m benchmarks.faults` makes every fault below for real, in processes of its own, on copies of a
small registry with a whole signed chain, and then looks as a newcomer would. A point has survived when every listed version's bytes
hash to its digest, no stage points to missing bytes, the state is that before or that after the operation, an error of
models/errors.py with a remedy was shown, and the next operation succeeds. A point that cannot be made has not survived.

Kills come exactly before the n-th change of the file system, by system call (ptrace), n spread evenly over the operation; a loss of
power, where the kernel forgets what it was given, is not among them. The clock is turned back inside the process and not on the
machine. The lakeFS points ran against the stand-in of tests/infra/lakefs_server.py, not a real server. This page is
made by `python -m benchmarks.faults --page benchmarks/results/faults.json`, which needs the `test` extra (`make test` installs it).
"""
Check = Callable[[Path, Path], Seen]


@dataclass(frozen=True)
class Row:
    """A point and what became of it."""

    point: str
    done: str
    state: str
    error: str
    survived: bool
    wall_s: float


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` numbers from 1 to `count`, both among them, evenly spaced; all where there are no more."""
    if count <= wanted:
        return list(range(1, count + 1))
    return [1 + round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def other_points(quick: bool) -> list[tuple[str, Check]]:
    """Everything but the kills."""
    found: list[tuple[str, Check]] = []
    for operation, sizes in {"put": (100, 0, 208), "promote": (0, 4, 8), "rollback": (0, 4, 8)}.items():
        found += [("disk full", partial(kinds.disk_full, operation, kib << 10)) for kib in sizes[: 1 if quick else None]]
    for how in ("altered", "cut", "removed"):
        for meets in ("get", "promote", "rollback"):
            if not quick or (how, meets) in {("altered", "get"), ("cut", "promote"), ("removed", "rollback")}:
                found.append(("corrupt cache", partial(kinds.damaged, how, meets)))
        if not quick or how == "altered":
            found.append(("corrupt cache", partial(kinds.damaged_beside, how)))
    for pair in [("promote", "promote"), ("promote", "rollback"), ("rollback", "rollback"), ("put", "put")][: 2 if quick else None]:
        found.append(("race", partial(kinds.race, *pair)))
    found += [("clock back", partial(kinds.clock_back, operations)) for operations in ("put", "promote rollback")]
    tags = ("release#production#6", "release#staging#8", "release#production#3", "release@v1.0.2")
    found += [("deleted tag", partial(kinds.deleted_tag, tag)) for tag in tags[: 1 if quick else None]]
    return found + server_points(quick)


def server_points(quick: bool) -> list[tuple[str, Check]]:
    """What lies elsewhere."""
    found: list[tuple[str, Check]] = [
        ("read-only remote", servers.read_only_remote),
        ("truncated upload", partial(servers.truncated_upload, 0.5)),
        ("corrupt remote", servers.corrupt_remote),
    ]
    if not quick:
        found += [("truncated upload", partial(servers.truncated_upload, share)) for share in (0.0, 0.25, 0.75, 1.0)]
        found += [("truncated upload", servers.cut_in_remote), ("disk full", servers.full_remote)]
        found += [("S3 remote", partial(servers.s3_remote, how)) for how in ("unreachable", "expired credentials")]
    for how in ("unreachable", *servers.LAKEFS_FAULTS):
        operations = ("put", "move", "get") if how in ("unreachable", "expired credentials") else ("put",)
        found += [("lakeFS", partial(servers.lakefs, how, operation)) for operation in operations[: 1 if quick else None]]
    return found


def run_point(name: str, check: Check, template: Path) -> Row:
    """Make one point in a scratch folder of its own."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=template.parent, ignore_cleanup_errors=True) as folder:
        try:
            seen, survived = check(template, Path(folder)), True
        except Exception as error:  # whatever it is, the point has not survived and the others are to be made
            what = str(error) if isinstance(error, Lost) else f"{type(error).__name__}: {error}"
            seen, survived = Seen(_described(check), what, ""), False
    error = seen.error.replace(f"{folder}/", "")
    return Row(name, seen.done, seen.state, error, survived, round(time.monotonic() - start, 2))


def _described(check: Check) -> str:
    call = check if isinstance(check, partial) else partial(check)
    return " ".join([call.func.__name__, *(str(each) for each in call.args if isinstance(each, str | int))])


def run(quick: bool, folder: Path) -> Iterator[Row]:
    """Every point's row, as it comes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.fault_servers"])
    template = folder / "template"
    with ProcessPoolExecutor(WORKERS, context, max_tasks_per_child=1) as pool:
        print("building the registries", file=sys.stderr)
        pool.submit(points.build, template).result()
        rehearsals = {}
        for operation in points.OPERATIONS:
            count = pool.submit(points.changes_of, operation, template, folder / operation / "count")
            rehearsals[operation] = count, pool.submit(points.result_of, operation, template, folder / operation / "after")
        checks: list[tuple[str, Check]] = []
        for operation, (count, after) in rehearsals.items():
            wanted = (QUICK_KILLS if quick else KILLS)[operation]
            for at in spread(count.result(), wanted):
                checks.append((f"kill -9 {operation} {at}/{count.result()}", partial(points.kill, operation, at, after.result())))
        checks += other_points(quick)
        for done, row in enumerate(pool.map(run_point, *zip(*checks, strict=True), [template] * len(checks)), 1):
            print(f"{done}/{len(checks)}", file=sys.stderr, end="\r", flush=True)
            yield row


def line(row: dict[str, str], verdict: str) -> str:
    cells = [text if len(text := row[name]) <= width else f"{text[: width - 1]}…" for name, width in COLUMNS.items()]
    return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)), verdict])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer points")
    parser.add_argument("--page", type=Path, metavar="JSON", help="print a page about an earlier result, and make no faults")
    arguments = parser.parse_args()
    if arguments.page:
        print(page(json.loads(arguments.page.read_text())))
        return 0
    start = time.monotonic()
    source = ""
    if arguments.json:
        from pipelines.report import commit  # here because it brings Dagster, which takes seconds

        source = commit()  # of what runs: the tree may move on meanwhile
    rows = []
    print(line({name: name for name in COLUMNS}, "verdict"))
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for row in run(arguments.quick, Path(folder)):
            rows.append(row)
            print(line(asdict(row), "survived" if row.survived else "LOST"), flush=True)
    survived = sum(row.survived for row in rows)
    counts = {"points": len(rows), "survived": survived}
    print(json.dumps(counts))
    if arguments.json:
        print(json.dumps(result(counts, rows, arguments.quick, source, time.monotonic() - start)))
    return survived != len(rows)


def result(counts: dict[str, int], rows: list[Row], quick: bool, source: str, wall_s: float) -> dict[str, Any]:
    return {
        "command": f"python -m benchmarks.faults{' --quick' if quick else ''} --json",
        "commit": source,
        "machine": machine(),
        "wall_s": round(wall_s, 1),
        "kill_points": sum(row.point.startswith("kill") for row in rows),
        **counts,
        "rows": [asdict(row) for row in rows],
        "passed": counts["survived"] == counts["points"],
    }


def page(result: dict[str, Any]) -> str:
    """docs/faults.md: the kill points by operation, every other point by itself."""
    on = result["machine"]
    lines = [
        PAGE,
        f"`{result['command']}`, commit {result['commit'][:12]}, {on['cores']} cores, {on['processor']}, Python "
        f"{on['python']}, {result['wall_s']:.0f} s: **{result['survived']} of {result['points']} points survived**, "
        f"{result['kill_points']} of them kill -9.\n",
        "| point | done | state found | error shown | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for operation in points.OPERATIONS:
        rows = [row for row in result["rows"] if row["point"].startswith(f"kill -9 {operation} ")]
        states = ", ".join(f"{state}: {sum(row['state'] == state for row in rows)}" for state in ("before", "after"))
        survived = sum(row["survived"] for row in rows)
        changes = rows[0]["point"].rpartition("/")[2]
        done = f"killed at {len(rows)} of the {changes} changes it makes of the file system"
        lines.append(f"| kill -9 {operation} | {done} | {states} | (killed) | {survived} of {len(rows)} survived |")
    for row in result["rows"]:
        if not row["point"].startswith("kill"):
            cells = [row["point"], row["done"], row["state"], row["error"], "survived" if row["survived"] else "LOST"]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
