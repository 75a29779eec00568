"""The frozen model: what loads, in which precision, and what heads need to know of it."""
