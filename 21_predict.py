"""Predict tomograms with one or several checkpoints; writes submission.csv and scored_picks.csv."""

from czii25d.pipeline.app import run
from czii25d.pipeline.predict import predict

if __name__ == "__main__":
    run(predict, "predict")
