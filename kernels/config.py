"""Shapes that every implementation of an operator agrees on."""

CHECKPOINT_ROWS = 16
"""WKV keeps its state before every 16th token for the backward pass: three float32, 0.75 bytes a token and channel."""
