"""What outlives a run: files written atomically, the schemas of what is read, the environment of a run."""
