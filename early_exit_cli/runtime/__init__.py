"""Running the blocks of the backbone: one interface, several runners, the KV cache."""
