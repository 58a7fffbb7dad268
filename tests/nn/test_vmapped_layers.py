"""Ensembles and gradients of every sample, as torch.func makes them: those of a loop over models and samples."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from fastwkv.nn import LRU, RGLRU, RWKV4, S4D, LRUBlock, MinGRU, RWKV4Config, RWKV4TimeMix

CONFIG = RWKV4Config(2, 4, 7)
MAKERS = {
    "LRU": lambda: LRU(4, 3),
    "both directions": lambda: LRU(4, 3, bidirectional=True),
    "LRUBlock": lambda: LRUBlock(4, 3).eval(),  # while it trains, BatchNorm changes its buffers
    "S4D": lambda: S4D(4, 6),
    "RGLRU": lambda: RGLRU(4, 2),
    "MinGRU": lambda: MinGRU(4, 3),
    "RWKV4TimeMix": lambda: RWKV4TimeMix(CONFIG, 0),
    "RWKV4": lambda: RWKV4(CONFIG),
}


@pytest.fixture(params=MAKERS)
def maker(request):
    """What makes a layer of float64, and inputs [samples, B, T, ...]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=generator)
    tokens = torch.randint(0, 7, (3, 2, 5), generator=generator)
    return lambda: MAKERS[request.param]().double(), tokens if request.param == "RWKV4" else x


def loss(outputs):
    y = outputs[0] if isinstance(outputs, tuple) else outputs
    return y.sin().sum()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_ensemble_has_the_gradients_of_its_members(maker):
    make, samples = maker
    models = [make() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    losses = vmap(lambda p, b, x: loss(functional_call(base, (p, b), x)), (0, 0, None))(parameters, buffers, samples[0])
    losses.sum().backward()
    for i, model in enumerate(models):
        loss(model(samples[0])).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                close(parameters[name].grad[i], parameter.grad)


def test_every_sample_has_the_gradients_it_has_alone(maker):
    make, samples = maker
    model = make()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradient = grad(lambda p, x: loss(functional_call(model, p, x)))
    found = vmap(gradient, (None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        wanted = gradient(parameters, sample)
        close({name: g[i] for name, g in found.items()}, wanted)
        model.zero_grad()
        loss(model(sample)).backward()
        close({n: wanted[n] for n, p in model.named_parameters() if p.grad is not None},
              {n: p.grad for n, p in model.named_parameters() if p.grad is not None})  # fmt: skip


def test_any_one_parameter_may_be_mapped(maker):
    make, samples = maker
    model = make()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of(parameters):
        return loss(functional_call(model, parameters, samples[0]))

    for name, parameter in parameters.items():
        several = torch.stack([parameter, parameter * 1.1])
        found = vmap(of, ({n: 0 if n == name else None for n in parameters},))({**parameters, name: several})
        close(found, torch.stack([of({**parameters, name: one}) for one in several]))
