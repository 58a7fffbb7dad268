"""The sizes of an RWKV-4 model."""

from dataclasses import dataclass

_PRESETS = {  # layers, width: table 2 of arXiv 2305.13048
    "169m": (12, 768),
    "430m": (24, 1024),
    "1.5b": (24, 2048),
    "3b": (32, 2560),
    "7b": (32, 4096),
    "14b": (40, 5120),
}


@dataclass(frozen=True)
class RWKV4Config:
    """How large an :class:`~fastwkv.nn.RWKV4` is.

    Args:
        layers: number of blocks, L.
        width: size of the residual stream, D. The channel mix has 4 D hidden units.
        vocab_size: number of tokens, V; 50277 is that of the Pile models.
        layer_norm_eps: added to the variance in the LayerNorms of the blocks; in the last one, ``ln_out``, it is 1e-5.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is below 1, or ``layer_norm_eps`` is not positive.

    """

    layers: int
    width: int
    vocab_size: int = 50277
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("layers", "width", "vocab_size"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps must be positive, got {self.layer_norm_eps}")

    @classmethod
    def preset(cls, name: str, *, vocab_size: int = 50277) -> "RWKV4Config":
        """Return the sizes of a published model: "169m", "430m", "1.5b", "3b", "7b" or "14b".

        Raises:
            ValueError: there is no preset of this name.

        """
        if name not in _PRESETS:
            raise ValueError(f"the preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        layers, width = _PRESETS[name]
        return cls(layers, width, vocab_size)
