"""``python -m twa_merge_cli``, which is also what torchrun starts."""

import sys

if __name__ == "__main__":
    # `-m` lets the working directory go before installed packages: a rich.py of the user's would
    # be taken for the package, in several processes and not in one that a script has started.
    if not sys.flags.safe_path:
        del sys.path[0]

    from .main import main

    main()
