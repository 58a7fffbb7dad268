"""Everything that needs a GPU: in the few minutes for which there is one, or part by part for as long as it takes.

    gpu.py first --out DIR      is it right, how fast is it, which launch shape is best, and why: five minutes
    gpu.py second --out DIR     is it right still, and how fast beside its peers: six
    gpu.py table --out DIR      what either of them says at the end, once more
    gpu.py [PART ...]           the tests, the sanitizers and all benchmarks, each at most nine minutes

The first two run from a bare copy of the repository: nothing installed but what the kernels need, no network, no
history. Every figure is on disk the moment it exists, and the last lines printed are all that matters of them.
"""

import sys
import time

from gpu_minutes import commands


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    began = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in commands.COMMANDS:
        return commands.main(arguments, began)
    from gpu_minutes import parts  # which imports PyTorch

    return parts.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
