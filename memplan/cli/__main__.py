"""``python -m memplan.cli`` is the command `memplan`."""

from memplan.cli import main

main()
