"""`python -m tnllm` is the `tnllm` command."""

from tnllm.cli.main import main

if __name__ == "__main__":
    main()
