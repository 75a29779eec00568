"""The command line: `app.py` is the tree, every other file one command, `options.py` turns settings into flags."""
