"""Thresholds and chances from held-out text."""
