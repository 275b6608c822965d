"""`python -m lfrns_hub` and `accelerate launch -m lfrns_hub`: the command line."""

from lfrns_cli import main

main()
