"""`python -m decant`: the command line, as launchers of several processes start it."""

from decant.cli.main import main

main()
