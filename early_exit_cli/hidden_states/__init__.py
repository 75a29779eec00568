"""Hidden states for training and calibration: from the running backbone, or from a cache on disk."""
