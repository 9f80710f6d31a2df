"""`python -m ced` is `ced`."""

from ced.cli import main

if __name__ == "__main__":
    main()
