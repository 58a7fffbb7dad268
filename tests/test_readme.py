"""The README is one page: its code runs as it stands, and its tables are those of the committed results."""

import os
import subprocess
import sys

import pages
import pytest


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_code_runs_block_after_block(elsewhere):
    names = pages.run("README.md")
    assert names["y"].shape == names["h"].shape == names["z"].shape == (8, 1024, 768)
    assert names["carried"].shape == (8, 256)
    assert 0 <= int(names["token"]) < 256


def test_files_that_are_named_exist():
    assert pages.missing("README.md") == []


def test_it_is_one_page():
    assert 450 <= len(pages.prose("README.md").split()) <= 700
    assert sum(len(block.strip().splitlines()) for block in pages.blocks("README.md")) <= 25


def test_first_screen_says_what_has_not_been_measured():
    above, _, below = pages.text("README.md").partition("![")
    assert "**No GPU has measured it yet.**" in above
    commands, _, _ = below.partition("\n## ")
    assert "    make curve " in commands
    assert "    make test " in commands


def test_tables_of_all_pages_are_those_of_committed_results(tmp_path):
    """In a process of its own, since the program takes bench/ into its path."""
    program = str(pages.ROOT / "docs/tools/tables.py")
    done = subprocess.run([sys.executable, program, "--check"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
