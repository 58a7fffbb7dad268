"""Checkpoints of RWKV-4: they are found, checked, loaded and saved here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastwkv.nn import checkpoint_names
from fastwkv.nn.config import RWKV4Config
from fastwkv.nn.tensor_files import (
    CheckpointError,
    check_name,
    read_json,
    read_tensors,
    replace_file,
    write_json,
    write_tensors,
)
from fastwkv.ops.checks import FLOATING

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first one in a folder counts; also as NAME.index.json
_MODEL_TYPE = "fastwkv-rwkv4"
_DEFAULT_EPS = 1e-5
_WIDE = (".time_decay", ".time_first")  # rates and bonuses are at least float32


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has passed all checks; only a compressed one is in memory yet."""

    path: Path
    format: str  # one of checkpoint_names.FORMATS
    config: RWKV4Config
    tensors: Mapping[str, Tensor]  # in the mapped file, with the names and shapes of the model

    def load_into(self, model: nn.Module, dtype: torch.dtype | None, device: torch.device | str) -> None:
        """Give a model on the meta device copies of these tensors, the only ones in memory: the files are mapped.

        Raises:
            CheckpointError: ``dtype`` is None and the model cannot compute in the stored dtypes.

        """
        if dtype is None:
            self._check_dtypes()
        loaded = {}
        for name, tensor in self.tensors.items():
            kept = _dtype_in_model(name, tensor.dtype, dtype)
            loaded[name] = tensor.detach().to(device, kept, copy=True, memory_format=torch.contiguous_format)
        model.load_state_dict(loaded, assign=True)

    def _check_dtypes(self) -> None:
        first, *others = (name for name in self.tensors if not name.endswith(_WIDE))
        for name in others:
            if self.tensors[name].dtype != self.tensors[first].dtype:
                found = f"{first} is {self.tensors[first].dtype}, {name} is {self.tensors[name].dtype}"
                raise CheckpointError(f"{self.path}: of several dtypes, so give one: {found}")


def open_checkpoint(path: str | Path, checksums: bool = False) -> Checkpoint:
    """Find a checkpoint and check the names, shapes, dtypes and sizes of all its tensors.

    Args:
        path: a file of BlinkDL's, or a folder of Hugging Face's or of :func:`save`.
        checksums: whether to read files of ``torch.save`` through, to compare them with their checksums.

    Raises:
        OSError: a file is missing or cannot be opened.
        CheckpointError: the checkpoint is damaged, or not of RWKV-4.

    """
    path = Path(path)
    check_name(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; checkpoints are read from a disk, not downloaded")
    found = _read_folder(path, checksums) if path.is_dir() else read_tensors(path, checksums)
    checkpoint_names.refuse_other_models(str(path), found)
    format = checkpoint_names.format_of(found)
    if format is None:
        some = ", ".join(sorted(found)[:3]) or "nothing"
        raise CheckpointError(f"{path}: not an RWKV-4 checkpoint: expected names like emb.weight, got {some}")
    if format != "blinkdl" and not path.is_dir():
        raise CheckpointError(f"{path}: give the folder that holds it and its config.json")
    written = {} if format == "blinkdl" else read_json(path / "config.json")
    config = _config(path, format, found, written)
    tensors = _checked(path, format, config, found)
    if format == "fastwkv" and written.get("model_type") != _MODEL_TYPE:
        raise CheckpointError(f"{path}: config.json says model_type = {written.get('model_type')}, not {_MODEL_TYPE}")
    return Checkpoint(path, format, config, tensors)


def save(model: nn.Module, config: RWKV4Config, path: str | Path, format: str) -> None:
    """Write the parameters of a model; see :meth:`fastwkv.nn.RWKV4.save_pretrained`."""
    path = Path(path)
    if format not in checkpoint_names.FORMATS:
        raise ValueError(f"format must be one of {', '.join(checkpoint_names.FORMATS)}, got {format!r}")
    parameters = model.state_dict()
    if other := sorted(parameters.keys() ^ checkpoint_names.shapes(config).keys()):
        raise ValueError(f"expected the parameters of an RWKV4 as it was built, but these differ: {_some(other)}")
    tensors = {
        checkpoint_names.name_in(format, name): tensor.reshape(checkpoint_names.shape_in(format, name, tensor.shape))
        for name, tensor in parameters.items()
    }
    if format == "blinkdl":
        if config.layer_norm_eps != _DEFAULT_EPS:
            raise ValueError(f"BlinkDL's format means layer_norm_eps = 1e-5, the model has {config.layer_norm_eps}")
        replace_file(path, lambda part: torch.save({name: _compact(tensor) for name, tensor in tensors.items()}, part))
        return
    write_tensors(path / _WEIGHTS[0], tensors)
    dtype = str(model.get_parameter("embeddings.weight").dtype).removeprefix("torch.")
    written = {"model_type": _MODEL_TYPE, **asdict(config)} if format == "fastwkv" else _hf_config(config)
    write_json(path / "config.json", {**written, "torch_dtype": dtype})


def _read_folder(folder: Path, checksums: bool) -> dict[str, Tensor]:
    for name in _WEIGHTS:
        if (folder / name).exists():
            return read_tensors(folder / name, checksums)
        if (folder / f"{name}.index.json").exists():
            return _read_shards(folder / f"{name}.index.json", checksums)
    looked_for = ", ".join((*_WEIGHTS, *(f"{name}.index.json" for name in _WEIGHTS)))
    raise FileNotFoundError(f"{folder}: holds no weights: none of {looked_for}")


def _read_shards(index: Path, checksums: bool) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    found: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, places.values()))):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} is not the name of a file beside it")
        tensors = read_tensors(index.parent / shard, checksums)
        if wrong := sorted(tensors.keys() ^ {name for name, place in places.items() if place == shard}):
            raise CheckpointError(f"{index}: {_some(wrong)} in the index or in {shard}, but not in both")
        found |= tensors
    return found


def _config(path: Path, format: str, found: Mapping[str, Tensor], written: Mapping[str, Any]) -> RWKV4Config:
    """Infer the sizes from the weights; those in config.json must agree."""
    embeddings = checkpoint_names.name_in(format, "embeddings.weight")
    if embeddings not in found or found[embeddings].dim() != 2:
        raise CheckpointError(f"{path}: expected {embeddings} of shape [V, D] among its tensors")
    V, D = found[embeddings].shape
    prefix = checkpoint_names.name_in(format, "blocks.")
    blocks = {name.removeprefix(prefix).split(".")[0] for name in found if name.startswith(prefix)}
    sizes = {"layers": max(len(blocks), 1), "width": D, "vocab_size": V}
    names = dict(zip(sizes, sizes, strict=True))
    eps_name, default_rescale = "layer_norm_eps", 0
    if format == "hf":
        names = {"layers": "num_hidden_layers", "width": "hidden_size", "vocab_size": "vocab_size"}
        eps_name, default_rescale = "layer_norm_epsilon", 6
        _refuse_hf_options(path, D, written)
    for size, name in names.items():
        if written.get(name, sizes[size]) != sizes[size]:
            raise CheckpointError(f"{path}: config.json says {name} = {written[name]!r}, the weights say {sizes[size]}")
    try:
        rescale_every = written.get("rescale_every", default_rescale)
        if isinstance(rescale_every, int) and rescale_every < 0:  # Hugging Face never rescales then
            rescale_every = 0
        eps = written.get(eps_name, _DEFAULT_EPS)
        eps = float(eps) if isinstance(eps, int) else eps  # an int of JSON may be too large for a float
        return RWKV4Config(**sizes, layer_norm_eps=eps, rescale_every=rescale_every)
    except (OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config.json: {error}") from None


def _refuse_hf_options(path: Path, width: int, written: Mapping[str, Any]) -> None:
    expected = {"model_type": "rwkv", "attention_hidden_size": width, "intermediate_size": 4 * width}
    for name, value in (*expected.items(), ("tie_word_embeddings", False)):
        if written.get(name) not in (None, value):
            raise CheckpointError(f"{path}: config.json says {name} = {written[name]}, expected {value}")


def _hf_config(config: RWKV4Config) -> dict[str, Any]:
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "attention_hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "layer_norm_epsilon": config.layer_norm_eps,
        "context_length": 1024,
        "rescale_every": config.rescale_every,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _checked(path: Path, format: str, config: RWKV4Config, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names of the model; raise CheckpointError if they do not fit these sizes."""
    shapes = checkpoint_names.shapes(config)
    wanted = {checkpoint_names.name_in(format, name): name for name in shapes}
    wrong = []
    if missing := [name for name in wanted if name not in found]:
        wrong.append(f"missing {_some(missing)}")
    if extra := [name for name in found if name not in wanted]:
        wrong.append(f"unexpected {_some(extra)}")
    tensors, misshapen = {}, []
    for name_in_file, name in wanted.items():
        if (tensor := found.get(name_in_file)) is None:
            continue
        shape = checkpoint_names.shape_in(format, name, shapes[name])
        if tuple(tensor.shape) != shape:
            misshapen.append(f"{name_in_file} {list(tensor.shape)} where {list(shape)} was expected")
        elif tensor.dtype not in FLOATING:
            misshapen.append(f"{name_in_file} {tensor.dtype} where float32, float64, bfloat16 or float16 was expected")
        else:
            tensors[name] = tensor.reshape(shapes[name])
    if misshapen:
        wrong.append(_some(misshapen))
    if wrong:
        sizes = f"{config.layers} layers of width {config.width}"
        raise CheckpointError(f"{path}: not an RWKV-4 checkpoint of {sizes}: {'; '.join(wrong)}")
    return tensors


def _dtype_in_model(name: str, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a parameter in a model of the dtype ``wanted``, of the file if that is None."""
    if wanted is None:
        return stored
    return torch.promote_types(wanted, torch.float32) if name.endswith(_WIDE) else wanted


def _compact(tensor: Tensor) -> Tensor:
    """Return the values on the CPU in memory of exactly their size: ``torch.save`` writes all the memory of a view."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
