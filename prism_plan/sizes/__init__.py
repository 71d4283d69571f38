"""Sizes of MoE models, read from checkpoints, GGUF files, loaded models and configurations."""
