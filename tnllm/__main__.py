"""`python -m tnllm` is the `tnllm` command, and this is where both begin."""

import os
from typing import NoReturn

try:
    from tnllm import interrupts

    interrupts.leave_at_once()
except KeyboardInterrupt:
    os._exit(130)


def main() -> NoReturn:
    """Run the command line and exit. The imports take a while, so they come after the handler of Ctrl-C."""
    from tnllm.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
