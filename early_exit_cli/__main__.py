"""`python -m early_exit_cli`, so that `accelerate launch -m early_exit_cli train ...` works."""

from early_exit_cli.cli.app import main

if __name__ == "__main__":
    main()
