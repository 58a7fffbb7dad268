"""Writes the tables of README.md and docs/ from committed results: between `<!-- table NAME -->` and `<!-- end -->`.

After new results under bench/results: python docs/tools/tables.py
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from common.result_file import markdown  # noqa: E402 (bench/ is a folder of scripts and no package)

Row = dict[str, Any]
Lines = list[list[str]]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

WKV_ERRORS = ("y", "gk", "gv", "gu", "gw", "gstate")
SCAN_ERRORS = ("h", "ga", "gx", "gh0")
PASSES = {"forward": "forward", "forward+backward": "forward and backward", "step": "one token"}


@cache
def results(name: str, device: str = "cpu-2-cores") -> dict[str, Any]:
    """Return a committed file of results."""
    record: dict[str, Any] = json.loads((ROOT / "bench/results" / device / f"{name}.json").read_text())
    return record


def row(record: str, **values: Any) -> Row:
    """Return the one row of a file that has these values."""
    (found,) = (one for one in results(record)["rows"] if values.items() <= one.items())
    return found


def digits(value: float) -> str:
    """Return three digits of a number, or all before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def times(value: float) -> str:
    """Return a ratio."""
    return f"{digits(value)}×"


def error(value: float) -> str:
    """Return one digit of an error."""
    return f"{value:.0e}".replace("e-0", "e-")


def op(name: str, which: str, shape: tuple[int, int, int], provider: str = "fastwkv") -> Row:
    """Return a row of ops.json."""
    B, T, C = shape
    return row("ops", **{"op": name, "pass": which, "B": B, "T": T, "C": C, "provider": provider})


def against(name: str, which: str, shape: tuple[int, int, int], peers: dict[str, str], label: str = "") -> list[str]:
    """Return our time, and for each peer its time and how many times ours that is."""
    ours = op(name, which, shape)["ms"]
    line = [label or f"{PASSES[which]}, ({', '.join(map(str, shape))})", digits(ours)]
    for peer in peers:
        theirs = op(name, which, shape, peer)["ms"]
        line += [digits(theirs), times(theirs / ours)]
    return line


def head(first: str, peers: dict[str, str]) -> list[str]:
    """Return the head of a table of :func:`against`."""
    return [first, "fastwkv", *(cell for label in peers.values() for cell in (label, ""))]


def gen_time() -> str:
    """Lay out cumulative generation time."""
    names = {"recurrent": "RWKV-4, recurrent", "kv-cache": "GPT-NeoX, kv-cache", "recompute": "GPT-NeoX, recompute"}
    lines = []
    for series in results("gen_time")["series"]:
        seconds, carried = series["cumulative_seconds"], series["state_or_cache_bytes"][-1]
        size = f"{digits(carried / 1e6)} MB" if carried >= 1e6 else f"{digits(carried / 1e3)} kB"
        line = [names[series["protocol"]], *(digits(seconds[tokens - 1]) for tokens in (256, 512, 1024))]
        lines.append([*line, f"{series['exponent']:.2f}", size])
    return markdown(["seconds after", "256 tokens", "512", "1024", "exponent", "carried at the end"], lines)


NAMES = {"loop": "PyTorch loop", "hf": "transformers", "accelerated-scan-ref": "accelerated-scan"}


def readme_speed() -> str:
    """Lay out some of each beside its fastest peer: operators, a layer, a model, and where we lose."""
    lines = []
    for name, which, shape in (
        ("wkv", "forward", (4, 1024, 768)),
        ("wkv", "forward+backward", (4, 1024, 768)),
        ("wkv", "step", (1, 1, 768)),
        ("linear_scan", "forward", (4, 4096, 256)),
        ("linear_scan", "forward+backward", (4, 4096, 256)),
        ("linear_scan", "forward", (32, 64, 128)),
        ("linear_scan", "step", (4, 1, 256)),
    ):
        label = f"{'WKV' if name == 'wkv' else 'scan, complex64'}, {PASSES[which]}, {'×'.join(map(str, shape))}"
        same = {key: op(name, which, shape)[key] for key in ("op", "pass", "dtype", "B", "T", "C")}
        peers = [one for one in results("ops")["rows"] if same.items() <= one.items() and one["status"] == "ok"]
        peer = min((one for one in peers if one["provider"] not in ("fastwkv", "reference")), key=lambda one: one["ms"])
        _, ours, theirs, ratio = against(name, which, shape, {peer["provider"]: ""})
        lines.append([label, ours, NAMES.get(peer["provider"], peer["provider"]), theirs, ratio])
    fft, ours = (layer("bfloat16", provider)["ms"] for provider in ("fft", "fastwkv"))
    lines.append(["LRU, bfloat16, 4×2048×256, training", digits(ours), "FFT", digits(fft), times(fft / ours)])
    theirs, patched = (row("hf_speed", **{"pass": "train", "provider": one}) for one in ("unpatched", "patched"))
    line = [digits(patched["ms"]), "transformers", digits(theirs["ms"]), times(patched["times_faster"])]
    lines.append(["RWKV-4 169M, 1024 tokens, training", *line])
    return markdown(["milliseconds, two CPU cores", "fastwkv", "fastest peer", "", ""], lines)


def layer(dtype: str, provider: str, which: str = "forward+backward") -> Row:
    """Return a row of lru_layer.json."""
    return row("lru_layer", **{"pass": which, "dtype": dtype, "B": 4, "provider": provider})


def accurate(name: str, inputs: str, dtype: str, tokens: int, provider: str) -> dict[str, float] | None:
    """Return the errors in a row of accuracy.json, None if there is no such row."""
    wanted = {"op": name, "inputs": inputs, "dtype": dtype, "T": tokens, "provider": provider}
    found = [one for one in results("accuracy")["rows"] if wanted.items() <= one.items()]
    return found[0]["errors"] if found else None


def readme_accuracy() -> str:
    """Lay out the error of the output and the largest of a gradient, ours and a peer's."""
    lines = []
    for what, (name, inputs, dtype, tokens), peer, label in (
        ("WKV, normal keys, float32", ("wkv", "ordinary", "float32", 1024), "fla", "fla"),
        ("WKV, keys within ±60, float32", ("wkv", "adversarial", "float32", 8192), "hf", "transformers"),
        ("the same in bfloat16", ("wkv", "adversarial", "bfloat16", 1024), "fla", "fla"),
        (
            "scan, modulus of a = 1, complex64",
            ("linear_scan", "adversarial", "complex64", 8192),
            "accelerated-scan-ref",
            "accelerated-scan",
        ),
    ):
        pair = [accurate(name, inputs, dtype, tokens, provider) or {} for provider in ("fastwkv-cpu", peer)]
        lines.append(beside(what, label, pair))
    pair = [layer("float32", provider)["errors"] for provider in ("fastwkv", "fft")]
    lines.append(beside("LRU, float32", "FFT", pair))
    return markdown(["relative error", "fastwkv", "its gradients", "peer", "", "its gradients"], lines)


def beside(what: str, peer: str, pair: list[dict[str, float]]) -> list[str]:
    """Return a line with the error of the output and the largest of a gradient, of us and of a peer."""
    ours, theirs = ([error(output), error(max(gradients))] for output, *gradients in (one.values() for one in pair))
    return [what, *ours, peer, *theirs]


def errors_of(
    name: str, inputs: str, dtype: str, tokens: int, labels: dict[str, str], columns: tuple[str, ...], short: int = 0
) -> str:
    """Lay out every error; of those that are interpreted at ``short`` tokens, if that is another number."""
    lines = []
    for provider, label in labels.items():
        found = accurate(name, inputs, dtype, tokens, provider) or accurate(name, inputs, dtype, short, provider)
        assert found
        lines.append([label, *(error(found[column]) for column in columns)])
    return markdown(["", *("state" if column in ("gstate", "gh0") else column for column in columns)], lines)


OURS = {"fastwkv-cpu": "fastwkv, CPU", "fastwkv-triton": "fastwkv, Triton (interpreted)"}
WKV_PEERS = {"hf": "Hugging Face, loop", "fla": "fla (interpreted)"}
SCAN_PEERS = {
    "loop": "PyTorch loop",
    "associative_scan": "PyTorch associative_scan",
    "accelerated-scan-ref": "accelerated-scan, reference",
}


def accuracy_tables() -> dict[str, str]:
    """Lay out the tables of docs/accuracy.md."""
    long = {"fastwkv-cpu": "fastwkv, CPU", "hf": "Hugging Face, loop"}
    hostile = ("wkv", "adversarial")
    return {
        "accuracy-wkv": errors_of("wkv", "ordinary", "float32", 1024, OURS | WKV_PEERS, WKV_ERRORS),
        "accuracy-wkv-hostile": errors_of(*hostile, "float32", 8192, long, WKV_ERRORS),
        "accuracy-wkv-bfloat16": errors_of(*hostile, "bfloat16", 1024, OURS | WKV_PEERS, WKV_ERRORS),
        "accuracy-scan": errors_of(
            "linear_scan", "adversarial", "complex64", 8192, OURS | SCAN_PEERS, SCAN_ERRORS, short=1024
        ),
        "accuracy-scan-bfloat16": errors_of(
            "linear_scan", "ordinary", "bfloat16", 1024, OURS | SCAN_PEERS, SCAN_ERRORS
        ),
    }


def lru_errors() -> str:
    """Lay out the errors of an LRU layer and of its Fourier transform."""
    names = ("y", "gu", "gnu_log", "gtheta_log", "gB_re")
    labels = {"fastwkv": "`fastwkv.nn.LRU`", "fft": "Fourier transforms"}
    rows = [[label, *(error(layer("float32", one)["errors"][name]) for name in names)] for one, label in labels.items()]
    return markdown(["", "y", "gu", "gν_log", "gθ_log", "gB"], rows)


def lru_layer() -> str:
    """Lay out time and memory of an LRU layer."""
    lines = []
    for dtype, middle in (("bfloat16", "complex64"), ("float32", "as three operators")):
        ours = layer(dtype, "fastwkv")
        for provider, label in (("fastwkv", "`fastwkv.nn.LRU`"), ("complex64", middle), ("fft", "Fourier transforms")):
            found = layer(dtype, provider)
            line = [f"{dtype}, {label}"]
            for key, unit in (("ms", 1), ("peak_bytes", 1e6)):
                ratio = "" if found is ours else times(found[key] / ours[key])
                line += [digits(found[key] / unit), ratio]
            lines.append(line)
    return markdown(["", "milliseconds", "", "peak memory, MB", ""], lines)


def huggingface() -> str:
    """Lay out Hugging Face's model with our operator and without."""
    lines = []
    for which, label in (("train", "forward and backward, 1024 tokens"), ("prefill", "prompt of 1024 tokens")):
        plain, ours, free = (
            row("hf_speed", **{"pass": which, "provider": one})
            for one in ("unpatched", "patched", "patched, free operator")
        )
        seconds = [f"{one['ms'] / 1000:.3g}" for one in (plain, ours)]
        lines.append([label, *seconds, *(f"{one['times_faster']:.2f}×" for one in (ours, free))])
    return markdown(["seconds, 169M class", "unpatched", "patched", "", "an operator at no cost"], lines)


def memory() -> str:
    """Lay out the processor time of calls by how the allocator is set."""
    lines = []
    for name in dict.fromkeys(one["call"] for one in results("page_faults")["rows"]):
        default, *others = (
            row("page_faults", call=name, setting=one) for one in ("default", "thresholds", "no mmap", "jemalloc")
        )
        ratios = [f"{one['ms'] / default['ms']:.2f}×" for one in others]
        lines.append([name, digits(default["ms"]), f"{default['faults']:.0f}", *ratios])
    return markdown(["", "milliseconds", "faults a call", "thresholds", "no mmap", "jemalloc"], lines)


def speed_tables() -> dict[str, str]:
    """Lay out the tables of docs/speed.md."""
    wkv = {"hf": "Hugging Face", "loop": "PyTorch loop"}
    fixed_scan = {"loop": "PyTorch loop", "associative_scan": "associative_scan"}
    scan = fixed_scan | {"accelerated-scan-ref": "accelerated-scan"}
    scans = ((4, 4096, 256), (1, 1024, 256), (8, 784, 128), (32, 64, 128))
    both = ("forward", "forward+backward")
    wkv_lines = [against("wkv", which, (B, 1024, 768), wkv) for which in both for B in (1, 4)]
    wkv_lines += [against("wkv", "step", (B, 1, 768), wkv) for B in (1, 4)]
    fixed = [against("linear_scan_fixed", which, (4, 4096, 256), fixed_scan) for which in both]
    steps = [against("linear_scan", "step", (B, 1, C), {"loop": ""}) for B, _, C in scans]
    return {
        "speed-wkv": markdown(head("milliseconds, float32", wkv), wkv_lines),
        "speed-scan": markdown(
            head("milliseconds, complex64", scan),
            [against("linear_scan", which, shape, scan) for which in both for shape in scans],
        ),
        "speed-scan-fixed": markdown(head("milliseconds, complex64, fixed a", fixed_scan), fixed),
        "speed-scan-step": markdown(head("milliseconds, complex64", {"loop": "product and sum"}), steps),
    }


def tables() -> dict[str, str]:
    """Return every table by name."""
    single = {
        "gen-time": gen_time,
        "readme-speed": readme_speed,
        "readme-accuracy": readme_accuracy,
        "accuracy-lru": lru_errors,
        "speed-lru": lru_layer,
        "speed-huggingface": huggingface,
        "speed-memory": memory,
    }
    return {name: make() for name, make in single.items()} | accuracy_tables() | speed_tables()


def rewritten(text: str) -> str:
    """Return a page with its tables as the committed results have them."""
    known = tables()
    return TABLE.sub(lambda found: f"{found[1]}{known[found[2]]}\n{found[3]}", text)


def main(arguments: list[str]) -> int:
    """Rewrite the tables of all pages; with --check write nothing, and fail if there is something to write."""
    old = {page: page.read_text() for page in PAGES}
    new = {page: rewritten(text) for page, text in old.items()}
    changed = [page for page in PAGES if new[page] != old[page]]
    for page in changed:
        print(f"{page.relative_to(ROOT)}: tables are not those of bench/results" if arguments else page)
        if not arguments:
            page.write_text(new[page])
    return 1 if arguments and changed else 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"usage: {sys.argv[0]} [--check]")
    sys.exit(main(sys.argv[1:]))
