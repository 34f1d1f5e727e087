"""`python -m ptune` is the command `ptune`."""

from .cli import main

if __name__ == "__main__":
    main()
