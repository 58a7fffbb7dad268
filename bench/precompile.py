"""Compiles for a GPU of capability 9.0, on a machine without one, the kernels that programs will launch there.

Each module has a function ``launches()`` that yields names and calls, the most valuable first; every call makes, with
CPU tensors that nothing is in, the launches that its program will make. It is run with the version of Triton that the
machine with the GPU has; the versions of PyTorch and of Python do not matter. First the launches are gone through
without compiling, to see which kernels are new in which; then several processes compile. Kernels that an earlier run
has compiled are taken from its cache. At the end, or on Ctrl-C, all is packed into one file
(precompiled/kernel_cache.py). It fits no other version of Triton, and no kernels that have changed since, be it that
only a line above them was added.
"""

import importlib
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # and not what the compiler makes on the way

try:
    from common.command_line import Parser, positive
    from common.program import bar_options, sigterm_as_interrupt
    from machine_code.stand_in import Kernel, StandIn, stand_in
    from precompiled import kernel_cache, launchers, triton_keys
    from tqdm import tqdm
    from triton.compiler import CompiledKernel
except ImportError as error:
    sys.exit(f"precompile.py: {error}; pip install -e '.[bench]' installs what it needs (Triton on Linux only)")

MODULES = (  # of gpu.py first and second, the most valuable first
    "correctness.groups",
    "gpu_minutes.headline",
    "launch_shapes.skeleton",
    "launch_shapes.assumptions",
    "launch_shapes.candidates",
    "gpu_minutes.generation",
)
OUT = kernel_cache.ROOT / "build" / "gpu-ready" / "cache.tar.xz"
LARGEST = 16 << 20  # bytes of the packed cache

Identity = tuple[str, str]  # digests of the source with arguments, and of the options


def launches(modules: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the launches of modules, in their order."""
    for name in modules:
        for what, call in importlib.import_module(name).launches():
            yield f"{name.rpartition('.')[2]}: {what}", call


def identity(source: Any, options: dict[str, Any]) -> Identity:
    """Return what tells kernels apart."""
    return source.hash(), triton_keys.options_digest(options)


def count(modules: list[str]) -> list[tuple[str, list[Identity], str | None]]:
    """Return of every launch its name, the kernels that none before it has asked for, and why it failed."""
    seen: set[Identity] = set()
    found: list[tuple[str, list[Identity], str | None]] = []
    triton_keys.settle()
    with stand_in(compiles=False) as device:
        for name, call in launches(modules):
            before = len(device.kernels)
            error = _failure(call)
            asked = dict.fromkeys(identity(kernel.source, kernel.options) for kernel in device.kernels[before:])
            found.append((name, [one for one in asked if one not in seen], error))
            seen.update(asked)
    return found


def work(modules: list[str], wanted: dict[int, list[Identity]], claimed: Any, results: Any) -> None:
    """Compile, of the launches that no other process has claimed, what is ``wanted``, and send it.

    All processes go through the launches in the same order, so that each kernel is first met where it is wanted.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the one that packs
    triton_keys.settle()
    device, sources, mine = StandIn(), launchers.Sources(), set()
    device.launcher_cls = sources.launcher
    sources.driver()
    with stand_in(device, compiles=lambda source, options: identity(source, options) in mine):
        for index, (name, call) in enumerate(launches(modules)):
            if index in wanted and _claims(claimed, index):
                before = len(device.kernels)
                mine = set(wanted[index])
                error = _failure(call)
                compiled = [kernel for kernel in device.kernels[before:] if isinstance(kernel.compiled, CompiledKernel)]
                files = {kernel.source.fn.fn.__code__.co_filename for kernel in compiled}
                results.put((name, [entry(kernel) for kernel in compiled], files, dict(sources.names), error))


def _claims(claimed: Any, index: int) -> bool:
    with claimed.get_lock():
        claimed[index] += 1
        return claimed[index] == 1


def _failure(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:  # of a launch that cannot be made, or a kernel that does not compile: others can
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def entry(kernel: Kernel) -> kernel_cache.Entry:
    """Return what is packed of a compiled kernel."""
    which = identity(kernel.source, kernel.options)
    assert triton_keys.key(*which) == kernel.compiled.hash, "Triton names its folder in another way"
    files = {Path(path).suffix: Path(path) for path in kernel.compiled.metadata_group.values()}
    code, description = files[".cubin"].read_bytes(), files[".json"].read_bytes()
    return kernel_cache.Entry(files[".json"].stem, *which, code, description)


class Compiled:
    """The kernels and launchers that the processes have sent, and what failed."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.entries: dict[Identity, kernel_cache.Entry] = {}
        self.files = {str(path) for path in (kernel_cache.ROOT / "kernels").glob("*.py")}
        self.launchers: dict[str, str] = {}
        self.errors: dict[str, str] = {}


def compile_all(modules: list[str], jobs: int) -> Compiled:
    """Compile the kernels of modules in several processes."""
    context, done = multiprocessing.get_context("spawn"), Compiled()
    with context.Pool(1) as pool:  # in a process of its own: a function may keep what it was given in place of a kernel
        found = pool.apply(count, (modules,))
    done.errors |= {name: error for name, _, error in found if error}
    wanted = {index: new for index, (_, new, _) in enumerate(found) if new}
    total = sum(map(len, wanted.values()))
    results, claimed = context.Queue(), context.Array("i", len(found))
    arguments = (modules, wanted, claimed, results)
    processes = [context.Process(target=work, args=arguments) for _ in range(min(jobs, len(wanted)))]
    for process in processes:
        process.start()
    try:
        with sigterm_as_interrupt(), tqdm(total=total, unit=" kernels", **bar_options()) as bar:
            for name, entries, files, sources, error in _received(results, processes):
                done.entries |= {(one.source, one.options): one for one in entries}
                done.files |= files
                done.launchers |= sources
                done.errors |= {name: error} if error else {}
                bar.set_postfix_str(name[:60], refresh=False)
                bar.update(len(entries))
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        done.errors["interrupted"] = f"{total - len(done.entries)} kernels of {total} are lacking"
        return done
    for name, new, _ in found:
        lacking = sum(one not in done.entries for one in new)
        if lacking and name not in done.errors:
            done.errors[name] = f"{lacking} kernels were not compiled"
    return done


def _received(results: Any, processes: list[Any]) -> Iterator[Any]:
    """Yield what processes send, until all have ended, however that is."""
    while True:
        running = any(process.is_alive() for process in processes)
        try:
            yield results.get(timeout=0.5)
        except queue.Empty:
            if not running:
                break
    for process in processes:
        process.join()


def up_to_date(out: Path, digest: str) -> bool:
    """Return whether a cache is of this code, and nothing in it failed."""
    try:
        return kernel_cache.manifest(out)["code"] == digest
    except kernel_cache.DAMAGED:
        return False


def pack(done: Compiled, out: Path, release: str, jobs: int, digest: str) -> str:
    """Write the cache, with launchers for a release of Python if there is one; say what it has."""
    suffix, modules, said = "", {}, ""
    if done.launchers:
        try:
            with tempfile.TemporaryDirectory() as folder:
                suffix, modules = launchers.build(done.launchers, release, Path(folder), jobs)
        except ValueError as error:
            said = f" ({error}: they are compiled where they are needed)"
    entries, about = list(done.entries.values()), {"code": None if done.errors else digest}
    size = kernel_cache.pack(out, entries, done.files, modules, done.launchers, suffix, **about)
    return f"{out.name}: {len(done.entries)} kernels, {len(modules)} launchers{said}, {size / 2**20:.1f} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = Parser(prog="precompile.py", description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option(
        "--modules", type=lambda text: text.split(","), default=list(MODULES), metavar="LIST", help=",".join(MODULES)
    )
    option("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="compilers at a time (%(default)s)")
    option("--python", default="3.12", metavar="X.Y", help="whose launchers are compiled too (%(default)s)")
    option("--out", type=Path, default=OUT, metavar="FILE", help="the packed cache (build/gpu-ready/cache.tar.xz)")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        about = triton_keys.about()
        digest = kernel_cache.code(about, args.modules)
    except ValueError as error:
        parser.error(str(error))
    if up_to_date(args.out, digest):
        print(f"{args.out.name} is up to date")
        return 0
    print(f"compiling with Triton {about['triton']}", flush=True)
    try:
        done = compile_all(args.modules, args.jobs)
    except ImportError as error:
        parser.error(str(error))
    if not done.entries:
        sys.exit(f"precompile.py: nothing was compiled: {next(iter(done.errors.values()), 'no launches')}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(pack(done, args.out, args.python, args.jobs, digest), f"{time.monotonic() - began:.0f} s", sep=", ")
    for name, error in done.errors.items():
        print(f"precompile.py: {name}: {error}", file=sys.stderr)
    if args.out.stat().st_size > LARGEST:
        sys.exit(f"precompile.py: {args.out.name} is larger than {LARGEST >> 20} MiB")
    return int(bool(done.errors))


if __name__ == "__main__":
    sys.exit(main())
