"""`python -m ced`, and `torchrun -m ced`: the command `ced`."""

from ced.cli import main

if __name__ == "__main__":
    main()
