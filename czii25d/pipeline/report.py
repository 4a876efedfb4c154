"""23: show what was picked, or how a training went, on one page."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from omegaconf import DictConfig

from czii25d.files import write_aside
from czii25d.pipeline.page import Album, render
from czii25d.pipeline.picks_report import picks_page

logger = logging.getLogger(__name__)


def write_report(cfg: DictConfig) -> Path:
    """Write ``report/report.html``, with its pictures beside it, into the folder of predictions, or of a training.

    Returns
    -------
    path
        Of the page. It needs no other file and no network.

    Raises
    ------
    InputError
        If there are no picks or no training, or a tomogram is not where it was.
    """
    begin = time.perf_counter()
    if cfg.training is None:
        page = picks_page(cfg)
    else:
        from czii25d.pipeline.training_report import training_page  # with torch, which picks do without

        page = training_page(cfg)
    target = page.folder / "report"
    with write_aside(target) as partial:
        partial.mkdir()
        (partial / "report.html").write_text(render(page.build(Album(partial))), encoding="utf-8")
    logger.info("%s: %.0f s", target / "report.html", time.perf_counter() - begin)
    return target / "report.html"
