"""The one loop: draft, verify, accept."""
