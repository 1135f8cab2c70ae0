"""`python -m siglance.engine` is the program `siglance`."""

from .cli import main

if __name__ == "__main__":
    main()
