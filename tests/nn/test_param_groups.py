"""Each parameter is in one group, with the rate and the weight decay that fit what it is."""

import copy
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from fastwkv.nn import LRU, RGLRU, RWKV4, S4D, LRUBlock, MinGRU, RWKV4Config, param_groups

SLOW = {"lru": {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"}}
SLOW["s4d"] = {"log_dt", "log_A_real", "A_imag", "B_re", "B_im"}
LAYERS = {
    "lru": lambda: LRU(4, 5),
    "both": lambda: LRU(4, 5, bidirectional=True),
    "block": lambda: LRUBlock(4, 5, norm="layer"),
    "s4d": lambda: S4D(4, 6),
    "rglru": lambda: RGLRU(4, heads=2),
    "mingru": lambda: MinGRU(4, 5),
    "rwkv4": lambda: RWKV4(RWKV4Config(layers=2, width=4, vocab_size=7)),
    "linear": lambda: nn.Linear(4, 4),
    "convolution": lambda: nn.Conv1d(4, 4, 3),
    "embedding": lambda: nn.Embedding(7, 4),
}


def expected(name: str, parameter: nn.Parameter) -> tuple[float, bool]:
    """The multiple of the rate, and whether there is weight decay, by the parameter's name in the model."""
    layer, _, rest = name.partition(".")
    last = rest.rpartition(".")[2]
    kind = layer.rpartition("_")[0]
    if last in SLOW.get("lru" if kind in ("both", "block") else kind, ()):
        return 0.25, False
    if kind == "rwkv4" and last in ("time_decay", "time_first"):
        return (2.0 if last == "time_decay" else 3.0), False
    return 1.0, parameter.dim() >= 2


def model_of(layers: Iterable[str]) -> nn.ModuleDict:
    return nn.ModuleDict({f"{name}_{index}": LAYERS[name]() for index, name in enumerate(layers)})


def found(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, bool]]:
    """The multiple of the rate 0.5 and whether the decay is 0.1, by name; each parameter is in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = {}
    for group in groups:
        assert group["params"]
        assert group["lr"] == 0.5 * group["lr_scale"]
        assert group["weight_decay"] in (0.0, 0.1)
        for parameter in group["params"]:
            result[names.pop(id(parameter))] = group["lr_scale"], group["weight_decay"] == 0.1
    return result


@given(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=4), st.data())
def test_every_parameter_is_treated_as_what_it_is(layers: list[str], data: st.DataObject) -> None:
    model = model_of(layers)
    wanted = {name: expected(name, parameter) for name, parameter in model.named_parameters()}
    frozen = data.draw(st.sets(st.sampled_from(sorted(wanted))))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    groups = param_groups(model, 0.5, weight_decay=0.1)
    assert found(model, groups) == {name: group for name, group in wanted.items() if name not in frozen}
    kinds = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert len(set(kinds)) == len(kinds)
    assert [decay for _, decay in kinds] == sorted(decay for _, decay in kinds)  # what decays comes last
    if groups:
        torch.optim.AdamW(groups).step()


def test_groups_of_one_rate_and_no_decay_are_one() -> None:
    model = model_of(["rwkv4", "lru"])
    groups = param_groups(model, 1e-3, factor=1, weight_decay=0)
    assert sorted(group["lr_scale"] for group in groups) == [1, 2, 3]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["lr"] for group in groups} == {1e-3, 2e-3, 3e-3}


def test_each_is_trained_at_its_rate_and_decayed_or_not() -> None:
    model = model_of(["rwkv4", "block", "s4d"])
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(param_groups(model, 0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        scale, decays = expected(name, parameter)
        torch.testing.assert_close(parameter.detach(), old.detach() - 0.5 * scale * (1 + 0.1 * decays * old.detach()))


class Wrapper(nn.Module):
    """What data parallelism does: the model is a child of another name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, nn.Sequential, torch.compile, nn.DataParallel])
def test_wrapped_model_is_divided_as_it_is_alone(wrap) -> None:
    model = model_of(["rwkv4", "block"])
    groups = param_groups(wrap(model), 0.5, weight_decay=0.1)
    assert found(model, groups) == {name: expected(name, p) for name, p in model.named_parameters()}


def test_compiled_parts_are_divided_as_they_are_alone() -> None:
    model = model_of(["rwkv4", "lru"])
    wanted = [list(map(id, group["params"])) for group in param_groups(model, 0.5)]
    model["lru_1"] = torch.compile(model["lru_1"])
    assert [list(map(id, group["params"])) for group in param_groups(model, 0.5)] == wanted


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


def test_parametrized_recurrence_is_one() -> None:
    lru = LRU(4, 5)
    parametrize.register_parametrization(lru, "B_re", Exponential())
    recurrent, *_ = param_groups(lru, 0.5)
    assert any(p is lru.parametrizations.B_re.original for p in recurrent["params"])
    assert len(recurrent["params"]) == 5


def test_module_of_somebody_else_names_its_own() -> None:
    class Own(nn.Module):
        recurrent_parameters = ("pairs", "absent")
        lr_scales = {"fast": 4.0}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.pairs, self.fast, self.rest = (nn.Parameter(torch.ones(3, 2)) for _ in range(3))
            self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.gain = nn.Parameter(torch.ones(()))

    class Other(nn.Linear):
        def recurrent_parameters(self) -> None: ...

        lr_scales = 3

    model = nn.ModuleList([Own(), Other(2, 2)])
    assert found(model, param_groups(model, 0.5, weight_decay=0.1)) == {
        "0.pairs": (0.25, False),
        "0.fast": (4.0, False),
        "0.rest": (1.0, True),
        "0.phase": (1.0, False),
        "0.gain": (1.0, False),
        "1.weight": (1.0, True),
        "1.bias": (1.0, False),
    }


@pytest.mark.parametrize(
    "model", [None, 3, "model", LRU, {}, [LRU(2, 2)], LRU(2, 2).parameters(), nn.Parameter(torch.ones(2, 2))]
)
def test_what_is_no_module_is_refused(model) -> None:
    with pytest.raises(TypeError, match=rf"^model must be a torch\.nn\.Module, got {type(model).__name__}$"):
        param_groups(model, 1e-3)


@pytest.mark.parametrize("name", ["lr", "factor", "weight_decay"])
def test_rate_that_is_none_is_refused(name: str) -> None:
    def call(rate) -> None:
        param_groups(nn.Linear(2, 2), **{"lr": 1e-3, name: rate})

    for rate in (math.nan, math.inf, -math.inf, -1e-9, -1, np.float32("nan")):
        with pytest.raises(ValueError, match=f"^{name} must be finite and at least 0, got "):
            call(rate)
    for rate in (True, False, "1e-3", None, 1j, [1e-3], np.bool_(True), torch.ones(2)):
        with pytest.raises(TypeError, match=f"^{name} must be a number, got {type(rate).__name__}$"):
            call(rate)
    for rate in (0, 0.0, 1, 1e-3, np.float32(1e-3), np.float64(0.1), Fraction(1, 3)):
        call(rate)


def test_tied_parameter_is_held_once_and_as_what_it_is_in_a_recurrence() -> None:
    model = nn.ModuleList([nn.Linear(4, 5, bias=False), LRU(4, 5), LRU(4, 5)])
    model[2].nu_log = model[1].nu_log
    model[0].weight = model[1].B_re
    groups = param_groups(model, 0.5, weight_decay=0.1)
    params = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(set(params)) == len(params) == len(list(model.parameters()))
    assert any(p is model[0].weight for p in groups[0]["params"])
    assert groups[0]["lr_scale"] == 0.25


@pytest.mark.parametrize("kind", [tuple, list, set])
def test_names_of_recurrent_parameters_may_be_any_collection(kind: type) -> None:
    layer = nn.Linear(3, 3)
    layer.recurrent_parameters = kind(["weight"])
    slow = next(group for group in param_groups(layer, 1e-3) if group["lr_scale"] != 1)
    assert slow["params"][0] is layer.weight
    assert slow["weight_decay"] == 0


def test_rate_may_be_a_tensor_and_stays_one() -> None:
    layer = nn.Linear(3, 3)
    groups = param_groups(layer, torch.tensor(1e-3))
    assert all(isinstance(group["lr"], torch.Tensor) for group in groups)
    torch.optim.AdamW(groups)
    with pytest.raises(ValueError, match="lr must be finite and at least 0, got nan"):
        param_groups(layer, torch.tensor(torch.nan))


@pytest.mark.parametrize(("scale", "error"), [("x", TypeError), (-1.0, ValueError), (float("nan"), ValueError)])
def test_own_rates_that_are_none_are_refused_by_name(scale: object, error: type) -> None:
    layer = nn.Linear(3, 3)
    layer.lr_scales = {"weight": scale}
    with pytest.raises(error, match=r"lr_scales\['weight'\] must be "):
        param_groups(layer, 1e-3)
