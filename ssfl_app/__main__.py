"""`python -m ssfl_app` is the command `ssfl`."""

from ssfl_app.cli.main import main

if __name__ == "__main__":
    main()
