"""`python -m squall.cli`: the `squall` command where its script is not on the path."""

from squall.cli.main import main

main()
