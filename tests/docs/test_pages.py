"""The pages of docs/ run as they stand, name files that exist, and are all in the menu."""

import re

import pages
import pytest
import torch

WITH_CODE = [page for page in pages.PAGES if page.startswith("docs/") and pages.blocks(page)]
NEEDS = {"docs/migration.md": ["accelerated_scan", "transformers"]}


def test_pages_with_code_are_those_that_have_some():
    assert WITH_CODE == ["docs/guide.md", "docs/index.md", "docs/migration.md", "docs/tutorial.md"]


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_runs_block_after_block(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    CHECKS[page](pages.run(page))
    assert list(tmp_path.iterdir()) == []


def check_guide(names):
    assert names["outputs"].shape == (2, 100, 64)
    assert names["h"].shape == (4, 612, 64, 2)
    assert names["state"].att_x.shape == (2, 2, 64)


def check_index(names):
    assert names["k"].shape == names["h"].shape == (2, 1000, 64)


def check_migration(names):
    assert names["texts"].shape == (3, 12)
    assert names["y"].shape == (2, 50, 8)
    state, states = torch.zeros(2, 8, 4), []  # Mamba's recurrence by its formula
    for t in range(50):
        delta = names["delta"][:, t, :, None]
        state = (delta * names["A"]).exp() * state + delta * names["into"][:, t, None] * names["x"][:, t, :, None]
        states.append((state * names["out"][:, t, None]).sum(2))
    torch.testing.assert_close(names["y"], torch.stack(states, 1), rtol=1e-4, atol=1e-5)
    assert_filtered(names)


def assert_filtered(names):
    signal, filtered = names["signal"], names["filtered"]
    wanted = 0.2 * signal[:, 1:] + 0.3 * signal[:, :-1] + 0.5 * filtered[:, :-1]
    torch.testing.assert_close(filtered[:, 1:], wanted)
    average = 0.9 * names["average"][:, :-1] + (1 - 0.9) * signal[:, 1:]
    torch.testing.assert_close(names["average"][:, 1:], average)
    torch.testing.assert_close(names["average"][:, 0], signal[:, 0])
    later = torch.where(names["done"][:, :-1], 0.0, 0.99 * names["returns"][:, 1:])
    torch.testing.assert_close(names["returns"][:, :-1], names["reward"][:, :-1] + later)


def check_tutorial(names):
    assert names["right"] > 0.95  # 0.125 by guessing
    assert names["losses"][-1] < 0.6 * names["losses"][0]
    assert len(names["written"]) == 40
    assert len(names["more"]) == 20


CHECKS = {f"docs/{name}.md": globals()[f"check_{name}"] for name in ("guide", "index", "migration", "tutorial")}


@pytest.mark.parametrize("page", pages.PAGES)
def test_files_that_are_named_exist(page):
    assert pages.missing(page) == []


def test_every_page_is_in_the_menu():
    menu = re.findall(r"(\S+\.md)$", (pages.ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    there = {str(path.relative_to(pages.ROOT / "docs")) for path in (pages.ROOT / "docs").rglob("*.md")}
    assert sorted(menu) == sorted(there)
