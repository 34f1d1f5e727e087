"""`python -m ptune` is the command `ptune`."""

from .cli import main

main()
