"""What is trained: exit heads and the EAGLE head, and how they run over one text."""
