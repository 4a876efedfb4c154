from __future__ import annotations

from pathlib import Path

import pytest

from czii25d.files import write_aside


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    with write_aside(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert listing(path.parent) == ["table.csv"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(error), write_aside(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "before"
    assert listing(tmp_path) == ["table.csv"]


def test_failure_removes_a_partial_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), write_aside(tmp_path / "run") as partial:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "chunk").write_text("half")
        _ = 1 / 0
    assert listing(tmp_path) == []


@pytest.mark.parametrize("before", ["file", "folder", "nothing"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_files_and_folders_replace_each_other(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "thing"
    if before == "file":
        path.write_text("before")
    elif before == "folder":
        path.mkdir()
        (path / "before").write_text("before")
    with write_aside(path) as partial:
        if after == "folder":
            partial.mkdir()
        (partial / "after" if after == "folder" else partial).write_text("after")
    assert listing(tmp_path) == ["thing"]
    assert listing(path) == ["after"] if after == "folder" else path.read_text() == "after"


def test_leftovers_of_a_killed_process_go_at_the_next_attempt(tmp_path: Path) -> None:
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / ".run.partial" / "half").write_text("half")
    with write_aside(tmp_path / "run") as partial:
        partial.mkdir()
        (partial / "whole").write_text("whole")
    assert listing(tmp_path) == ["run"] and listing(tmp_path / "run") == ["whole"]


def test_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".run.old").mkdir()
    (tmp_path / ".run.old" / "before").write_text("before")
    with pytest.raises(ValueError), write_aside(tmp_path / "run") as partial:
        partial.mkdir()
        raise ValueError
    assert listing(tmp_path) == ["run"] and listing(tmp_path / "run") == ["before"]


def test_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "precious").write_text("precious")
    (tmp_path / "run").symlink_to(target)
    with write_aside(tmp_path / "run") as partial:
        partial.mkdir()
    assert not (tmp_path / "run").is_symlink()
    assert listing(target) == ["precious"]
