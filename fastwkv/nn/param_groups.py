"""Parameter groups for an optimiser: a learning rate for each parameter, and weight decay or none."""

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


def param_groups(
    model: nn.Module, lr: float | Tensor, factor: float = 0.25, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Divide the parameters of a model into groups for AdamW by the role of each, wherever it is in the model.

    | parameters                                                         | learning rate   | weight decay     |
    |--------------------------------------------------------------------|-----------------|------------------|
    | ν, θ, γ, B of :class:`LRU`; Δ, A, B of :class:`S4D`                | ``lr * factor`` | none             |
    | time_decay of :class:`RWKV4`                                       | ``lr * 2``      | none             |
    | time_first of :class:`RWKV4`                                       | ``lr * 3``      | none             |
    | others of fewer than two dimensions: biases, norms, D, Λ, mixes    | ``lr``          | none             |
    | all others                                                         | ``lr``          | ``weight_decay`` |

    Use it as ``torch.optim.AdamW(param_groups(model, 1e-3))``. RWKV-4 was trained with ``weight_decay=0``. PyTorch's
    schedules multiply rates; a schedule that sets them sets each to ``group["lr_scale"]`` times the one for ``lr``.

    Args:
        model: any module: a layer, a model that holds layers, a compiled or wrapped one. A module of another package
            may name its slow parameters, of any shape, in a tuple ``recurrent_parameters``, and multiples of the
            learning rate in a dictionary ``lr_scales``; neither gets weight decay.
        lr: the learning rate.
        factor: the ratio of the learning rate of the recurrent parameters to ``lr``.
        weight_decay: the weight decay of the parameters that have any.

    Returns:
        The groups, those of recurrences first and the one with weight decay last; none is empty, and no two have the
        same rate and decay. Each parameter is in one of them, once however often it is used, and as part of a
        recurrence if it is one anywhere; a frozen one (``requires_grad=False``) is in none. A group holds "params",
        "lr", "weight_decay" and "lr_scale", the multiple of ``lr``.

    Raises:
        TypeError: ``model`` is not a module, or a rate not a number (``lr`` may be a tensor of one number).
        ValueError: a rate is negative or not finite.

    Source: for LRU and S4D arXiv 2303.06349, its appendix on the experiments, which exempts the recurrence alone from
    weight decay; for RWKV-4 the code that trained the published models.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    lr, factor = _checked_lr(lr), _checked("factor", factor)
    weight_decay = _checked("weight_decay", weight_decay)
    recurrent: dict[nn.Parameter, float] = {}
    for module in model.modules():
        for name, scale in _scales(module, factor).items():
            for parameter in _parameters(module, name):
                recurrent.setdefault(parameter, scale)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in {**recurrent, **dict.fromkeys(model.parameters())}:
        if parameter.requires_grad:
            decays = parameter not in recurrent and parameter.dim() >= 2
            key = recurrent.get(parameter, 1.0), weight_decay if decays else 0.0
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": lr * scale, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in sorted(groups.items(), key=lambda group: group[0][1] > 0)
    ]


def _checked(name: str, rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"{name} must be a number, got {type(rate).__name__}")
    if not 0 <= float(rate) < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {rate}")
    return float(rate)


def _checked_lr(lr: Any) -> Any:
    """Return the learning rate. A tensor stays one, which optimisers need that are captured or compiled."""
    if isinstance(lr, Tensor) and lr.dim() == 0 and lr.is_floating_point():
        _checked("lr", lr.item())
        return lr
    return _checked("lr", lr)


def _scales(module: nn.Module, factor: float) -> dict[str, float]:
    """Return the parameters that a module names as special, each with its multiple of the learning rate."""
    slow, scales = getattr(module, "recurrent_parameters", ()), getattr(module, "lr_scales", {})
    # A module of another package may use these names for something else.
    found = dict.fromkeys(slow, factor) if isinstance(slow, (tuple, list, set, frozenset)) else {}
    if isinstance(scales, Mapping):
        found |= {name: _checked(f"lr_scales[{name!r}]", scale) for name, scale in scales.items()}
    return found


def _parameters(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """Return the parameter of this name, or those that a parametrisation computes it from."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        yield parameter
    elif parametrize.is_parametrized(module, name):
        # The type checker does not know the attribute that PyTorch adds to the module.
        yield from module.parametrizations[name].parameters()  # type: ignore[index, union-attr]
