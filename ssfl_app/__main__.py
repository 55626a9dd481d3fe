"""`python -m ssfl_app` is the command `ssfl`."""

from ssfl_app.cli import main

if __name__ == "__main__":
    main()
