"""Everything that needs a GPU, part by part: the tests on CUDA tensors, compute-sanitizer, the benchmarks.

A part is a command of at most nine minutes. Its outcome stands in gpu.json beside the results, with the digest of the
code that it ran on: a part that has passed is not run again until the code changes, or --again. A part that fails does
not keep the next ones from running. Every benchmark writes into a folder of its own, named after the part.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

try:
    from common import result_file
    from common.about import slug
    from common.command_line import Parser
    from common.program import sigterm_as_interrupt
except ImportError as error:
    sys.exit(f"gpu.py: {error}; pip install -e '.[bench]' installs what it needs")

from gpu_minutes import processes
from gpu_minutes.commands import digest as code
from gpu_minutes.processes import ROOT, environment

LOGS = ROOT / "build" / "gpu"  # which git ignores
LIMIT, GRACE = 510.0, 20.0  # seconds that a part may take, and then to write what it has measured
DONE = ("passed", "not available")

PROBE = """
import json, torch
from common.about import about_device, about_software
if torch.cuda.is_available():
    print(json.dumps({"device": about_device(torch.device("cuda")), **about_software()}))
"""


@dataclass(frozen=True)
class Part:
    """One command, and what it is for."""

    name: str
    about: str
    command: tuple[str, ...]


def parts(out: Path) -> list[Part]:
    """Return all parts in their order; their results go below ``out``."""
    scan = _files("ops/*linear_scan*", "kernels/*linear_scan*")
    wkv = [file for file in _files("ops/*", "kernels/*") if file not in scan]
    # The programs' own tests expect the small sizes of a CPU, and the parts below run the programs.
    rest = _files("*", "nn/*", "integrations/*", "reference/*", "kernels/cpu/*")
    tests = ("-m", "pytest", "-n", "auto", "--dist", "worksteal", "--timeout", str(int(LIMIT)))
    found = [
        _part("tests-wkv", "the tests of WKV", *tests, *wkv),
        _part("tests-scan", "the tests of the linear scan", *tests, *scan),
        _part("tests-rest", "the tests of layers, models and what else there is", *tests, *rest),
    ]
    for tool in ("memcheck", "racecheck"):
        about = f"every operator and pass on tiny shapes under compute-sanitizer's {tool}"
        found.append(_part(f"sanitizer-{tool}", about, "bench/sanitize.py", "--tool", tool))

    def measured(name: str, about: str, script: str, *options: str) -> None:
        found.append(_part(name, about, f"bench/{script}.py", *options, "--out", str(out / name)))

    on_gpu = ("--device", "cuda")
    timed = (*on_gpu, "--minutes", "7")
    scans = "linear_scan,linear_scan_fixed"
    measured("ops-wkv", "speed of WKV beside its peers", "ops", "--ops", "wkv", *timed)
    measured("ops-scan", "speed of the linear scan beside its peers", "ops", "--ops", scans, *timed)
    measured("accuracy", "error of the operators and of their peers", "accuracy")
    measured("hf_speed", "Hugging Face's RWKV-4 with our operator and without", "hf_speed", *on_gpu)
    measured("decode", "tokens a second beside what reading the weights allows", "decode", *on_gpu)
    measured("lru_layer", "a whole LRU layer beside two other forms of it", "lru_layer", *on_gpu)
    for size, dtype in product(("169m", "3b"), ("float32", "bfloat16")):
        # "recompute" of one model of 3b in float32 is 3e15 multiply-adds: two transformers, then.
        models = "rwkv4,gpt-neox,opt" if (size, dtype) == ("3b", "float32") else "rwkv4,gpt-neox,opt,bloom,gpt-neo"
        options = (*timed, "--size", size, "--dtype", dtype, "--models", models)
        about = f"cumulative time to generate, models of {size} in {dtype}"
        measured(f"gen_time-{size}-{dtype}", about, "gen_time", *options)
    # RWKV-4 comes first; how far the cache gets in what is left of the time, the host decides.
    options = (*timed, "--size", "3b", "--dtype", "bfloat16", "--tokens", "16384", "--protocols", "kv-cache")
    measured("gen_time-long", "cumulative time to generate 16384 tokens, with a cache", "gen_time", *options)
    return found


def _part(name: str, about: str, *arguments: str) -> Part:
    return Part(name, about, (sys.executable, *arguments))


def _files(*patterns: str) -> list[str]:
    """Return the test files that match, in a fixed order."""
    found = {path for pattern in patterns for path in (ROOT / "tests").glob(f"{pattern}.py")}
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name.startswith("test_"))


class Record:
    """gpu.json: the device, and what became of each part."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        """Take up what was recorded before; ``about`` describes device and software."""
        self.path, self.about, self.code = out / "gpu.json", about, code()
        rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["part"]: row for row in rows}

    def done(self, part: Part) -> str | None:
        """Return how a part ended if it need not run again."""
        row = self.rows.get(part.name)
        return row["status"] if row and row["code"] == self.code and row["status"] in DONE else None

    def add(self, part: Part, status: str, seconds: float) -> None:
        """Record how a part ended."""
        row = {"part": part.name, "status": status, "seconds": seconds, "commit": self.about["commit"]}
        self.rows[part.name] = {**row, "code": self.code}
        result_file.write(self.path, {"benchmark": "gpu", **self.about, "rows": list(self.rows.values())})


def run_part(part: Part, log: Path, limit: float = LIMIT, grace: float = GRACE) -> tuple[str, float]:
    """Run a part, its output shown and kept in ``log``; return how it ended and after how many seconds.

    A part that is out of time, or interrupted, is asked to end first, so that it can write what it has.
    """
    with log.open("wb") as file:

        def said(name: str, block: bytes) -> None:
            file.write(block)
            file.flush()
            print(block.decode(errors="replace"), end="", flush=True)

        def printed(name: str, line: str) -> None:
            said(name, f"{line}\n".encode())

        one = processes.start(part.name, part.command, printed, said, environment())
        try:
            processes.wait([one], {part.name: one.began + limit}, grace)
        finally:
            if one.ended is None:
                processes.wait([one], {part.name: 0.0}, grace)
    return one.status(), one.seconds()


def run(wanted: Sequence[Part], record: Record, logs: Path, *, again: bool = False) -> int:
    """Run parts that are not done; return the exit status."""
    logs.mkdir(parents=True, exist_ok=True)
    lines, failed = [], False
    for part in wanted:
        ended = None if again else record.done(part)
        if ended:
            lines.append(f"{part.name:<22} {ended}, before")
            continue
        print(f"\n== {part.name}: {part.about}", flush=True)
        ended, seconds = run_part(part, logs / f"{part.name}.log")
        record.add(part, ended, seconds)
        failed |= ended not in DONE
        lines.append(f"{part.name:<22} {ended}, {seconds:.0f} s")
    print("\n" + "\n".join(lines))
    return int(failed)


def chosen(names: Sequence[str], known: Sequence[Part], parser: Parser) -> list[Part]:
    """Return the parts of these names; "tests" stands for all whose names begin so, no name for all there are."""
    for name in names:
        if not any(_called(part, name) for part in known):
            parser.error(f"unknown part {name!r} (choose from {', '.join(part.name for part in known)})")
    return [part for part in known if not names or any(_called(part, name) for name in names)]


def _called(part: Part, name: str) -> bool:
    return part.name == name or part.name.startswith(f"{name}-")


def probe() -> dict[str, Any] | None:
    """Describe the GPU, None if there is none. In a process of its own: this one takes no memory of the GPU."""
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT / "bench", check=True)
    return json.loads(done.stdout) if done.stdout.strip() else None


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    about_time = "With first or second in place of a PART: what a few minutes are for (gpu.py first --help)."
    parser = Parser(prog="gpu.py", description="Run everything that needs a GPU, part by part.", epilog=about_time)
    parser.add_argument("parts", nargs="*", metavar="PART", help="such as ops-wkv, or ops for all that begin so")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: bench/results/ and the name of the GPU)")
    parser.add_argument("--list", action="store_true", help="say which parts there are")
    parser.add_argument("--again", action="store_true", help="run what is done already, too")
    args = parser.parse_args(arguments)
    wanted = chosen(args.parts, parts(args.out or ROOT), parser)
    if args.list:
        print("\n".join(f"{part.name:<22} {part.about}" for part in wanted))
        return 0
    about = probe()
    if about is None:
        parser.error("there is no GPU here")
    out = (args.out or ROOT / "bench" / "results" / slug(about["device"]["name"])).resolve()
    result_file.check(out / "gpu.json", about["device"], parser)
    try:
        with sigterm_as_interrupt():
            return run(chosen(args.parts, parts(out), parser), Record(out, about), LOGS, again=args.again)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
