"""`python -m star_elastic.cli` is the same as `star-elastic`."""

from star_elastic.cli import main

main()
