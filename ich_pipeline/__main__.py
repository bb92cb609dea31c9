"""`python -m ich_pipeline`, for torchrun."""

from ich_pipeline.cli import main

main()
