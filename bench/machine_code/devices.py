"""The devices of gpu_model.py: figures that it assumes, and those that tune.py has measured in their place."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import result_file
from common.about import slug
from common.command_line import Parser

LAUNCH_SECONDS = 3e-6  # assumed of every launch
RESULTS = Path(__file__).parents[1] / "results"
# By the field of a device the name of its rows, and what tells the one that counts from others of that name.
FIELDS = {
    "multiprocessors": ("multiprocessors", {}),
    "clock": ("clock", {"beside": "wkv backward"}),
    "copy_bandwidth": ("copy_bandwidth", {}),
    "latency": ("latency", {"beside": "copies"}),
    "launch": ("launch", {"where": "stream"}),
}


@dataclass(frozen=True)
class Device:
    """A GPU. Bandwidths are what a copy reaches, clocks those that are held under load."""

    multiprocessors: int
    clock: float
    copy_bandwidth: float
    latency: float
    """Seconds until a load is answered on a busy memory."""
    launch: float = LAUNCH_SECONDS
    """Seconds that a launch costs a device whose queue is full."""


DEVICES = {
    "h200": Device(132, 1.755e9, 4.3e12, 0.8e-6),
    "h100": Device(132, 1.755e9, 3.0e12, 0.8e-6),
}


def measured(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the fields of a device that a record has: of copies the fastest, of all else what was measured last.

    Clock and latency are those under load, as kernels meet them. ValueError: the record is none of tune.py on a GPU.
    """
    settings = record.get("settings", {})
    device = record.get("device", {})
    if record.get("benchmark") != "tune" or settings.get("rehearsal") or device.get("type") != "cuda":
        raise ValueError("not a record of tune.py on a GPU")
    found = {}
    for field, (name, wanted) in FIELDS.items():
        rows = [row for row in record["rows"] if row.get("what") == "assumption" and row.get("name") == name]
        rows = [row for row in rows if row.get("value") and all(row.get(key) == value for key, value in wanted.items())]
        if rows:
            values = [row["value"] for row in rows]
            found[field] = max(values) if field == "copy_bandwidth" else values[-1]
    if "multiprocessors" in found:
        found["multiprocessors"] = int(found["multiprocessors"])
    return found


def device_of(record: Mapping[str, Any]) -> str:
    """Return which of DEVICES a record is of, by its name; a name of its own if it is of none."""
    name = slug(record["device"]["name"])
    return next((one for one in DEVICES if one in name.split("-")), name)


def devices_of(args: argparse.Namespace, parser: Parser) -> dict[str, tuple[Device, dict[str, Any]]]:
    """Return the devices that are asked for, each with what of it was measured.

    A file that --measured names adds its device, whatever its name; what it lacks is assumed as of an H100.
    """
    found: dict[str, tuple[Device, dict[str, Any]]] = {name: (DEVICES[name], {}) for name in args.devices}
    for path in [args.measured] if args.measured else sorted(RESULTS.glob("*/tune.json")):
        record = result_file.read(path, parser)
        try:
            fields = measured(record)
        except ValueError as error:
            if args.measured:
                parser.error(f"{str(path)!r}: {error}")
            continue
        name = device_of(record)
        if name in found or args.measured:
            found[name] = replace(DEVICES.get(name, DEVICES["h100"]), **fields), fields
    return found


def source_lines(measured: Mapping[str, Mapping[str, Any]], assumed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return for each device which figures of it were measured and which are assumed."""
    lines = []
    for name in assumed:
        groups = {"measured": measured[name], "assumed": assumed[name]}
        told = {kind: ", ".join(f"{key} {value:.4g}" for key, value in of.items()) for kind, of in groups.items() if of}
        lines.append(f"{name}: " + "; ".join(f"{kind} {text}" for kind, text in told.items()))
    return lines
