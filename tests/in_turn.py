"""Commands one after the other in the ranks of one launch, which takes longer than all of them."""

from __future__ import annotations

import json
import sys

from twa_merge_cli.main import cli, main

if __name__ == "__main__":
    *earlier, last = json.loads(sys.argv[1])
    for arguments in earlier:
        cli.main(arguments, "twa-merge", standalone_mode=False)
    main(last)
