"""All that a few minutes on a GPU need beforehand, on a machine without one: kernels, peers, a rehearsal.

Into build/gpu-ready, which goes to the machine with the GPU: the kernels of `gpu.py first`, compiled by the version of
Triton that such machines have; the peers of the benchmarks; the commit. Triton itself, which stays here, is installed
into build/gpu-env and nowhere else. Then both commands are rehearsed. Files that are up to date are not made again.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

try:
    from common.command_line import Parser
    from peers import fetched
    from precompiled import kernel_cache
except ImportError as error:
    sys.exit(f"gpu_ready.py: {error}; pip install -e '.[bench]' installs what it needs")

ROOT = Path(__file__).resolve().parents[1]
TRITON = "3.6.0"  # of PyTorch 2.11, which the machines with GPUs have
ENVIRONMENT = ROOT / "build" / "gpu-env"
REHEARSAL = "1500"  # seconds for each command, which takes four minutes on two idle cores
LARGEST = 64 << 20  # bytes of all that travels


def install_triton() -> str:
    """Install that version of Triton for this Python, in a folder of its own; PyTorch is that of this environment."""
    folder, done = _triton(), _triton() / "complete"
    if done.exists():
        return "is there"
    release = f"{sys.version_info.major}.{sys.version_info.minor}"
    wheel = ("--no-deps", "--only-binary=:all:", "--upgrade", "--target", str(folder))
    try:
        fetched.pip("install", *wheel, f"triton=={TRITON}")
    except ValueError as error:
        raise ValueError(f"{error} (this is Python {release}; PYTHON=... chooses another for a new .venv)") from error
    done.touch()
    return f"installed for Python {release}"


def _triton() -> Path:
    return ENVIRONMENT / f"triton-{TRITON}-{sys.implementation.cache_tag}"


def compile_kernels() -> str:
    """Compile what `gpu.py` will launch."""
    paths = os.pathsep.join(map(str, (_triton(), ROOT)))
    surroundings = {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(ENVIRONMENT / "triton-cache")}
    run("bench/precompile.py", **surroundings)
    return "are there"


def fetch_peers() -> str:
    """Fetch the peers."""
    return f"fetched {', '.join(new)}" if (new := fetched.fetch()) else "are there"


def note_commit() -> str:
    """Write down the commit, which the copy on the other machine cannot tell."""
    command = ("git", "-C", str(ROOT), "rev-parse", "HEAD")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        (fetched.READY / "commit").unlink(missing_ok=True)
        return "not known: this is no checkout"
    (fetched.READY / "commit").write_text(done.stdout)
    return done.stdout.strip()[:12]


def rehearse() -> str:
    """Run both commands with interpreted kernels and tiny shapes."""
    stamp, code = ENVIRONMENT / "rehearsed", kernel_cache.code()
    if stamp.exists() and stamp.read_text() == code:
        return "of this code was right"
    for kind in ("first", "second"):
        out = str(ROOT / "build" / f"gpu-rehearsal-{kind}")
        run("bench/gpu.py", kind, "--rehearse", "--budget", REHEARSAL, "--out", out, PYTHONPATH=str(ROOT))
    stamp.write_text(code)
    return "every step of both commands did what it is for"


STEPS: dict[str, Callable[[], str]] = {
    f"Triton {TRITON}": install_triton,
    "peers": fetch_peers,
    "commit": note_commit,
    "kernels": compile_kernels,
    "rehearsal": rehearse,
}


def run(*command: str, **surroundings: str) -> None:
    """Run a program of this repository; ValueError if it fails."""
    status = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **surroundings}).returncode
    if status:
        raise ValueError(f"{' '.join(command)} ended with status {status}")


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = Parser(prog="gpu_ready.py", description=__doc__.split("\n\n")[0])
    parser.parse_args(arguments)
    fetched.READY.mkdir(parents=True, exist_ok=True)
    for name, step in STEPS.items():
        began = time.monotonic()
        try:
            said = step()
        except (OSError, ValueError) as error:
            parser.exit(1, f"gpu_ready.py: {name}: {error}\n")
        print(f"{name}: {said}, {time.monotonic() - began:.0f} s", flush=True)
    travels = size(fetched.READY)
    print(f"ready: {fetched.READY.relative_to(ROOT)} has {travels / 2**20:.1f} MiB")
    return int(travels > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
