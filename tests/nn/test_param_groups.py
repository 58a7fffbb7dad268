"""The parameter groups of the LRU paper: each parameter in one group, the recurrence apart."""

import torch
from torch import nn

from fastwkv.nn import LRU, S4D, LRUBlock, param_groups

RECURRENT = ["nu_log", "theta_log", "gamma_log", "B_re", "B_im"]


def test_param_groups_exempt_the_recurrence() -> None:
    model = nn.Sequential(nn.Linear(3, 4), LRUBlock(4, 5), LRU(4, 5, bidirectional=True), nn.Linear(4, 2))
    recurrent, others = param_groups(model, 1e-2, factor=0.5, weight_decay=0.1)
    assert (recurrent["lr"], recurrent["weight_decay"]) == (0.5e-2, 0.0)
    assert (others["lr"], others["weight_decay"]) == (1e-2, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt = [names.pop(id(parameter)) for parameter in recurrent["params"]]
    assert exempt == [f"{layer}.{name}" for layer in ("1.lru", "2") for name in RECURRENT]
    assert sorted(map(id, others["params"])) == sorted(names)
    torch.optim.AdamW(param_groups(model, 1e-2)).step()


def test_param_groups_exempt_the_recurrence_of_s4d() -> None:
    layer = S4D(3, 4)
    recurrent, others = param_groups(layer, 1e-2)
    assert [id(p) for p in recurrent["params"]] == [
        id(layer.get_parameter(name)) for name in ("log_dt", "log_A_real", "A_imag", "B_re", "B_im")
    ]
    assert {id(p) for p in others["params"]} == {id(layer.C_re), id(layer.C_im), id(layer.D)}


def test_param_groups_hold_a_tied_parameter_once_and_no_frozen_one() -> None:
    model = nn.ModuleList([LRU(4, 5), LRU(4, 5), nn.Linear(4, 5, bias=False)])
    model[1].nu_log = model[0].nu_log
    model[2].weight = model[0].B_re
    model[0].theta_log.requires_grad_(False)
    model[1].D.requires_grad_(False)
    recurrent, others = param_groups(model, 1e-2)
    assert len({id(p) for p in recurrent["params"]}) == len(recurrent["params"]) == 2 * len(RECURRENT) - 2
    assert len(others["params"]) == 5  # C of both, and one D
    assert any(p is model[2].weight for p in recurrent["params"])
    torch.optim.AdamW(param_groups(nn.Linear(2, 2), 1e-2))  # without a recurrence, too


def test_recurrent_parameters_train_at_a_lower_rate() -> None:
    torch.manual_seed(0)
    lru = LRU(4, 8)
    before = {name: parameter.detach().clone() for name, parameter in lru.named_parameters()}
    optimizer = torch.optim.SGD(param_groups(lru, 1.0, factor=0.25, weight_decay=0.0))
    for parameter in lru.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in lru.named_parameters():
        moved = 0.25 if name in RECURRENT else 1.0
        torch.testing.assert_close(before[name] - parameter.detach(), torch.full_like(parameter, moved))
