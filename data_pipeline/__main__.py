from data_pipeline.command import as_command, until_it_runs

if __name__ == "__main__":
    until_it_runs()

import sys

from data_pipeline.cli import main

if __name__ == "__main__":
    sys.exit(as_command(main))
