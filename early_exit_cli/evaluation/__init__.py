"""Measuring heads and ways of decoding."""
