"""Conversion between Hugging Face checkpoints and ours; ``python -m convert --help``."""
