"""`ced train`, `ced evaluate` and so on, as `run.py train`, `run.py evaluate`."""

from ced.cli import main

if __name__ == "__main__":
    main()
