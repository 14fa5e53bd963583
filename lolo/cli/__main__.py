"""`python -m lolo.cli`: the command `lolo`, as a process of several runs it."""

from lolo.cli.main import main
from lolo.runtime import launch

if __name__ == "__main__":
    launch.run(main)
