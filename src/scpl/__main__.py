"""`python -m scpl`."""

from scpl.app.cli import main

if __name__ == "__main__":  # processes that multiprocessing spawns import this file as well
    main()
