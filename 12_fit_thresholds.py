"""Fit thresholds out of fold, judge them on runs they have not seen, and store them in the checkpoints."""

from czii25d.pipeline.app import run
from czii25d.pipeline.thresholds import fit_out_of_fold

if __name__ == "__main__":
    run(fit_out_of_fold, "fit_thresholds")
