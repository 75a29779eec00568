"""Training heads on what the backbone says."""
