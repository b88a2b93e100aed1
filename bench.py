"""Speed and memory of the decoder; the same as `python -m lab.bench`, which explains itself."""

from lab.bench.__main__ import main

if __name__ == "__main__":
    main()
