"""What learning_curve.py reports of its trainings."""

import math
from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
from common import result_file
from learning_curve_evaluation import carried_bits, windowed_bits
from learning_curve_models import NAMES
from learning_curve_training import Training

EVERY = 16  # steps to one point of a curve
BEHIND = 0.03  # how far above the transformer RWKV-4 may end


def row(training: Training, held_out: tuple[bytes, ...], place: torch.device) -> dict[str, Any]:
    """Return what a training came to."""
    one, model = training.settings, training.model
    whole = carried_bits(model, held_out, place) if one.model == "rwkv4" else None
    return {
        "model": one.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": asdict(one.recipe),
        "options": [name for name, chosen in asdict(one.options).items() if chosen],
        "bytes": one.steps * one.batch * one.length,
        "bits": windowed_bits(model, held_out, one.length, place),
        "carried_bits": whole,
        "steps_per_second": training.steps_per_second,
        "seconds": sum(training.seconds),
        "curve": curve(training.losses),  # bits a byte
    }


def curve(losses: list[float]) -> list[float]:
    """Return the means of ``EVERY`` losses each, in bits, the last one of what is left."""
    parts = [losses[start : start + EVERY] for start in range(0, len(losses), EVERY)]
    return [mean(part) / math.log(2) for part in parts]


def missed(record: dict[str, Any]) -> list[str]:
    """Return what RWKV-4 should have reached and has not."""
    bits = {row["model"]: row["bits"] for row in record["rows"]}
    lines = []
    if "rwkv4" in bits:
        own = f"RWKV-4 needs {bits['rwkv4']:.3f} bits a byte"
        name, trigram = min(record["yardsticks"].items(), key=lambda one: one[1] if "trigram" in one[0] else math.inf)
        if not bits["rwkv4"] < trigram:
            lines.append(f"{own}, not fewer than the {name} with {trigram:.3f}")
        if "transformer" in bits and not bits["rwkv4"] <= (1 + BEHIND) * bits["transformer"]:
            more = 100 * (bits["rwkv4"] / bits["transformer"] - 1)
            lines.append(f"{own}, {more:.1f} % more than the transformer with {bits['transformer']:.3f}")
    return lines


def table(record: dict[str, Any]) -> str:
    """Return the summary that the program prints."""
    head = ["predictor", "bits a byte", "bytes learned from", "parameters", "steps/s"]
    rows = []
    for one in record["rows"]:
        figures = [f"{one['bytes']:,}", f"{one['parameters']:,}", f"{one['steps_per_second']:.2f}"]
        title = ", ".join([NAMES[one["model"]], *one["options"]]).replace("_", " ")
        rows.append([title, f"{one['bits']:.3f}", *figures])
        if one["carried_bits"] is not None:
            rows.append([f"{title}, state carried", f"{one['carried_bits']:.3f}", *figures])
    rows += [[name, f"{bits:.3f}", "", "", ""] for name, bits in record["yardsticks"].items()]
    return result_file.markdown(head, rows)
