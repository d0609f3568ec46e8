"""Commands over the library: python -m tools.NAME --help."""

import sys

from data_pipeline.command import until_it_runs

if sys.argv[:1] == ["-m"]:  # Python is looking for the one that it is to run
    until_it_runs()
