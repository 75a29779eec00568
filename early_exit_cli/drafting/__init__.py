"""Who proposes tokens, and whether that pays."""
