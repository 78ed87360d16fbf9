"""`python -m attnsurgery` is the command `attnsurgery`."""

from __future__ import annotations

from attnsurgery.cli import main

if __name__ == "__main__":
    main()
