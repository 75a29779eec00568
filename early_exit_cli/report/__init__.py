"""What a person sees: the terminal, pictures, the page of `--html`."""
