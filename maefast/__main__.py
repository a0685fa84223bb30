"""`python -m maefast` is the command `maefast`."""

from .cli import main

if __name__ == "__main__":
    main()
