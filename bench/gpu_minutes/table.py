"""What a person reads at the end: everything that matters of the rows, below 10 kB."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from launch_shapes import table as tuning

Row = dict[str, Any]

LARGEST = 9500  # bytes
WIDE = 118  # characters of a line


def of_rows(rows: Sequence[Row]) -> str:
    """Return the table of rows that were read from a file."""
    begun = next((row for row in rows if row.get("what") == "begun"), {})
    spent = max((row.get("at", 0.0) for row in rows), default=0.0)
    return text(rows, begun.get("command", "?"), begun.get("budget", 0.0), spent)


def text(rows: Sequence[Row], name: str, budget: float, spent: float) -> str:
    """Return the table: what failed comes first, since what is too long is cut off at its end."""
    begun = next((row for row in rows if row.get("what") == "begun"), {})
    head = f"gpu.py {name}: {spent:.0f} s of {budget:.0f}, commit {str(begun.get('commit'))[:12]}"
    head += f", code {begun.get('code')}"
    if begun.get("rehearsal"):
        head += "\nA REHEARSAL: kernels interpreted on a CPU, shapes tiny, times and bandwidths mean nothing"
    if any(row.get("what") == "interrupted" for row in rows):
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


def machine(rows: Sequence[Row]) -> Iterable[str]:
    """Say which device and software, and whether the cache of kernels fits."""
    for row in _of(rows, "device"):
        for device in row.get("devices", []):
            yield (
                f"{device.get('name')}, driver {device.get('driver_version')}, {device.get('memory.total')}, SM clock "
                + (f"{device.get('clocks.sm')} of {device.get('clocks.max.sm')}, {device.get('power.limit')}")
            )
    for row in _of(rows, "software"):
        versions = ", ".join(f"{name} {version or 'MISSING'}" for name, version in row["versions"].items())
        yield from _wrapped(versions)
        if missing := [name for name, place in row["tools"].items() if place is None]:
            yield f"not there: {', '.join(missing)}"
    for row in _of(rows, "cache"):
        said = row.get("error") or row.get("reason") or "it fits"
        yield from _wrapped(f"cache: {row['kernels']} kernels compiled beforehand; {said}")


def steps(rows: Sequence[Row]) -> Iterable[str]:
    """Say which steps ran, for how long, and which did not."""
    ran = [f"{row['step']} {row['seconds']:.0f} s" for row in _of(rows, "step")]
    if ran:
        yield from _wrapped("ran: " + ", ".join(ran))
    for row in _of(rows, "skipped"):
        yield f"skipped: {row['step']}, {row['reason']}"
    for row in _of(rows, "command"):
        if row["status"] == "not available":
            yield f"not available: {row['name']}, {row.get('said', '')}"
    for row in _of(rows, "left out"):
        yield f"left out of {row['step']}: {row.get('cases', 'some')} cases, {row.get('reason', '')}"


def failures(rows: Sequence[Row], most: int = 30) -> Iterable[str]:
    """Return the failures, of every group a few, those of commands last."""
    bad = [row for row in rows if "error" in row]
    if not bad:
        yield "NOTHING FAILED"
        return
    yield f"FAILED: {len(bad)} rows"
    shown: dict[str, int] = {}
    order = sorted(bad, key=lambda row: row["what"] == "command")
    lines = []
    for row in order:
        group = f"{row['step']} {row.get('group', '')}".strip()
        shown[group] = shown.get(group, 0) + 1
        if shown[group] <= 4:
            lines.append(f"  {group} {_subject(row)}: {row['error']}{_said(row)}")
    yield from lines[:most]
    more = len(bad) - min(len(lines), most)
    if more > 0:
        yield f"  ... and {more} more"


def _subject(row: Row) -> str:
    if row["what"] == "bandwidth":
        return f"{row['op']} {row['dtype']} {row['shape']} {row['pass']}"
    keys = ("case", "name", "provider", "op", "pass", "dtype")
    return " ".join(str(row[key]) for key in keys if key in row) or str(row["what"])


def _said(row: Row) -> str:
    return f" ({row['said'][:70]})" if row.get("said") else ""


def correctness(rows: Sequence[Row]) -> Iterable[str]:
    """Return how many cases of each group passed, and the error that comes nearest to its bound."""
    cases = _of(rows, "case")
    groups = list(dict.fromkeys(row["group"] for row in cases))
    ended = {row["name"]: row["status"] for row in _of(rows, "command", "correctness")}
    if not groups:
        return
    yield "correctness      passed   nearest to its bound"
    for group in groups:
        mine = [row for row in cases if row["group"] == group]
        passed = [row for row in mine if "error" not in row]
        line = f"{group:<16} {len(passed):>3}/{len(mine):<3}"
        if near := max(passed, key=_nearness, default=None):
            line += f"  {near.get('worst')} {near['relative_error']:.1e} of {near['bound']:.0e}, {near['case']}"
        status = ended.get(group, "did not end")
        yield line + ("" if status in ("passed", "failed") else f"  {status.upper()}")
    for group in sorted(set(ended) - set(groups) - {row.get("group") for row in _of(rows, "memcheck")}):
        yield f"{group:<16} no case, {ended[group].upper()}"
    for row in _of(rows, "memcheck"):
        yield f"memcheck {row['group']}: {row.get('error') or row.get('reason') or str(row.get('errors')) + ' errors'}"


def _nearness(row: Row) -> float:
    return row["relative_error"] / row["bound"] if row["bound"] else 0.0


def bandwidth(rows: Sequence[Row]) -> Iterable[str]:
    """Return fractions of the copy bandwidth, a line a shape."""
    found = [row for row in _of(rows, "bandwidth") if "fraction" in row]
    if not found:
        return
    copies = [row["gbps"] for row in _of(rows, "copy", "headline")]
    clock = [row["mhz"] for row in found if "mhz" in row]
    about = f"copy {copies[0]:.0f} GB/s" if copies else "no copy bandwidth"
    about += f", clock {min(clock):.0f} to {max(clock):.0f} MHz" if clock else ""
    yield f"fraction of copy bandwidth, forward / backward ({about}; * the host was not ahead)"
    kinds = list(dict.fromkeys((row["op"], row["dtype"]) for row in found))
    yield f"{'':<20}" + "".join(f"{f'{op} {dtype}':>18}" for op, dtype in kinds)
    shapes = list(dict.fromkeys((tuple(row["shape"]), row["packed"]) for row in found))
    for shape, packed in shapes:
        cells = []
        for op, dtype in kinds:
            mine = {
                row["pass"]: row
                for row in found
                if (tuple(row["shape"]), row["packed"], row["op"], row["dtype"]) == (shape, packed, op, dtype)
            }
            both = [_fraction(mine.get(which)) for which in ("forward", "backward")]
            cells.append(" / ".join(both) if mine else "-")
        name = "x".join(map(str, shape)) + "p" * packed
        yield f"{name:<20}" + "".join(f"{cell:>18}" for cell in cells)


def _fraction(row: Row | None) -> str:
    return "-" if row is None else f"{row['fraction']:.2f}" + ("" if row.get("head_start") else "*")


def generation(rows: Sequence[Row]) -> Iterable[str]:
    """Return the time of a token, and the kernels that it goes into."""
    for row in _of(rows, "token"):
        if "ms" in row:
            how = "graph" if row["graph"] else "no graph"
            times = f"{row['ms']:.3f} ms a token (least {row['ms_min']:.3f}), {row['ms_together']:.3f} unwatched"
            yield f"generation, {how}: {times}, weights at {row['weight_gbps']:.0f} GB/s"
    for row in _of(rows, "trace"):
        if "us" in row:
            yield f"  a token is {row['kernels']:.0f} kernels of {row['us']:.0f} us together:"
    for row in _of(rows, "kernel")[:12]:
        yield f"  {row['us']:9.1f} us {row['count']:6.1f} x {row['name'][:80]}"
    for row in _of(rows, "series"):
        keys = ("name", "protocol", "status", "graph", "tokens", "exponent", "ms")
        yield "gen_time: " + ", ".join(f"{key} {row[key]}" for key in keys if key in row)


def peers(rows: Sequence[Row]) -> Iterable[str]:
    """Return the times of all that compute one case, in one line."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in _of(rows, "peer"):
        cases.setdefault(tuple(row[key] for key in ("op", "pass", "dtype", "B", "T", "C")), []).append(row)
    if cases:
        yield "ms (fraction of copy bandwidth), ours beside its peers"
    for (op, which, dtype, *shape), mine in cases.items():
        times = [f"{r['provider']} {r['ms']:.3f} ({r['fraction']:.2f})" for r in mine if "ms" in r]
        yield f"  {op} {which} {dtype} {'x'.join(map(str, shape))}: {', '.join(times) or 'none'}"
    why = {(row["provider"], row["reason"]) for row in _of(rows, "peer") if "reason" in row}
    yield from (f"  {provider}: {reason}" for provider, reason in sorted(why)[:8])


def profile(rows: Sequence[Row]) -> Iterable[str]:
    """Return what ncu counted, three lines a kernel."""
    for row in _of(rows, "profile"):
        told = [f"{name} {_value(value)}" for name, value in row.items() if isinstance(value, list)]
        if told:
            yield f"ncu {row['kernel'][:60]}"
            yield from (f"  {line}" for line in _wrapped(", ".join(told), 5))


def _value(value: Sequence[Any]) -> str:
    number, unit = value
    return f"{number:.4g} {unit}".strip() if isinstance(number, float) else f"{number} {unit}".strip()


def tests(rows: Sequence[Row]) -> Iterable[str]:
    """Return how many tests ended in which way."""
    counts: dict[str, int] = {}
    for row in _of(rows, "test"):
        if "outcome" in row:
            counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    if counts:
        yield "tests: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def _wrapped(line: str, most: int = 4, split: Callable[[str], list[str]] = lambda text: text.split(", ")) -> list[str]:
    lines = [""]
    for piece in split(line):
        if len(lines[-1]) + len(piece) + 2 > WIDE - 2 and lines[-1]:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + piece
    return lines[:most]
