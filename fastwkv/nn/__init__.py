"""PyTorch modules: RWKV-4 over :func:`fastwkv.wkv`, and layers over :func:`fastwkv.linear_scan`."""

from fastwkv.nn.config import RWKV4Config
from fastwkv.nn.generation import generate
from fastwkv.nn.lru import LRU
from fastwkv.nn.lru_block import LRUBlock
from fastwkv.nn.mingru import MinGRU
from fastwkv.nn.param_groups import param_groups
from fastwkv.nn.rglru import RGLRU
from fastwkv.nn.rwkv4 import RWKV4
from fastwkv.nn.rwkv4_layers import RWKV4Block, RWKV4ChannelMix, RWKV4TimeMix
from fastwkv.nn.s4d import S4D
from fastwkv.nn.state import RWKV4State
from fastwkv.nn.tensor_files import CheckpointError

__all__ = [
    "LRU",
    "RGLRU",
    "RWKV4",
    "S4D",
    "CheckpointError",
    "LRUBlock",
    "MinGRU",
    "RWKV4Block",
    "RWKV4ChannelMix",
    "RWKV4Config",
    "RWKV4State",
    "RWKV4TimeMix",
    "generate",
    "param_groups",
]
