"""LongVILA on Megatron-Core: long-video vision-language training and inference with MM-SP."""

__version__ = "0.1.0"
