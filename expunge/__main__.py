"""`python -m expunge`: the same commands as the console script."""

from expunge.cli import main

if __name__ == "__main__":
    main()
