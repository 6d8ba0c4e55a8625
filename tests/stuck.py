"""Two processes, one of which does not answer in time: prints what would be said of it."""

from __future__ import annotations

import os
import time

from twa_merge_cli.boundary import _of_lost_rank

from twa_merge.distributed import start

if __name__ == "__main__":
    world = start("cpu", timeout_minutes=0.05)
    if world.rank == 1:
        time.sleep(8)
        os._exit(0)
    try:
        world.gather(1)
    except Exception as error:
        print(_of_lost_rank(error), flush=True)
    os._exit(0)
