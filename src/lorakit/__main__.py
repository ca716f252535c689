"""`python -m lorakit` is the command `lorakit`."""

from .cli.main import main

if __name__ == "__main__":
    main()
