"""Building what is compiled, and doing without it."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from sagellm_common.core.errors import ConfigError
from sagellm_common.prefix_reuse import native
from sagellm_common.prefix_reuse.holder_table import NativeTable, PythonTable
from sagellm_common.prefix_reuse.index import make_table
from sagellm_common.prefix_reuse.native import __main__ as command


def test_where_it_was_not_built_the_log_says_how(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "absent.so")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_table(10, threading.Lock()), PythonTable)
    assert "python -m sagellm_common.prefix_reuse.native" in caplog.text


def test_another_byte_order_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if native.library() is None:
        pytest.skip("needs the compiled index: python -m sagellm_common.prefix_reuse.native")
    assert isinstance(make_table(10, threading.Lock()), NativeTable)
    big_endian = MagicMock(sage_index_usable=MagicMock(return_value=0))
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: big_endian)
    with caplog.at_level(logging.WARNING):
        assert native.library.__wrapped__() is None
    assert "no little-endian machine" in caplog.text


def test_the_command_prints_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if native.library() is None:
        pytest.skip("needs a C++ compiler: install g++ or set CXX")
    monkeypatch.setattr(sys, "argv", ["native"])
    command.main()
    assert capsys.readouterr().out.strip() == str(native.library_path())


@pytest.mark.parametrize(("arguments", "code"), [([], 1), (["--optional"], 0)])
def test_without_a_compiler_python_does_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    def fails() -> Path:
        raise ConfigError("no C++ compiler found")

    monkeypatch.setattr(command, "build", fails)
    monkeypatch.setattr(sys, "argv", ["native", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == code
    assert "Python does them: no C++ compiler found" in capsys.readouterr().err
