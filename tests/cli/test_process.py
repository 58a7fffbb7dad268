"""The command as a process of its own, and the package without it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_text_begun_in_one_process_is_continued_in_another(folder, tmp_path, write) -> None:
    state = tmp_path / "s.safetensors"
    generate = ("-m", "fastwkv", "generate", "--model", folder)
    first = python(*generate, "--prompt", "Once", "--tokens", 5, "--save-state", state)
    second = python(*generate, "--load-state", state, "--tokens", 7)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout + second.stdout == write("--prompt", "Once", "--tokens", 12)
    assert first.stderr.startswith("fastwkv: read 4 tokens (")
    assert second.stderr.startswith("fastwkv: read 0 tokens, generated 7 tokens (")


def test_importing_the_package_loads_neither_the_command_nor_tokenizers() -> None:
    code = "import sys, fastwkv; print({'tokenizers', 'fastwkv.cli'} & sys.modules.keys())"
    assert python("-c", code).stdout == "set()\n"
