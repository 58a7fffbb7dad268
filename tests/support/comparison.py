"""Results of one implementation against those of another."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Results:
    """Outputs and gradients of one call: y, final states, gradients of the inputs."""

    y: Tensor
    state: dict[str, Tensor]
    gradients: dict[str, Tensor]


def relative_error(result: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """Return ‖result - reference‖ / (‖reference‖ + floor √n), NaN if the result has one."""
    wide = torch.complex128 if reference.is_complex() else torch.float64
    result, reference = result.detach().to("cpu", wide), reference.detach().to("cpu", wide)
    size = reference.norm().item() + floor * reference.numel() ** 0.5
    error = (result - reference).norm().item()
    return error / size if size else error


def assert_close(
    results: Results, reference: Results, bounds: tuple[float, float], floor: float = 0.0, **special: float
) -> None:
    """Compare every output and every gradient with ``bounds``; ``special`` bounds a gradient by name.

    Of a few elements one may be the small difference of large terms. Values and cotangents are drawn of size 1, so
    with ``floor=1`` small samples are measured on the scale of the terms.
    """
    wanted = {"y": reference.y, **reference.state, **reference.gradients}
    actual = {"y": results.y, **results.state, **results.gradients}
    allowed = {name: special.get(name, bounds[name in reference.gradients]) for name in wanted}
    errors = {name: relative_error(actual[name], wanted[name], floor) for name in wanted}
    wrong = {n: f"{errors[n]:.1e} > {allowed[n]:.1e}" for n in wanted if not errors[n] <= allowed[n]}  # NaN is wrong
    assert not wrong, f"relative errors {wrong} among {errors}"
