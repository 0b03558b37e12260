"""Which config file a name means, in a checkout."""

from pathlib import Path

import pytest

from deit_jax import __main__ as program
from deit_jax import configs
from deit_jax.config.files import locate, shipped

ROOT = Path(__file__).parent.parent


def test_a_checkouts_configs_are_those_of_the_folder():
    assert {p.name for p in (ROOT / "configs").glob("[!_]*.py")} == set(shipped())
    assert Path(configs.__path__[0]) == ROOT / "configs"


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("deit.py", True),
        ("configs/deit.py", True),
        ("there/configs/deit.py", False),
        ("mine.py", False),
        ("base", False),
        ("", False),
    ],
)
def test_where_there_is_no_such_file_a_name_means_the_one_that_is_shipped(
    tmp_path, monkeypatch, name, ours
):
    monkeypatch.chdir(tmp_path)
    expected = str(ROOT / "configs/deit.py") if ours else name
    assert locate(name) == expected
    (tmp_path / "deit.py").write_text("")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/deit.py").write_text("")
    assert locate(name) == name  # what is there is meant as it is given


def test_a_name_that_is_neither_is_told_with_those_that_there_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.main(["inspect", "--config=diet.py", "--out=sheet.png"]) == 2
    message = capsys.readouterr().err
    assert "--config=diet.py: no such file below" in message
    assert "deit.py" in message
    assert "quickstart.py" in message
