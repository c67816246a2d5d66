"""`python -m lit_rlft.cli`, for launchers such as torchrun."""

from lit_rlft.cli import main

main()
