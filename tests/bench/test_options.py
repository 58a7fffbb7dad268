"""The command lines of the programs: what each refuses beyond what all do, and committed results shown again."""

import importlib
import json

import pytest
from bench_scripts import ROOT, assert_refused

COUNT = "expected a whole number of at least 1, got '0'"
NOTHING = "nothing to measure: no operator of --ops has one of --dtypes and one of --providers"
BAD = {
    "ops": {
        "unknown operator 'attention' (choose from wkv, linear_scan, linear_scan_fixed)": "--ops wkv,attention",
        "unknown provider 'tensorflow' (choose from fastwkv, hf, loop, reference, fla,": "--providers hf,tensorflow",
        "unknown dtype 'int8' (choose from float32, bfloat16, float16, float64, complex64,": "--dtypes int8",
        NOTHING: "--ops wkv --dtypes complex64",
        f"{NOTHING}\n": "--ops linear_scan --providers hf",
        "unknown pass 'sideways'": "--passes sideways",
        "expected shapes like 4x1024x768, got '4x0x768'": "--shapes 1x1x1,4x0x768",
        "expected shapes like 4x1024x768, got 'large'": "--shapes large",
        "packed documents are a batch of one, got '2x8x5p'": "--shapes 2x8x5p",
        f"argument --minutes: {COUNT}": "--minutes 0",
        "there is no wkv_op.cpp in 'empty'": "--rwkv-cuda empty",
    },
    "accuracy": {
        "unknown kind of inputs 'nice' (choose from ordinary, adversarial)": "--inputs nice",
        NOTHING: "--ops wkv --dtypes complex64",
        f"argument --tokens: {COUNT}": "--tokens 0",
    },
    "lru_layer": {
        "expected shapes like 8x4096x1024x1024 (B, T, H, N), got '8x4096x1024'": "--shapes 8x4096x1024",
        "expected shapes like 8x4096x1024x1024 (B, T, H, N), got '8x0x1x1'": "--shapes 8x0x1x1",
        "argument --dtypes: unknown dtype 'float64' (choose from float32, bfloat16, float16)": "--dtypes float64",
        "argument --providers: unknown provider 'loop' (choose from fastwkv, complex64, fft)": "--providers loop",
    },
    "decode": {
        "argument --sizes: unknown size '5b' (choose from tiny, 169m": "--sizes 5b",
        f"argument --tokens: {COUNT}": "--tokens 0",
        "argument --temperature: expected a number of at least 0, got '-1'": "--temperature -1",
        "argument --temperature: expected a number of at least 0, got 'hot'": "--temperature hot",
    },
    "hf_speed": {"argument --passes: unknown pass 'decode' (choose from train, prefill)": "--passes decode"},
    "gen_time": {
        "unknown model 'gpt-5' (choose from rwkv4, gpt-neox, opt, bloom, gpt-neo)": "--models rwkv4,gpt-5",
        "unknown protocol 'beam' (choose from recompute, kv-cache)": "--protocols beam",
        "argument --size: invalid choice: '5b'": "--size 5b",
        f"argument --tokens: {COUNT}": "--tokens 0",
        "cannot read the prompt 'nowhere': No such file or directory": "--prompt nowhere",
        "the prompt 'nothing' is empty": "--prompt nothing",
    },
    "host": {"kernels are interpreted here, which is no launch; unset TRITON_INTERPRET": "--device cpu"},
}


@pytest.fixture(params=BAD)
def script(request):
    for package in ("tqdm", "transformers", *(["triton"] if request.param == "host" else [])):
        pytest.importorskip(package)
    return importlib.import_module(request.param)


def test_bad_arguments_give_one_line_and_status_2(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").touch()
    for message, arguments in BAD[script.__name__].items():
        assert_refused(script, arguments.split(), message, capsys)


def test_committed_results_are_shown_again(script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = ROOT / "bench" / "results" / "cpu-2-cores" / f"{script.__name__}.json"
    assert script.main(["--redraw", str(path), "--out", str(tmp_path)]) == 0
    figures = {"gen_time": ["gen_time.png"]}
    figures["ops"] = [f"ops_{name}.png" for name in ("linear_scan", "linear_scan_fixed", "wkv")]
    assert sorted(one.name for one in tmp_path.iterdir()) == figures.get(script.__name__, [])
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    for row in record.get("rows") or record["series"]:
        assert row.get("label") or row.get("provider") or row.get("call") or row.get("name") or row["size"] in printed
