"""A user's script with strategy="ddp", which Lightning starts again for the second rank.

Argument: folder of the records.
"""

import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main(folder):
    import torch
    from lightning.pytorch.strategies import DDPStrategy
    from signed_digits import Net, Recorder, make_mark, make_trainer, train_loader, val_loader

    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30))
    mark = make_mark(n_images=200, momentum=0.5)
    trainer = make_trainer(mark, Recorder(folder, mark), strategy=strategy, devices=2, max_epochs=1)
    trainer.fit(Net(optimizer="sgd"), train_loader(400, 20, shuffle=False), val_loader(50))
    # Lightning leaves the group open; a process that ends while its threads run is sometimes aborted.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
