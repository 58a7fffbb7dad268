"""RWKV-4: the language model.

Source: "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, section 3.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fastwkv.nn import rwkv4_step
from fastwkv.nn.checkpoint import open_checkpoint, save
from fastwkv.nn.config import RWKV4Config, check_config
from fastwkv.nn.rwkv4_layers import RWKV4Block, orthogonal_
from fastwkv.nn.state import RWKV4State, check_state, empty_wkv_state
from fastwkv.ops.checks import FLOATING, check_cu_seqlens, check_dense, check_device

_LN_OUT_EPS = 1e-5  # Hugging Face's model has it too, for any eps of the blocks, and its checkpoints mean the same here


class RWKV4(nn.Module):
    """The RWKV-4 language model: embedding, L blocks, LayerNorm, head.

    It costs O(T D²) time for a sequence of T tokens and O(D) memory for its state. A sequence of more than one token is
    read in parallel, a single token takes a recurrent step. The numbers are the same, as they are for any split of a
    sequence whose state is carried::

        logits, state = model(tokens)
        logits, state = model(next_token, state)

    Gradients also flow through a carried state; ``state.detach()`` cuts them: truncated back-propagation. With
    ``model.gradient_checkpointing = True`` the backward pass computes every block again instead of keeping its
    intermediate tensors: the same gradients and less memory, for the time of another forward pass. If
    ``config.rescale_every`` is not 0, the model must not change between training and inference mode from the forward to
    the backward pass. Under ``torch.device("meta")`` the model is built without memory; follow
    ``model.to_empty(device=...)`` by :meth:`reset_parameters` or by loading weights.

    Args:
        config: the sizes, for example ``RWKV4Config.preset("169m")``.

    Raises:
        TypeError: ``config`` is not an ``RWKV4Config``.

    """

    def __init__(self, config: RWKV4Config) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(RWKV4Block(config, layer) for layer in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width, _LN_OUT_EPS)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._reset_ends()

    def reset_parameters(self) -> None:
        """Set every parameter to its value at the start of training."""
        self._reset_ends()
        self.ln_out.reset_parameters()
        for block in cast("Iterable[RWKV4Block]", self.blocks):
            block.reset_parameters()

    @torch.no_grad()
    def _reset_ends(self) -> None:
        self.embeddings.weight.uniform_(-1e-4, 1e-4)
        V, D = self.head.weight.shape
        orthogonal_(self.head.weight, 0.5 * math.sqrt(max(V / D, 1)))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        checksums: bool = True,
    ) -> "RWKV4":
        """Load a checkpoint: a ``.pth`` of BlinkDL's, a folder of Hugging Face's, or one of :meth:`save_pretrained`.

        The model is in inference mode, ``model.eval()``, as the models of transformers are.

        Nothing in a file is run (safetensors, or ``torch.load(weights_only=True)``), and everything is checked before
        anything is loaded. Files are mapped, and the model is built without memory, so that memory holds the weights
        once. Only compressed archives, and files of PyTorch before 1.6, are read into memory first.

        Args:
            path: the file or folder. A folder holds config.json and model.safetensors or pytorch_model.bin, whole or
                in shards with an index.
            dtype: the dtype of the parameters, or its name, as "bfloat16"; for one of 16 bits, time_decay and
                time_first are float32. If None, parameters keep the dtype of the file, which must be one for all but
                these two.
            device: the device of the parameters.
            checksums: whether to compare files of ``torch.save`` with the checksums in them. The whole file is then
                read twice, the second time from memory: False is for files that are larger than memory. Other files
                have no checksums: a changed bit in safetensors and files of PyTorch before 1.6 is not noticed.

        Raises:
            OSError: a file is missing or cannot be opened.
            CheckpointError: the checkpoint is damaged, of another version of RWKV, or has missing, unexpected or
                misshapen tensors; the message names the first of them. It is a ValueError.
            TypeError: ``dtype`` is not float32, float64, bfloat16 or float16, or ``checksums`` is not a bool.

        """
        if isinstance(dtype, str):
            dtype = {str(one).removeprefix("torch."): one for one in FLOATING}.get(dtype.removeprefix("torch."), dtype)
        if isinstance(dtype, str) or (dtype is not None and dtype not in FLOATING):
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype!r}")
        if not isinstance(checksums, bool):
            raise TypeError(f"checksums must be True or False, got {checksums!r}")
        checkpoint = open_checkpoint(path, checksums)
        with torch.device("meta"):
            model = cls(checkpoint.config)
        checkpoint.load_into(model, dtype, device)
        return model.eval()

    def save_pretrained(self, path: str | Path, format: str = "fastwkv") -> None:
        """Write the parameters, bit for bit, in one of three formats; :meth:`from_pretrained` reads each.

        Each file is replaced whole or not at all.

        Args:
            path: a folder, which is made if there is none; for "blinkdl" a file.
            format: "fastwkv" (safetensors and config.json), "hf" (the same, as ``RwkvForCausalLM`` of transformers
                reads it) or "blinkdl" (a dictionary of ``torch.save``, without ``config.rescale_every``).

        Raises:
            OSError: a file cannot be written.
            ValueError: there is no such format, or it cannot express the model, or the model has other parameters than
                it was built with.

        """
        save(self, self.config, path, format)

    def empty_state(self, batch: int) -> RWKV4State:
        """Return the state before any token, for a batch of this size, on the device of the model."""
        shape = (self.config.layers, batch, self.config.width)
        x = torch.zeros(shape, dtype=self.embeddings.weight.dtype, device=self.embeddings.weight.device)
        return RWKV4State(x, x.clone(), empty_wkv_state(shape, x))

    def forward(
        self, tokens: Tensor, state: RWKV4State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RWKV4State]:
        """Predict the token after each of ``tokens``.

        Args:
            tokens: int64 or int32 ``[B, T]``, each at least 0 and below V. Tokens out of range are an error on a CPU;
                on a GPU, and under ``torch.compile``, they are left to PyTorch, since reading them would wait for the
                device.
            state: the state that :meth:`forward` returned for the tokens before; empty if None.
            cu_seqlens: int32 or int64 ``[N + 1]``, for N sequences packed into a batch of one: sequence n holds the
                tokens ``cu_seqlens[n] ... cu_seqlens[n + 1] - 1`` and is independent of the others. Fields of the
                states are ``[L, N, D]`` then.

        Returns:
            logits ``[B, T, V]`` in the dtype of the model, and the state after the last token of every sequence.

        Raises:
            TypeError: an argument is of another type or dtype, or not a dense tensor.
            ValueError: a shape, device or offset does not fit, or a token is outside the vocabulary.

        """
        x, state = self.features(tokens, state, cu_seqlens=cu_seqlens)
        return self.head(x), state

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes anything and returns Any

    def features(
        self, tokens: Tensor, state: RWKV4State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RWKV4State]:
        """Return :meth:`forward` without the head, ``[B, T, D]``, and the state: few of the T logits may be needed."""
        self.check_inputs(tokens, state, cu_seqlens)
        if state is None:
            state = self.empty_state(tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        one_token = tokens.shape[1] == 1 and cu_seqlens is None
        x, state = self._read(tokens[:, 0] if one_token else tokens, state, cu_seqlens)
        return x[:, None] if one_token else x, state

    def step_(self, tokens: Tensor, state: RWKV4State) -> Tensor:
        """Read one token of every sequence, ``[B]``: return its features ``[B, D]`` and change ``state`` in place.

        It is for loops in which :meth:`features` is too slow, and for CUDA graphs: the state keeps its place in memory.
        Only tokens on a CPU are checked, as in :meth:`forward`, and nothing can be differentiated. On a GPU a block
        starts half as many kernels as in :meth:`features`, if its modules are as they were built and have no hooks;
        rounding errors may differ.
        """
        with torch.no_grad():
            if type(self) is RWKV4 and rwkv4_step.stands_for(self, tokens, state):
                return rwkv4_step.run(self, tokens, state)
            return self._read(tokens, state, out=state)[0]

    def _read(
        self, tokens: Tensor, state: RWKV4State, cu_seqlens: Tensor | None = None, out: RWKV4State | None = None
    ) -> tuple[Tensor, RWKV4State]:
        x = self._embed(tokens)
        states = []
        for block, block_state in zip(self.blocks, state.unbind(), strict=True):
            x, block_state = self._run(block, x, block_state, cu_seqlens)
            states.append(block_state)
        return self.ln_out(x), RWKV4State.stack(states, out)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Look tokens up. On a CPU PyTorch compares each with V; only after its error they are compared here."""
        if torch.compiler.is_compiling():
            return self.embeddings(tokens)
        try:
            return self.embeddings(tokens)
        except IndexError:
            self.check_vocabulary(tokens)
            raise

    def _run(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, RWKV4State]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return recomputed(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def check_vocabulary(self, tokens: Tensor) -> None:
        """Raise a ValueError that names the first token outside the vocabulary; on a GPU this waits for the device."""
        V = self.embeddings.weight.shape[0]
        outside = (tokens < 0) | (tokens >= V)
        if outside.any():
            raise ValueError(f"tokens must be at least 0 and below V = {V}, got {int(tokens[outside][0])}")

    def check_inputs(self, tokens: Tensor, state: RWKV4State | None = None, cu_seqlens: Tensor | None = None) -> None:
        """Raise the errors of :meth:`forward` without running it, but for tokens outside the vocabulary."""
        check_dense(tokens=tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must be [B, T] with B and T at least 1, got shape {list(tokens.shape)}")
        if tokens.device != self.embeddings.weight.device:
            raise ValueError(f"tokens are on {tokens.device}, but the model is on {self.embeddings.weight.device}")
        sequences = tokens.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, *tokens.shape)
            check_device(tokens=tokens, cu_seqlens=cu_seqlens)
            sequences = cu_seqlens.shape[0] - 1
        if state is not None:
            check_state(state, self.config, sequences, self.embeddings.weight)
