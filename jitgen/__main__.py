"""`python -m jitgen`: the command line."""

from .cli import main

main()
