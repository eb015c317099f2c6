"""``python -m remelt`` is the command ``remelt``."""

from remelt.cli import main

if __name__ == "__main__":
    main()
