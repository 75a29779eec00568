"""What is trained: exit heads and the lookahead head, and how they run over one text."""
