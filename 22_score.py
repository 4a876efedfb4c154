"""Score picks against a solution by the competition's metric: F-beta per particle and in total."""

from czii25d.pipeline.app import run
from czii25d.pipeline.score import score_submission

if __name__ == "__main__":
    run(score_submission, "score")
