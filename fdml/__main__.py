"""``python -m fdml`` is the command ``fdml``."""

from fdml.cli import main

if __name__ == "__main__":
    main()
