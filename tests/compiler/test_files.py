"""Artefacts appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from thresher.compiler.errors import UsageError
from thresher.compiler.files import atomic_file, atomic_folder, check_free


def write(folder: Path, text: str = "new") -> None:
    (folder / "manifest.json").write_text(text)


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with atomic_folder(final) as partial:
        write(partial)
        assert not final.exists()
    assert (final / "manifest.json").read_text() == "new"
    assert [entry.name for entry in final.parent.iterdir()] == ["out"]


def write_and_fail(folder: Path, failure: BaseException | type[BaseException]) -> None:
    with atomic_folder(folder, overwrite=True) as partial:
        write(partial)
        raise failure


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises((KeyboardInterrupt, ValueError, UsageError)):
        write_and_fail(tmp_path / "out", failure)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"cannot write .*out: No space left on device"),
        atomic_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_found_behind_torchs_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 0

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(UsageError, match="no space left"), atomic_folder(tmp_path / "out"):
        raise RuntimeError("PytorchStreamWriter failed writing file")


def test_an_unreadable_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out"):
        (tmp_path / "absent").read_text()


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    write(tmp_path, "old")
    with pytest.raises(UsageError, match="exists already"), atomic_folder(tmp_path):
        pytest.fail("the block must not run")
    assert (tmp_path / "manifest.json").read_text() == "old"


def test_overwriting_replaces_our_own_folder_only(tmp_path: Path) -> None:
    ours, foreign = tmp_path / "ours", tmp_path / "foreign"
    ours.mkdir()
    foreign.mkdir()
    write(ours, "old")
    (foreign / "thesis.tex").write_text("years")
    with atomic_folder(ours, overwrite=True) as partial:
        write(partial)
    assert (ours / "manifest.json").read_text() == "new"
    with (
        pytest.raises(UsageError, match="not written by thresher"),
        atomic_folder(foreign, overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert (foreign / "thesis.tex").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"ours", "foreign"}


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    write(ours, "old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(ours, KeyboardInterrupt())
    assert (ours / "manifest.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


def test_a_failed_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    write(ours, "old")
    rename = Path.rename

    def fail_for_partial(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with (
        pytest.raises(UsageError, match="Input/output"),
        atomic_folder(ours, overwrite=True) as partial,
    ):
        write(partial)
    assert (ours / "manifest.json").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        write(partial)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file, not a folder"):
        check_free(tmp_path / "file", overwrite=True)
    with (
        pytest.raises(UsageError, match="cannot write"),
        atomic_folder(tmp_path / "file" / "below"),
    ):
        pytest.fail("the block must not run")


def write_file_and_fail(file: Path) -> None:
    with atomic_file(file) as partial:
        partial.write_text("two")
        raise KeyboardInterrupt


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "report.html"
    with atomic_file(final) as partial:
        partial.write_text("one")
        assert not final.exists()
    with pytest.raises(KeyboardInterrupt):
        write_file_and_fail(final)
    assert final.read_text() == "one"
    assert [entry.name for entry in final.parent.iterdir()] == ["report.html"]
    with pytest.raises(UsageError, match="exists already"), atomic_file(final, overwrite=False):
        pytest.fail("the block must not run")
    with pytest.raises(UsageError, match="is a folder"), atomic_file(tmp_path):
        pytest.fail("the block must not run")
