"""Show picks, or a training, on one page that opens offline: slices, averages, scores, counts and times."""

from czii25d.pipeline.app import run
from czii25d.pipeline.report import write_report

if __name__ == "__main__":
    run(write_report, "report")
