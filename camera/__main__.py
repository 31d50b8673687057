"""`python -m camera`: the command line."""

from camera.cli import main

if __name__ == "__main__":
    main()
