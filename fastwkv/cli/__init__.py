"""The command ``fastwkv``: text in, text out, and what is in a checkpoint."""
