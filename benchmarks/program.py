"""Becomes another program: ``python -m benchmarks.program PROGRAM ARGUMENT…``.

So that a supervisor of Python modules can start, watch and end it: process and process group stay the same.
"""

import os
import sys

if __name__ == "__main__":
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - as the rest of the command line says
