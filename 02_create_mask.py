"""Render the picks as Gaussian heatmaps, the training target: <paths.output>/heatmaps/<run>.zarr."""

from czii25d.pipeline.app import run
from czii25d.pipeline.mask import create_mask

if __name__ == "__main__":
    run(create_mask, "create_mask")
