"""Figures in sentences of the pages are those of the committed files; test_readme.py compares the tables."""

import json
from statistics import mean

import pages
import pytest


def results(name, device="cpu-2-cores"):
    return json.loads((pages.ROOT / "bench/results" / device / f"{name}.json").read_text())


def row(record, **values):
    (found,) = (one for one in record["rows"] if values.items() <= one.items())
    return found


def errors(**values):
    return row(results("accuracy"), **values)["errors"]


def test_decoding():
    decode, prefill = (row(results("decode"), **{"pass": one, "status": "ok"}) for one in ("decode", "prefill"))
    said = pages.words("docs/benchmarks.md")
    seconds, megabytes = prefill["ms"] / 1000, prefill["peak_bytes"] / 1e6
    assert f"for one text, takes {decode['ms']:.1f} ms, and a prompt of 16384 tokens {seconds:.1f} s" in said
    assert f"in {megabytes:.0f} MB beside the model" in said
    assert f"reading the weights would take {decode['fraction']:.2f} of that token" in said


def test_learning():
    said = pages.words("docs/benchmarks.md")
    steps = results("lru_steps")["rows"]
    networks = ("tanh", "linear", "diagonal", "ring", "lru")
    found = [mean(r["accuracy"] for r in steps if (r["task"], r["model"]) == ("copy-100", n)) for n in networks]
    *first, last = (f"{100 * one:.0f}" for one in found)
    assert f"{', '.join(first)} and {last} % on the way" in said
    record = results("learning_curve")
    rwkv, transformer = (row(record, model=name) for name in ("rwkv4", "transformer"))
    assert f"RWKV-4 needs {rwkv['bits']:.2f} bits a byte, {rwkv['carried_bits']:.2f} with its state" in said
    assert f"the transformer {transformer['bits']:.2f}" in said
    yardsticks = record["yardsticks"]
    assert f"{yardsticks['gzip -9']:.2f} and a trigram model {yardsticks['trigram of all training text']:.2f}" in said


def test_host():
    us = {(one["call"], one["pass"]): one["us"] for one in results("host")["rows"]}
    said = pages.words("docs/speed.md")
    theirs, ours = (us[f"launch of a kernel, {whose}", ""] for whose in ("Triton's", "held"))
    assert f"Triton's own launch takes {theirs:.0f} µs: a launch {ours:.0f} µs" in said
    wkv, both = (us["wkv, one chunk", which] for which in ("forward", "forward and backward"))
    empty = us["autograd.Function without", "forward and backward"]
    assert f"`wkv` {wkv:.0f} without gradients and {both:.0f} forward and backward" in said
    assert f"an empty `autograd.Function` takes {empty:.0f}" in said


def test_errors_of_interpreted_kernels_and_of_loops():
    said = pages.words("docs/accuracy.md")
    hard = errors(op="wkv", inputs="adversarial", dtype="float32", T=1024, provider="fastwkv-triton").values()
    least, most = (f"{one:.1e}".replace("e-0", "e-") for one in (min(hard), max(hard)))
    assert f"the interpreted kernels have {least} to {most} at T = 1024" in said
    loops = [
        errors(op="linear_scan", inputs="adversarial", dtype="bfloat16", T=tokens, provider="loop")["h"]
        for tokens in (1024, 8192)
    ]
    assert "({:.1f} at T = 1024, {:.1f} at T = 8192)".format(*loops) in said


@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_no_kernel_spills(version):
    assert all(one["spilled_bytes"] == 0 for one in results(f"compiled-triton-{version}", "computed")["rows"])


def test_instructions():
    record = results("compiled-triton-3.9", "computed")

    def instructions(kernel, dtype):
        return f"{row(record, kernel=kernel, dtype=dtype)['instructions']:.0f}"

    said = pages.words("docs/gpu.md")
    forward, backward = (instructions(f"wkv {which}", "bfloat16") for which in ("forward", "backward"))
    assert f"a token of WKV costs one channel {forward} instructions forward" in said
    assert f"and {backward} backward in bfloat16" in said
    scan = [instructions("scan forward", dtype) for dtype in ("float32", "complex64", "bfloat16")]
    assert "costs {} in float32 and {} in complex64, and {} in bfloat16".format(*scan) in said


def test_bytes_moved():
    whole = [one for one in results("traffic", "computed")["rows"] if one["chunk"] is None]
    most = max(one["ratio"] for one in whole if one["op"] != "wkv" or one["pass"] == "forward")
    assert f"moves at most {most:.2f} times what it has to" in pages.words("docs/gpu.md")


def test_model_of_a_gpu():
    rows = results("gpu_model", "computed")["rows"]
    wide = [one for one in rows if one["B"] * one["C"] >= 16384]
    groups = (
        [one for one in wide if one["op"] == "wkv"],
        [one for one in wide if one["op"] != "wkv"],
        [one for one in rows if one["B"] == 1 and one["T"] >= 65536],
    )
    ranges = [f"{min(r['fraction'] for r in g):.2f} to {max(r['fraction'] for r in g):.2f}" for g in groups]
    said = pages.words("docs/gpu.md")
    assert f"makes {ranges[0]} of the copy bandwidth for WKV" in said
    assert f"{ranges[1]} for the scan, and {ranges[2]} at B = 1" in said
