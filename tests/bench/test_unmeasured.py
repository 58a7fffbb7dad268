"""Results that are computed name no device, and do not replace what was measured on one."""

import json
from pathlib import Path

import pytest
from common import command_line
from common import computed_result as unmeasured


def parser():
    made = command_line.Parser(prog="some.py")
    command_line.add_out(made)
    return made


def test_record_names_settings_and_versions_but_no_device(tmp_path, capsys):
    record = unmeasured.record("some", {"dtypes": ["float32"]})
    record["rows"].append({"kernel": "wkv", "instructions": 1 / 3})
    unmeasured.check(tmp_path / "new", "some", parser())
    unmeasured.write(tmp_path / "new", record)
    read = json.loads((tmp_path / "new" / "some.json").read_text())
    assert {"benchmark", "device", "versions", "commit", "settings", "rows"} <= set(read)
    assert read["device"] == {"type": "none", "name": "computed, nothing measured"}
    assert read["settings"] == {"dtypes": ["float32"]}
    assert read["rows"] == [{"kernel": "wkv", "instructions": 0.33333}]
    assert f"wrote {tmp_path / 'new' / 'some.json'}" in capsys.readouterr().out
    unmeasured.check(tmp_path / "new", "some", parser())  # its own file it may replace


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"device": {"name": "a GPU"}, "rows": []}', "was measured on 'a GPU'; choose another folder with --out"),
        ("[]", "is not a result of this program; choose another folder with --out"),
    ],
)
def test_other_results_are_not_replaced(content, message, tmp_path, capsys):
    (tmp_path / "some.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        unmeasured.check(tmp_path, "some", parser())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        unmeasured.check(tmp_path / "file" / "below", "some", parser())
    assert stopped.value.code == 2
    assert "cannot write into" in capsys.readouterr().err


def test_results_go_into_the_current_folder_unless_told():
    assert parser().parse_args([]).out == Path()
    assert parser().parse_args(["--out", "there"]).out == Path("there")
