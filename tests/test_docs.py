"""The documentation names files, sections and commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lorun_fast.apps import cli, models

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "csrc/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", without_code(page.read_text())):
        if target.startswith("http"):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def named_results(page: Path) -> set[str]:
    text, named = page.read_text(), r"\b(?:ops|layers|network|training-memory)-(?:cpu|cuda)-\d{8}-\d{6}\.csv"
    found = set()
    for match in re.finditer(rf"({named})|`(-[\d-]*\d{{6}}\.csv)`", text):
        whole, end = match.groups()
        if end is not None:  # the rest is that of the last file named before
            whole = re.findall(named, text[: match.start()])[-1][: -len(end)] + end
        found.add(whole)
    return found


def test_results_that_pages_name_are_recorded_and_no_others_of_a_cpu():
    recorded = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.csv")}
    named = set().union(*map(named_results, PAGES))
    assert named <= recorded
    assert {name for name in recorded - named if "-cuda-" not in name} == set()


def commands(page: Path) -> list[str]:
    """The page's lorun-fast commands, lines joined, variables in place, comments off."""
    lines = [line.strip() for line in page.read_text().replace("\\\n", " ").splitlines()]
    variables = dict(m.groups() for line in lines if (m := re.fullmatch(r'([A-Z])="(.*)"', line)))
    found = [re.sub(r"\s#.*", "", line) for line in lines if line.startswith("lorun-fast ") and "..." not in line]
    return [re.sub(r"\$([A-Z])\b", lambda m: variables[m[1]], line) for line in found]


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_a_command_parses(line):
    command, *words = shlex.split(re.sub(r"--steps N\b", "--steps 1", line))[1:]
    if command == "evaluate" and words[0] not in models.shipped():
        pytest.skip("its options are those of a network that is not here")
    task, words = cli._task_of(command, words) if command in cli._OF_A_TASK else (None, words)
    cli.build_parser(command, task).parse_args([command, *words])
