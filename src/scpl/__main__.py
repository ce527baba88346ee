"""`python -m scpl`."""

from scpl.app.cli import main

main()
