"""RWKV-4 as PyTorch modules on top of :func:`fastwkv.wkv`, and text generation with it."""

from fastwkv.nn.config import RWKV4Config
from fastwkv.nn.generate import generate
from fastwkv.nn.rwkv4 import RWKV4, RWKV4Block, RWKV4ChannelMix, RWKV4TimeMix
from fastwkv.nn.state import RWKV4State

__all__ = ["RWKV4", "RWKV4Block", "RWKV4ChannelMix", "RWKV4Config", "RWKV4State", "RWKV4TimeMix", "generate"]
