"""`python -m edge_runtime` is `edge-run`."""

from .entry import main

main()
