"""``thresher doctor``."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Cli
from thresher.cli import doctor


def test_everything_is_here(cli: Cli) -> None:
    done = cli("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "thresher.doctor/1"
    assert done.json["ok"] is True
    core = {p["name"]: p for p in done.json["packages"] if p["extra"] == "core"}
    assert {"torch", "onnxruntime", "rich"} <= set(core)
    assert all(p["fits"] and not p["remedy"] for p in core.values())
    assert {t["target"] for t in done.json["targets"]} >= {"cpu", "openvino"}
    assert done.json["machine"]["cores"] >= 1


def test_a_missing_core_package_is_an_environment_error(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.11", "nosuchpackage>=3"])
    done = cli("doctor")
    assert done.code == 4
    assert "pip install 'nosuchpackage>=3'" in done.out
    assert "cannot work here yet" in done.out


def test_a_missing_extra_is_named_with_its_command_and_is_no_error(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["torch>=2.11", 'nosuchpackage>=3; extra == "search"']
    monkeypatch.setattr(doctor, "requires", lambda name: asked)
    done = cli("doctor", "--json")
    assert done.code == 0
    missing = done.json["packages"][1]
    assert (missing["name"], missing["extra"]) == ("nosuchpackage", "search")
    assert missing["remedy"] == "pip install 'thresher[search]'"


def test_an_old_package_does_not_fit(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["rich>=1000"])
    done = cli("doctor", "--json")
    assert done.code == 4
    assert done.json["packages"][0]["fits"] is False


def test_what_is_not_for_this_platform_is_not_asked_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["torch>=2.11", 'nosuch>=3; sys_platform == "amiga" and extra == "gpu"']
    monkeypatch.setattr(doctor, "requires", lambda name: asked)
    assert [p["name"] for p in cli("doctor", "--json").json["packages"]] == ["torch"]
