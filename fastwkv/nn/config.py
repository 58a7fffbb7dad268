"""The sizes of an RWKV-4 model."""

from collections.abc import Mapping
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
    """The sizes of a :class:`~fastwkv.nn.RWKV4`.

    Args:
        layers: the number of blocks, L.
        width: the size of the residual stream, D. The channel mix has 4 D hidden units.
        vocab_size: the number of tokens, V; the Pile models have 50277.
        layer_norm_eps: the number added to the variance in the LayerNorms of the blocks; it is 1e-5 in the last
            LayerNorm, ``ln_out``.
        rescale_every: the number of blocks after each of which the residual stream is halved in inference
            (``model.eval()``), so that it stays within float16; 0 for never. Only the weight of ``layer_norm_eps``
            changes by it. Hugging Face's checkpoints have 6.

    Raises:
        TypeError: a size is not an integer, or ``layer_norm_eps`` is not a number.
        ValueError: a size is below 1, ``rescale_every`` below 0, or ``layer_norm_eps`` not positive and finite.

    """

    layers: int
    width: int
    vocab_size: int = 50277
    layer_norm_eps: float = 1e-5
    rescale_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("width", 1), ("vocab_size", 1), ("rescale_every", 0)):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        if not isinstance(self.layer_norm_eps, (int, float)):
            raise TypeError(f"layer_norm_eps must be a number, got {type(self.layer_norm_eps).__name__}")
        if not 0 < self.layer_norm_eps < float("inf"):
            raise ValueError(f"layer_norm_eps must be positive and finite, got {self.layer_norm_eps}")

    @classmethod
    def preset(cls, name: str, *, vocab_size: int = 50277) -> "RWKV4Config":
        """Return the sizes of a published model.

        Args:
            name: "169m", "430m", "1.5b", "3b", "7b" or "14b", in capitals or not.
            vocab_size: the number of tokens.

        Raises:
            TypeError: the name is not a string.
            ValueError: there is no preset of this name.

        """
        if not isinstance(name, str):
            raise TypeError(f"the preset must be a str, got {type(name).__name__}")
        if name.lower() not in _PRESETS:
            raise ValueError(f"the preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        layers, width = _PRESETS[name.lower()]
        return cls(layers, width, vocab_size)


def check_config(config: object) -> None:
    """Check that the config of a module is an :class:`RWKV4Config`; the message of the error says how to make one."""
    if isinstance(config, RWKV4Config):
        return
    hint = ""
    if isinstance(config, Mapping):
        hint = "; RWKV4Config(**config) makes one of it"
    elif isinstance(config, str):
        hint = "; RWKV4Config.preset and RWKV4.from_pretrained take names"
    raise TypeError(f"config must be an RWKV4Config, got {type(config).__name__}{hint}")
