"""eexit: early exits and self-speculative decoding for 4-bit causal language models."""

__version__ = "0.1.0"
