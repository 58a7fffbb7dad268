"""Memory with guard zones: a stray write shows as a changed guard, a stray read as a NaN in the result."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 64  # elements on either side


class GuardedMemory(TorchDispatchMode):
    """Within this context every tensor that torch.empty and its relatives return stands between guard zones of NaN."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[tuple[Tensor, int]] = []

    def guarded(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to a place between guard zones."""
        return self._place(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def check(self) -> None:
        """Fail if anything was written beside a tensor."""
        assert self._buffers
        for buffer, size in self._buffers:
            for zone in (buffer[:GUARD], buffer[GUARD + size :]):
                zone = torch.view_as_real(zone) if zone.is_complex() else zone
                intact = zone.isnan() if zone.is_floating_point() else zone == torch.iinfo(zone.dtype).max
                assert intact.all(), "a guard zone was written to"

    def _place(self, shape, dtype, device) -> Tensor:
        size = torch.Size(shape).numel()
        nan = complex(torch.nan, torch.nan) if dtype.is_complex else torch.nan
        fill = nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max
        buffer = torch.full((size + 2 * GUARD,), fill, dtype=dtype, device=device)
        self._buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::empty":
            return self._place(args[0], kwargs.get("dtype") or torch.get_default_dtype(), kwargs.get("device"))
        if name in ("aten::empty_like", "aten::new_empty"):
            shape = args[1] if name == "aten::new_empty" else args[0].shape
            return self._place(shape, kwargs.get("dtype") or args[0].dtype, kwargs.get("device") or args[0].device)
        return func(*args, **kwargs)
