"""Weights on disk: distributed checkpoints (sharded.py) and exchange with Hugging Face layouts (hf.py)."""
