"""The model: SigLIP tower, projector, Qwen2 or Llama decoder from Megatron-Core's parts, and LongVILA on top of them."""
