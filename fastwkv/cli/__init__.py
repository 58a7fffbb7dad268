"""The command ``fastwkv``: it continues texts and describes checkpoints."""
