"""Kernels compiled beforehand are found where they were unpacked; a cache that does not fit, or is damaged, says so."""

import json
import subprocess
import sys
import tarfile
import zipfile

import pytest
from bench_scripts import ROOT, environment

pytest.importorskip("triton", reason="Triton exists on Linux only")

import gpu_ready
from peers import fetched
from precompiled import kernel_cache, launchers, triton_keys

# Two kernels; a launch that fails; and one that is interrupted before its kernel is sent, once it is to be compiled.
LAUNCHES = """
import multiprocessing, os, signal, torch
from fastwkv.kernels.rwkv4_step import relu_squared_

def launches():
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 64), (8, 64), (1, 65)):
            yield f"{dtype} {shape}", lambda x=torch.empty(shape, dtype=dtype): relu_squared_(x)
    yield "broken", lambda: relu_squared_(None)
    yield "late", late

def late():
    relu_squared_(torch.empty(4, 64, dtype=torch.float64))
    if multiprocessing.current_process().name.startswith("SpawnProcess"):
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
"""
# Of the same kernel, in a process that knows of the cache alone.
AGAIN = """
import sys, torch, triton
from machine_code.stand_in import stand_in
import some_launches
found = []
triton.knobs.compilation.listener = lambda **about: found.append(about["cache_hit"])
with stand_in():
    for name, call in some_launches.launches():
        if name not in ("broken", "late"):
            call()
print(found)
"""
# Digests of sources, asked for in one order or in another.
DIGESTS = """
import sys
from importlib import import_module
from precompiled import triton_keys
if sys.argv[1] == "settled":
    triton_keys.settle()
names = [name.split(".") for name in sys.argv[2:]]
print(dict(sorted((name, getattr(import_module(f"fastwkv.kernels.{file}"), name).cache_key) for file, name in names)))
"""
KERNELS = ["wkv_bwd._wkv_bwd_kernel", "wkv._wkv_fwd_kernel", "linear_scan_bwd._linear_scan_bwd_kernel"]
KERNELS += ["linear_scan._linear_scan_fwd_kernel", "wkv_step._wkv_step_kernel"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run the program; return its folder and what it said."""
    folder = tmp_path_factory.mktemp("precompile")
    (folder / "some_launches.py").write_text(LAUNCHES)
    command = [sys.executable, ROOT / "bench" / "precompile.py", "--modules", "some_launches", "--jobs", "1"]
    done = subprocess.run(
        [*command, "--out", folder / "cache.tar.xz"],
        env=surroundings(folder, folder / "cache"), capture_output=True, text=True,
    )  # fmt: skip
    return folder, done


def surroundings(folder, cache):
    found = environment()
    return found | {"PYTHONPATH": f"{found['PYTHONPATH']}:{folder}", "TRITON_CACHE_DIR": str(cache)}


@pytest.fixture
def packed(made):
    return made[0] / "cache.tar.xz"


@pytest.fixture
def altered(packed, tmp_path):
    """Return a function that writes a cache with another manifest."""

    def alter(change):
        with tarfile.open(packed) as archive:
            archive.extractall(tmp_path / "all", filter="data")
        about = json.loads((tmp_path / "all" / "manifest.json").read_text())
        change(about)
        (tmp_path / "all" / "manifest.json").write_text(json.dumps(about))
        with tarfile.open(tmp_path / "altered.tar.xz", "w:xz") as archive:
            for name in ("manifest.json", "kernels"):
                archive.add(tmp_path / "all" / name, name)
        return tmp_path / "altered.tar.xz"

    return alter


def test_each_kernel_is_compiled_once_and_failures_and_interrupts_are_told(made, packed):
    _, done = made
    assert done.returncode == 1
    assert "cache.tar.xz: 2 kernels" in done.stdout
    broken, interrupted = [line for line in done.stderr.splitlines() if line.startswith("precompile.py: ")]
    assert broken.startswith("precompile.py: some_launches: broken: AttributeError")
    assert interrupted == "precompile.py: interrupted: 1 kernels of 3 are lacking"
    about = kernel_cache.manifest(packed)
    assert about["code"] is None  # it is not up to date
    assert [kernel["name"] for kernel in about["kernels"]] == ["_relu_squared_kernel"] * 2
    assert len({kernel["source"] for kernel in about["kernels"]}) == 2


def test_what_travels_is_no_more_than_what_is_read(packed):
    with tarfile.open(packed) as archive:
        names = [name for name in archive.getnames() if not name.startswith("launchers/")]
    assert sorted(names) == sorted(
        ["manifest.json", *(f"kernels/{i}.{end}" for i in (0, 1) for end in ("json", "cubin"))]
    )


def test_unpacked_kernels_are_found_and_not_compiled(made, packed, tmp_path):
    folder, _ = made
    fit = kernel_cache.unpack(packed, tmp_path / "elsewhere")
    assert (fit.kernels, fit.reasons, fit.notes) == (2, (), ())
    command = [sys.executable, "-c", AGAIN]
    found = surroundings(folder, tmp_path / "elsewhere")
    done = subprocess.run(command, env=found, capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True]", done.stderr[-2000:]


def test_other_build_of_the_same_files_fits(altered, tmp_path):
    cache = altered(lambda about: about["files"].__setitem__(about["library"][0], "0" * 64))
    fit = kernel_cache.unpack(cache, tmp_path / "cache")
    assert (fit.kernels, fit.reasons) == (2, ())
    assert "is another build here" in fit.notes[0]
    assert len(list((tmp_path / "cache").glob("*/*.cubin"))) == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("triton", "3.1.0", "made with Triton 3.1.0, here is"),
        ("files", ["0" * 64], "files of its compiler differ"),
        ("options", "0" * 64, "options have other defaults here"),
        ("environment", {"DISABLE_PTXAS_OPT": "true"}, "DISABLE_PTXAS_OPT changes what is compiled: made with true"),
    ],
)
def test_cache_of_another_compiler_is_not_unpacked(altered, tmp_path, name, value, said):
    fit = kernel_cache.unpack(altered(lambda about: about.update({name: value})), tmp_path / "cache")
    assert fit.kernels == 0
    assert said in fit.reasons[0]
    assert not (tmp_path / "cache").exists()


def test_changed_source_and_other_ptxas_are_named(altered, tmp_path):
    def change(about):
        about["sources"]["kernels/rwkv4_step.py"] = "0"
        about["ptxas"] = "Cuda compilation tools, release 1.2, V1.2.3\n"

    fit = kernel_cache.unpack(altered(change), tmp_path / "cache")
    assert fit.kernels == 2
    assert [reason.partition(" ")[0] for reason in fit.reasons] == ["kernels/rwkv4_step.py"]
    assert fit.notes[0].startswith("made with ptxas V1.2.3, here is")


@pytest.mark.parametrize("end", [0, 100, -100])
def test_damaged_or_missing_cache_says_so(packed, tmp_path, end):
    path = tmp_path / "damaged.tar.xz"
    path.write_bytes(packed.read_bytes()[:end])
    assert kernel_cache.unpack(path, tmp_path / "cache").reasons[0].startswith("damaged.tar.xz is damaged: ")
    assert not list((tmp_path / "cache").glob("*/*.cubin"))
    path.unlink()
    assert kernel_cache.unpack(path, tmp_path / "cache").reasons[0].startswith("there is no damaged.tar.xz")


def test_keys_are_those_of_triton_for_this_python(packed):
    about = kernel_cache.manifest(packed)
    index, digest = about["library"]
    assert about["files"][index] == digest
    assert triton_keys.differences(about, index) == ([], [])


def test_launchers_are_compiled_without_cuda(tmp_path):
    release = ".".join(map(str, sys.version_info[:2]))
    if launchers.headers(release) is None:
        pytest.skip("this Python has no headers")
    source = '#include "cuda.h"\n#include <Python.h>\nCUresult first(void) { return cuInit(0); }\n'
    suffix, modules = launchers.build({source: "first"}, release, tmp_path, 1)
    assert suffix.endswith(".so")
    assert b"libcuda.so.1" in modules[source]
    with pytest.raises(ValueError, match="the C compiler fails"):
        launchers.build({"no C": "second"}, release, tmp_path, 1)
    with pytest.raises(ValueError, match=r"no Python 9\.9 with headers here"):
        launchers.build({source: "first"}, "9.9", tmp_path, 1)


def test_peers_are_fetched_once(monkeypatch, tmp_path):
    called = []

    def pip(command, *arguments):
        called.append(command)
        if command == "download":
            with zipfile.ZipFile(f"{arguments[-2]}/transformers.whl", "w") as archive:
                for name in fetched.SOURCES:
                    archive.writestr(f"transformers/kernels/rwkv/{name}", name)

    monkeypatch.setattr(fetched, "pip", pip)
    for name in ("PACKAGES", "RWKV_CUDA"):
        monkeypatch.setattr(fetched, name, tmp_path / name)
    assert fetched.fetch() == [*fetched.WHEELS, fetched.TRANSFORMERS, *fetched.SOURCES]
    assert fetched.fetch() == []
    assert called == ["install", "download"]
    assert (tmp_path / "RWKV_CUDA" / fetched.SOURCES[0]).read_text() == fetched.SOURCES[0]


def test_preparation_stops_at_what_fails(monkeypatch, tmp_path, capsys):
    reached = []

    def fail():
        raise ValueError("no network")

    monkeypatch.setattr(fetched, "READY", tmp_path / "ready")
    monkeypatch.setattr(
        gpu_ready, "STEPS", {"one": lambda: "is there", "two": fail, "three": lambda: reached.append(3)}
    )
    with pytest.raises(SystemExit) as stopped:
        gpu_ready.main([])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("one: is there, 0 s")
    assert printed.err == "gpu_ready.py: two: no network\n"
    assert reached == []


def test_digests_do_not_depend_on_what_is_launched_first(tmp_path):
    found = {
        str(subprocess.run([sys.executable, "-c", DIGESTS, "settled", *names], env=surroundings(tmp_path, tmp_path),
                           capture_output=True, text=True, check=True, timeout=280).stdout)
        for names in (KERNELS, KERNELS[::-1])
    }  # fmt: skip
    assert len(found) == 1
