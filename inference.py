"""`ced tag` under its published name."""

from ced.cli import main

if __name__ == "__main__":
    main("tag", "--tail", "short")
