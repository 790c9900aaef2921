"""`python -m cluster`: the same command line as `rayloop`."""

from cluster.cli import main

main()
