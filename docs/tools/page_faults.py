"""What memory for large results costs on a CPU: page faults and time of a call, by how the allocator is set.

A result that the allocator takes from the system anew at every call has to be filled with pages anew. The operators are
timed in processes that differ in their environment alone, by turns. Times are processor time, of user and system, the
least of many calls on one thread; faults are the mean.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import torch
from common import result_file
from common.about import about_run
from common.command_line import add_out, parser_of, positive

from fastwkv import linear_scan, wkv

KEEP = str(1 << 31)
SETTINGS = {  # of glibc, but for the last
    "default": {},
    "top pad": {"MALLOC_TOP_PAD_": str(256 << 20)},
    "thresholds": {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": KEEP},
    "no mmap": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": KEEP},
    "jemalloc": {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"},
}
CALLS = ("wkv, 25 MB", "wkv, 100 MB", "scan, 34 MB", "scan, 134 MB")


def call(name: str) -> Any:
    """Return a call whose result has this size."""
    operator, _, size = name.partition(", ")
    small = size in ("25 MB", "34 MB")
    if operator == "wkv":
        k, v = torch.randn(2, 2 if small else 8, 4096, 768)
        w, u = torch.rand(2, 768)
        return lambda: wkv(w, u, k, v)
    a, x = torch.rand(2, 2 if small else 8, 4096, 1024).unbind()
    return lambda: linear_scan(a, x)


def measured(repeats: int) -> list[dict[str, Any]]:
    """Measure every call in this process."""
    torch.set_num_threads(1)
    rows = []
    for name in CALLS:
        run = call(name)
        for _ in range(3):
            run()
        times, first = [], resource.getrusage(resource.RUSAGE_SELF)
        before = first
        for _ in range(repeats):
            run()
            after = resource.getrusage(resource.RUSAGE_SELF)
            times.append((after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) * 1e3)
            before = after
        faults = (before.ru_minflt - first.ru_minflt) / repeats
        rows.append({"call": name, "ms": min(times), "faults": faults})
    return rows


def environment(setting: str, jemalloc: str | None) -> dict[str, str]:
    """Return that of a process."""
    found = {**os.environ, **SETTINGS[setting]}
    return found | {"LD_PRELOAD": jemalloc} if setting == "jemalloc" and jemalloc else found


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = parser_of("page_faults.py", __doc__ or "")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="of all settings (default: 3)")
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="of a call in a round (default: 20)")
    parser.add_argument("--jemalloc", metavar="FILE", help="libjemalloc.so.2, to be loaded before everything else")
    parser.add_argument("--here", action="store_true", help="print what this process measures, as JSON")
    add_out(parser)
    args = parser.parse_args(arguments)
    if args.here:
        print(json.dumps(measured(args.repeats)))
        return 0
    settings = [name for name in SETTINGS if name != "jemalloc" or args.jemalloc]
    record = about_run("page_faults", torch.device("cpu"), {"rounds": args.rounds, "repeats": args.repeats})
    result_file.check(args.out / "page_faults.json", record["device"], parser)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for setting in settings:
            command = [sys.executable, __file__, "--here", "--repeats", str(args.repeats)]
            done = subprocess.run(
                command, env=environment(setting, args.jemalloc), stdout=subprocess.PIPE, text=True, check=True
            )
            for row in json.loads(done.stdout):
                found.setdefault((row["call"], setting), []).append(row)
    rows = [
        {
            "call": name,
            "setting": setting,
            "ms": round(min(one["ms"] for one in found[name, setting]), 3),
            "faults": round(min(one["faults"] for one in found[name, setting]), 1),
        }
        for name in CALLS
        for setting in settings
    ]
    for row in rows:
        print("{call:14} {setting:12} {ms:9.3f} ms {faults:9.1f} faults".format(**row))
    result_file.write(args.out / "page_faults.json", record | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
