"""Turn tomograms into volumes that are cheap to crop: <paths.output>/volumes/<split>/<run>/."""

from czii25d.pipeline.app import run
from czii25d.pipeline.dataset import create_dataset

if __name__ == "__main__":
    run(create_dataset, "create_dataset")
