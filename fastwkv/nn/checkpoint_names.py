"""The names of the tensors of an RWKV-4 checkpoint in each format, and names that only other models have.

| fastwkv                            | Hugging Face                            | BlinkDL                   |
|------------------------------------|-----------------------------------------|---------------------------|
| `embeddings.weight`                | `rwkv.embeddings.weight`                | `emb.weight`              |
| `blocks.0.pre_ln.*`                | `rwkv.blocks.0.pre_ln.*`                | `blocks.0.ln0.*`          |
| `blocks.N.ln1.*, ln2.*`            | `rwkv.blocks.N.ln1.*, ln2.*`            | `blocks.N.ln1.*, ln2.*`   |
| `blocks.N.attention.time_mix_key`  | `rwkv.blocks.N.attention.time_mix_key`  | `blocks.N.att.time_mix_k` |
| `blocks.N.feed_forward.key.weight` | `rwkv.blocks.N.feed_forward.key.weight` | `blocks.N.ffn.key.weight` |
| `ln_out.*`                         | `rwkv.ln_out.*`                         | `ln_out.*`                |
| `head.weight`                      | `head.weight`                           | `head.weight`             |

``time_decay`` is the logarithm of the rate in all of them. ``time_mix_*`` is ``[D]`` here, ``[1, 1, D]`` in the others.
"""

from collections.abc import Iterable

from fastwkv.nn.config import RWKV4Config
from fastwkv.nn.tensor_files import CheckpointError

FORMATS = ("fastwkv", "hf", "blinkdl")

_TO_BLINKDL = {
    "embeddings": "emb",
    "pre_ln": "ln0",
    "attention": "att",
    "feed_forward": "ffn",
    "time_mix_key": "time_mix_k",
    "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}

# Parts of names that only other versions have, the newest first: a checkpoint with several of them is of the newest.
_OTHER_VERSIONS = {
    "RWKV-7": {"r_k"},
    "RWKV-6": {"time_maa_x", "time_maa_w1", "x_bias"},
    "RWKV-5": {"time_faaaa", "ln_x"},
}

# Options of the training code that change what the model computes.
_EXTRAS = {
    "ffnPre": "a channel mix in place of the first time mix",
    "head_q": "a head that copies from the text",
    "head_k": "a head that copies from the text",
    "copy_mask": "a head that copies from the text",
    "tiny_ln": "tiny attention",
    "tiny_q": "tiny attention",
    "tiny_k": "tiny attention",
    "tiny_v": "tiny attention",
    "tiny_mask": "tiny attention",
    "pos_emb_x": "an embedding of positions",
    "pos_emb_y": "an embedding of positions",
}


def name_in(format: str, name: str) -> str:
    """Return the name of a tensor of the model in a format."""
    if format == "blinkdl":
        return ".".join(_TO_BLINKDL.get(part, part) for part in name.split("."))
    if format == "hf" and name != "head.weight":
        return f"rwkv.{name}"
    return name


def shape_in(format: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor of the model in a format."""
    return (1, 1, *shape) if format != "fastwkv" and ".time_mix_" in name else shape


def shapes(config: RWKV4Config) -> dict[str, tuple[int, ...]]:
    """Return the name and the shape of every tensor of a model of these sizes."""
    V, D = config.vocab_size, config.width
    found: dict[str, tuple[int, ...]] = {"embeddings.weight": (V, D)}
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        for norm in ("pre_ln", "ln1", "ln2") if layer == 0 else ("ln1", "ln2"):
            found |= {f"{block}.{norm}.weight": (D,), f"{block}.{norm}.bias": (D,)}
        for vector in ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance"):
            found[f"{block}.attention.{vector}"] = (D,)
        for matrix in ("key", "value", "receptance", "output"):
            found[f"{block}.attention.{matrix}.weight"] = (D, D)
        for vector in ("time_mix_key", "time_mix_receptance"):
            found[f"{block}.feed_forward.{vector}"] = (D,)
        found |= {
            f"{block}.feed_forward.key.weight": (4 * D, D),
            f"{block}.feed_forward.receptance.weight": (D, D),
            f"{block}.feed_forward.value.weight": (D, 4 * D),
        }
    return found | {"ln_out.weight": (D,), "ln_out.bias": (D,), "head.weight": (V, D)}


def format_of(names: Iterable[str]) -> str | None:
    """Return the format of these names, None if they are not of an RWKV model."""
    names = set(names)
    if any(name.startswith("rwkv.") for name in names):
        return "hf"
    if "emb.weight" in names:
        return "blinkdl"
    return "fastwkv" if "embeddings.weight" in names else None


def refuse_other_models(where: str, names: Iterable[str]) -> None:
    """Raise CheckpointError if a name belongs to another version of RWKV, or to an option that changes the model."""
    owners: dict[str, str] = {}
    for name in sorted(names):
        for part in name.split("."):
            owners.setdefault(part, name)
    for version, parts in _OTHER_VERSIONS.items():
        for part in sorted(parts & owners.keys()):
            raise CheckpointError(f"{where}: expected RWKV-4, but {owners[part]} belongs to {version}")
    for part, what in _EXTRAS.items():
        if part in owners:
            raise CheckpointError(f"{where}: {owners[part]} is {what}, which is not part of the RWKV-4 computed here")
