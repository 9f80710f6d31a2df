"""`ced export` under its published name."""

from ced.cli import main

if __name__ == "__main__":
    main("export", "--input", "feats", "--int8")
