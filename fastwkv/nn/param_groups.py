"""How the parameters of linear recurrences are trained."""

from typing import Any

from torch import nn


def param_groups(model: nn.Module, lr: float, factor: float = 0.25, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Divide the parameters of a model for AdamW as the LRU paper does.

    ν, θ, γ and B of every :class:`LRU`, wherever it is in the model, get the rate ``lr * factor`` and no weight decay,
    and so do Δ, A and B of every :class:`S4D`, whose paper has the same rule. Everything else gets ``lr`` and
    ``weight_decay``: biases, the parameters of norms and D too, since the paper exempts nothing but the recurrence.
    Use it as ``torch.optim.AdamW(param_groups(model, 1e-3))``.

    Args:
        model: any module.
        lr: the learning rate.
        factor: of the recurrent parameters' rate to ``lr``.
        weight_decay: of the other parameters.

    Returns:
        The two groups, the recurrent one first. Each parameter is in one of them, once however often it is used;
        a frozen one (``requires_grad=False``) is in none.

    Source: arXiv 2303.06349, its appendix on the experiments.

    """
    recurrent = {
        getattr(module, name): None
        for module in model.modules()
        for name in getattr(module, "recurrent_parameters", ())
        if name in module._parameters
    }
    others = (parameter for parameter in model.parameters() if parameter not in recurrent)
    groups: list[dict[str, Any]] = [
        {"params": list(recurrent), "lr": lr * factor, "weight_decay": 0.0},
        {"params": list(others), "lr": lr, "weight_decay": weight_decay},
    ]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return groups
