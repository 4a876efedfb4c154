"""The program ``czii25d``: the numbered scripts as commands, ``czii25d predict key=value ...``.

This table is what is known of each command. A function is imported when its command runs, so that listing them takes
no time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from czii25d.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Command:
    """One command.

    Parameters
    ----------
    config
        Its keys: ``conf/<config>.yaml``.
    function
        ``module:function`` within `czii25d.pipeline`; it takes the configuration.
    script
        The script, or module, that does the same: ``python <script> key=value ...``.
    summary
        What it does, in one line: the script's docstring.
    """

    config: str
    function: str
    script: str
    summary: str


COMMANDS = {  # in the order of use
    "phantom": Command(
        "phantom",
        "phantom:make_phantom",
        "00_make_phantom.py",
        "Make a small simulated data set in the competition's layout.",
    ),
    "dataset": Command(
        "create_dataset",
        "dataset:create_dataset",
        "01_create_dataset.py",
        "Turn tomograms into volumes that are cheap to crop: <paths.output>/volumes/<split>/<run>/.",
    ),
    "mask": Command(
        "create_mask",
        "mask:create_mask",
        "02_create_mask.py",
        "Render the picks as Gaussian heatmaps, the training target: <paths.output>/heatmaps/<run>.zarr.",
    ),
    "solution": Command(
        "create_solution",
        "solution:create_solution",
        "03_create_solution.py",
        "Write all picks of the training runs as the competition's solution: <paths.output>/solution.csv.",
    ),
    "train": Command(
        "train",
        "train:train",
        "11_train.py",
        "Train one fold of a 2.5D U-Net; checkpoints go to saved_models/<wandb.name>/.",
    ),
    "thresholds": Command(
        "fit_thresholds",
        "thresholds:fit_out_of_fold",
        "12_fit_thresholds.py",
        "Fit thresholds out of fold, judge them on runs they have not seen, and store them in the checkpoints.",
    ),
    "soup": Command(
        "soup",
        "soup:make_soup",
        "13_soup.py",
        "Average the weights of several checkpoints into one network (a model soup), written as safetensors.",
    ),
    "predict": Command(
        "predict",
        "predict:predict",
        "21_predict.py",
        "Predict tomograms with one or several checkpoints; writes submission.csv and scored_picks.csv.",
    ),
    "score": Command(
        "score",
        "score:score_submission",
        "22_score.py",
        "Score picks against a solution by the competition's metric: F-beta per particle and in total.",
    ),
    "report": Command(
        "report",
        "report:write_report",
        "23_report.py",
        "Show picks, or a training, on one page that opens offline: slices, averages, scores, counts and times.",
    ),
    "view": Command(
        "view",
        "view:view",
        "-m czii25d.pipeline.view",
        "Look at runs in napari: tomogram, picks of each particle and, if they were kept, heatmaps.",
    ),
    "export": Command(
        "export",
        "export:export",
        "export_trt.py",
        "Export checkpoints to ONNX files and TensorRT engines, checked against torch, each described by a JSON file.",
    ),
    "convert": Command(
        "convert",
        "convert:convert",
        "-m czii25d.pipeline.convert",
        "Convert picks between the files of other programs: copick, CSV, RELION 4 and 5, IMOD and crYOLO.",
    ),
}


def main() -> None:
    """Run the command that the first word of the command line names; without one, list them all.

    An unknown command is one line on standard error, with exit status 2.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        sys.stdout.write(overview())
    elif name in ("--version", "-V"):
        sys.stdout.write(f"czii25d {installed_version()}\n")
    elif name in COMMANDS:
        command = COMMANDS[name]
        from czii25d.pipeline.app import run

        module, _, function = command.function.partition(":")
        run(
            getattr(import_module(f"czii25d.pipeline.{module}"), function),
            command.config,
            command.summary,
            program_words=2,
        )
    else:
        from czii25d.pipeline.app import one_line_errors

        found = f"'{name}'{did_you_mean(name, COMMANDS)}"
        with one_line_errors(name):
            raise InputError("command", f"one of {', '.join(COMMANDS)}", found, "see czii25d --help")


def overview() -> str:
    """Return what ``czii25d --help`` prints: the commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "czii25d COMMAND key=value ...",
            "Find protein particles in cryo-electron tomograms and say what each one is.",
            "",
            *lines,
            "",
            "czii25d COMMAND --help explains the command's keys; -m key=a,b sweeps; czii25d --version.",
            "",
        ]
    )


def installed_version() -> str:
    """Return the package's version, where it is installed."""
    try:
        return version("czii25d")
    except PackageNotFoundError:  # a checkout on the path
        return "(not installed)"
