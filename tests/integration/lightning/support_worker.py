"""One of several processes, started as by torchrun, that run the distributed cells one after another.

Arguments: FOLDER, cells in JSON.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main(folder, cells):
    import torch
    from support_cells import run_cell

    torch.set_num_threads(1)
    for number, cell in enumerate(json.loads(cells)):
        result = run_cell(*cell, world_size=int(os.environ["WORLD_SIZE"]))
        if os.environ["RANK"] == "0":
            torch.save(result, Path(folder) / f"{number}.pt")
    if torch.distributed.is_initialized():
        # Lightning leaves the group open; a process that ends while its threads run is sometimes aborted.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
