import sys

from data_pipeline.cli import main
from data_pipeline.command import as_command

if __name__ == "__main__":
    sys.exit(as_command(main))
