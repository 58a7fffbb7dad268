"""The text that a person reads at the end: everything that matters of the rows, below 10 kB."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from launch_shapes import table as tuning

Row = dict[str, Any]

LARGEST = 9500  # bytes
WIDE = 118  # characters of a line


def of_rows(rows: Sequence[Row]) -> str:
    """Return the table of rows that were read from a file."""
    begun = next(iter(_of(rows, "begun")), {})
    spent = max((row.get("at", 0.0) for row in rows), default=0.0)
    return text(rows, begun.get("command", "?"), begun.get("budget", 0.0), spent)


def text(rows: Sequence[Row], name: str, budget: float, spent: float) -> str:
    """Return the table: what failed comes first, since what is too long is cut off at its end."""
    begun = next(iter(_of(rows, "begun")), {})
    head = f"gpu.py {name}: {spent:.0f} s of {budget:.0f}, commit {str(begun.get('commit'))[:12]}"
    head += f", code {begun.get('code')}"
    if begun.get("rehearsal"):
        head += "\nA REHEARSAL: kernels interpreted on a CPU, shapes tiny, times and bandwidths mean nothing"
    if _of(rows, "interrupted"):
        head += "\nINTERRUPTED: what was measured until then"
    found = [head]
    for part in (machine, steps, failures, correctness, bandwidth, tuning.lines, generation, peers, profile, tests):
        if lines := list(part(rows)):
            found.append("\n".join(line[:WIDE].rstrip() for line in lines))
    whole = "\n\n".join(found) + "\n"
    if len(whole.encode()) <= LARGEST:
        return whole
    cut = whole.encode()[:LARGEST].decode(errors="ignore").rpartition("\n")[0]
    return f"{cut}\n... the rest is in rows.jsonl\n"


def _of(rows: Sequence[Row], what: str, step: str | None = None) -> list[Row]:
    return [row for row in rows if row.get("what") == what and (step is None or row["step"] == step)]


def _grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        values = (tuple(row[key]) if isinstance(row[key], list) else row[key] for key in keys)
        found.setdefault(tuple(values), []).append(row)
    return found


def _wrapped(line: str, most: int = 4) -> list[str]:
    return textwrap.wrap(line, WIDE - 2, break_long_words=False, break_on_hyphens=False)[:most]


def machine(rows: Sequence[Row]) -> Iterable[str]:
    """Say which device and software, and whether the cache of kernels fits."""
    for device in (one for row in _of(rows, "device") for one in row.get("devices", [])):
        about = f"{device.get('name')}, driver {device.get('driver_version')}, {device.get('memory.total')}, SM clock "
        yield about + f"{device.get('clocks.sm')} of {device.get('clocks.max.sm')}, {device.get('power.limit')}"
    for row in _of(rows, "software"):
        yield from _wrapped(", ".join(f"{name} {version or 'MISSING'}" for name, version in row["versions"].items()))
        if missing := [name for name, place in row["tools"].items() if place is None]:
            yield f"not there: {', '.join(missing)}"
    for row in _of(rows, "cache"):
        said = row.get("error") or row.get("reason") or "it fits"
        yield from _wrapped(f"cache: {row['kernels']} kernels compiled beforehand; {said}")


def steps(rows: Sequence[Row]) -> Iterable[str]:
    """Say which steps ran, for how long, and which did not."""
    if ran := _of(rows, "step"):
        yield from _wrapped("ran: " + ", ".join(f"{row['step']} {row['seconds']:.0f} s" for row in ran))
    for row in _of(rows, "skipped"):
        yield f"skipped: {row['step']}, {row['reason']}"
    for row in _of(rows, "command"):
        if row["status"] == "not available":
            yield f"not available: {row['name']}, {row.get('said', '')}"
    for row in _of(rows, "left out"):
        yield f"left out of {row['step']}: {row.get('cases', 'some')} cases, {row.get('reason', '')}"


def failures(rows: Sequence[Row], most: int = 30, each: int = 4) -> Iterable[str]:
    """Return the failures, of every group a few, those of commands last."""
    bad = sorted((row for row in rows if "error" in row), key=lambda row: row["what"] == "command")
    yield f"FAILED: {len(bad)} rows" if bad else "NOTHING FAILED"
    shown: Counter[str] = Counter()
    lines = []
    for row in bad:
        group = f"{row['step']} {row.get('group', '')}".strip()
        shown[group] += 1
        if shown[group] <= each:
            said = f" ({row['said'][:70]})" if row.get("said") else ""
            lines.append(f"  {group} {_subject(row)}: {row['error']}{said}")
    yield from lines[:most]
    if more := len(bad) - len(lines[:most]):
        yield f"  ... and {more} more"


def _subject(row: Row) -> str:
    if row["what"] == "bandwidth":
        return f"{row['op']} {row['dtype']} {row['shape']} {row['pass']}"
    keys = ("case", "name", "provider", "op", "pass", "dtype")
    return " ".join(str(row[key]) for key in keys if key in row) or str(row["what"])


def correctness(rows: Sequence[Row]) -> Iterable[str]:
    """Return how many cases of each group passed, and the error that comes nearest to its bound."""
    groups = _grouped(_of(rows, "case"), "group")
    ended = {row["name"]: row["status"] for row in _of(rows, "command", "correctness")}
    checked = {row.get("group") for row in _of(rows, "memcheck")}
    if not groups:
        return
    yield "correctness      passed   nearest to its bound"
    for (group,), mine in groups.items():
        passed = [row for row in mine if "error" not in row]
        line = f"{group:<16} {len(passed):>3}/{len(mine):<3}"
        if near := max(passed, key=lambda row: row["relative_error"] / (row["bound"] or 1.0), default=None):
            line += f"  {near.get('worst')} {near['relative_error']:.1e} of {near['bound']:.0e}, {near['case']}"
        status = ended.pop(group, "did not end")
        yield line + ("" if status in ("passed", "failed") else f"  {status.upper()}")
    for group in sorted(set(ended) - checked):
        yield f"{group:<16} no case, {ended[group].upper()}"
    for row in _of(rows, "memcheck"):
        yield f"memcheck {row['group']}: {row.get('error') or row.get('reason') or str(row.get('errors')) + ' errors'}"


def bandwidth(rows: Sequence[Row]) -> Iterable[str]:
    """Return fractions of the copy bandwidth, a line a shape."""
    found = [row for row in _of(rows, "bandwidth") if "fraction" in row]
    if not found:
        return
    copies = [f"copy {row['gbps']:.0f} GB/s" for row in _of(rows, "copy", "headline")] or ["no copy bandwidth"]
    clock = [row["mhz"] for row in found if "mhz" in row]
    about = copies[0] + (f", clock {min(clock):.0f} to {max(clock):.0f} MHz" if clock else "")
    yield f"fraction of copy bandwidth, forward / backward ({about}; * the host was not ahead)"
    kinds = _grouped(found, "op", "dtype")
    yield f"{'':<20}" + "".join(f"{' '.join(kind):>18}" for kind in kinds)
    for (shape, packed), of_shape in _grouped(found, "shape", "packed").items():
        cells = []
        for kind in kinds:
            mine = {row["pass"]: row for row in _grouped(of_shape, "op", "dtype").get(kind, ())}
            both = [_fraction(mine.get(which)) for which in ("forward", "backward")]
            cells.append(" / ".join(both) if mine else "-")
        yield f"{'x'.join(map(str, shape)) + 'p' * packed:<20}" + "".join(f"{cell:>18}" for cell in cells)


def _fraction(row: Row | None) -> str:
    return "-" if row is None else f"{row['fraction']:.2f}" + ("" if row.get("head_start") else "*")


def generation(rows: Sequence[Row]) -> Iterable[str]:
    """Return the time of a token, and the kernels that it goes into."""
    for row in (row for row in _of(rows, "token") if "ms" in row):
        times = f"{row['ms']:.3f} ms a token (least {row['ms_min']:.3f}), {row['ms_together']:.3f} unwatched"
        how = "graph" if row["graph"] else "no graph"
        yield f"generation, {how}: {times}, weights at {row['weight_gbps']:.0f} GB/s"
    for row in (row for row in _of(rows, "trace") if "us" in row):
        yield f"  a token is {row['kernels']:.0f} kernels of {row['us']:.0f} us together:"
    for row in _of(rows, "kernel")[:12]:
        yield f"  {row['us']:9.1f} us {row['count']:6.1f} x {row['name'][:80]}"
    for row in _of(rows, "series"):
        keys = ("name", "protocol", "status", "graph", "tokens", "exponent", "ms")
        yield "gen_time: " + ", ".join(f"{key} {row[key]}" for key in keys if key in row)


def peers(rows: Sequence[Row]) -> Iterable[str]:
    """Return the times of all that compute one case, in one line."""
    cases = _grouped(_of(rows, "peer"), "op", "pass", "dtype", "B", "T", "C")
    if cases:
        yield "ms (fraction of copy bandwidth), ours beside its peers"
    for (op, which, dtype, *shape), mine in cases.items():
        times = [f"{r['provider']} {r['ms']:.3f} ({r['fraction']:.2f})" for r in mine if "ms" in r]
        yield f"  {op} {which} {dtype} {'x'.join(map(str, shape))}: {', '.join(times) or 'none'}"
    why = {(row["provider"], row["reason"]) for row in _of(rows, "peer") if "reason" in row}
    yield from (f"  {provider}: {reason}" for provider, reason in sorted(why)[:8])


def profile(rows: Sequence[Row]) -> Iterable[str]:
    """Return what ncu counted, a few lines a kernel."""
    for row in _of(rows, "profile"):
        values = {name: value for name, value in row.items() if isinstance(value, list)}
        told = [
            f"{name} {number:.4g} {unit}" if isinstance(number, float) else f"{name} {number} {unit}"
            for name, (number, unit) in values.items()
        ]
        if told:
            yield f"ncu {row['kernel'][:60]}"
            yield from (f"  {line}" for line in _wrapped(", ".join(map(str.strip, told)), 5))


def tests(rows: Sequence[Row]) -> Iterable[str]:
    """Return how many tests ended in which way."""
    counts = Counter(row["outcome"] for row in _of(rows, "test") if "outcome" in row)
    if counts:
        yield "tests: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
