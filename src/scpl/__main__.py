"""`python -m scpl`."""

from scpl.cli import main

main()
