"""`python -m bench`: what `make bench` runs."""

from bench.serving import main

main()
