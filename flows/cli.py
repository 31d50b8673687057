"""The command line, where it was; `python -m camera` is the same."""

from camera.cli import main

if __name__ == "__main__":
    main()
