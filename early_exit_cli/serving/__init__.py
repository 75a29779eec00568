"""A model behind an address: HTTP on one side, one thread that decodes on the other."""
