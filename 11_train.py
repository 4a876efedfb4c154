"""Train one fold of a 2.5D U-Net; checkpoints go to saved_models/<wandb.name>/."""

from czii25d.pipeline.app import run
from czii25d.pipeline.train import train

if __name__ == "__main__":
    run(train, "train")
