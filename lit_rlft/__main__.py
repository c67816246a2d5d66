"""`python -m lit_rlft`: the command line, for launchers such as torchrun."""

from lit_rlft.cli import main

if __name__ == "__main__":
    main()
