"""`python -m bitquilt` is the command `bitquilt`."""

from bitquilt.cli import main

main()
