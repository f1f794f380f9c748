"""`python -m kindling ...` and `spark-submit .../kindling/__main__.py ...`: the command line, as `cli.py` has it."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # spark-submit runs this file as a script: its folder would then offer `signature`, `train`, ... as top modules.
        here = Path(__file__).resolve().parent
        sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]

    from kindling.cli import main

    main()
