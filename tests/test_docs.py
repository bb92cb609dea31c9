"""What the documentation names exists: commands, flags, keys, make targets, links. What must not be there is not."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ich_pipeline import bundles, cli
from ich_pipeline.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "bundles/*/docs/*.md", "data_manifests/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
CONFIGS = ("inference", "train", "evaluate")


def commands_in(text: str) -> Iterator[str]:
    """`ich-pipeline` calls on lines of their own: in code blocks, and as examples in help texts."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(r"\s*(?:```\w*|\$|Example:)?\s*(ich-pipeline .*)", line)
        if found:
            yield found[1]


def written_commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        yield from ((page.relative_to(ROOT).as_posix(), each) for each in commands_in(page.read_text()))
    for function in (each.callback for each in cli_commands()):
        assert function is not None
        yield from ((f"help of {function.__name__}", each) for each in commands_in(function.__doc__ or ""))


def cli_commands() -> list[Any]:
    return [each for app in (cli.app, cli.data_app, cli.label_app) for each in app.registered_commands]


def parse(line: str) -> None:
    """Parse a call as the command line would, keys of bundles included, without running it.

    Raises:
        ConfigError: an unknown command, option, bundle, key, preset or variant, or a missing option.
    """
    _, *words = shlex.split(line, comments=True)
    if words[0].startswith("-"):
        return
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        name = words.pop(0)
        if name not in command.commands:
            raise ConfigError(f"no command {name}")
        command = command.commands[name]
    try:
        params = command.make_context(name, words).params
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own refusal
            raise ConfigError(error.format_message()) from error
        raise
    given = bundles.parse_overrides([word for word in params.get("words", ()) if "=" in word])
    defaults = bundles.read_yaml(ROOT / "configs" / "run.yaml")
    own = {key: given.pop(key) for key in list(given) if key in defaults}
    bundle = str(own.get("bundle", "cascade3d"))
    # A trained bundle's folder, or a registered model, has the keys of the bundle it is named after.
    stages = {each.name: each for p in ROOT.glob("bundles/*/*/configs") for each in [bundles.Bundle(p.parent)]}
    named = next((each for each in (*bundles.all_bundles(), *stages) if each in re.split("[/@]", bundle)), bundle)
    if str(given.get("variant")).endswith(".yaml"):
        del given["variant"]  # a plan, which the reader has made
    found = stages.get(named) or (
        bundles.find_stage(named, own["stage"]) if own.get("stage") else bundles.find_bundle(named)
    )
    # One that needs no weights has no configs of training.
    bundles.resolve(found, [each for each in CONFIGS if each in found.config_names], given, own.get("preset"))


@pytest.mark.parametrize(("where", "line"), sorted(set(written_commands())))
def test_a_written_command_is_accepted(where: str, line: str) -> None:
    parse(line)


def test_the_readme_shows_the_main_commands() -> None:
    shown = {shlex.split(line)[1] for line in commands_in((ROOT / "README.md").read_text())}
    assert shown >= {"train", "evaluate", "volume"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("ich-pipeline trian bundle=cascade3d", "no command trian"),
        ("ich-pipeline volume scans/ --output volumes.csv", "--output"),
        ("ich-pipeline segment scans/", "--out"),
        ("ich-pipeline train bundle=cascade3d epoch=5", "no key 'epoch'"),
        ("ich-pipeline train bundle=cascade3d preset=tpu", "no preset 'tpu'"),
        ("ich-pipeline train bundle=no_such_bundle", "no bundle 'no_such_bundle'"),
    ],
)
def test_a_wrong_command_would_be_seen(line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(line)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for page in PAGES for target in re.findall(r"(?:^ +|`)make ([a-z]+)", page.read_text(), re.MULTILINE)
    }
    assert named - targets == set()
    assert named >= {"setup", "demo", "test", "check"}


def links_of(text: str) -> list[str]:
    """Relative targets of Markdown links and pictures, without anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert [link for link in links_of(page.read_text()) if not (page.parent / link).exists()] == []


def test_links_are_found() -> None:
    text = "[a](b.md) ![c](d/e.png) [f](https://g.org) [h](#i) [j](k.md#l)\n```\n[m](n)\n```"
    assert links_of(text) == ["b.md", "d/e.png", "k.md"]


def test_every_page_of_docs_is_in_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - set(links_of((ROOT / "docs" / "README.md").read_text())) == set()


# Folders of one machine, and secrets by the form that their issuers give them.
PRIVATE = re.compile(
    r"(?<![\w.}])/(?:home|Users)/(?!doe\b)\w+|(?<![\w.}])/(?:root)/\w+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_\w{36}\b|\bhf_\w{34}\b|\bglpat-[\w-]{20}\b"
)


def test_no_committed_file_names_a_machine_or_a_secret() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = {}
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path != Path(__file__):
            hits = PRIVATE.findall(path.read_bytes().decode("utf-8", "ignore"))
            found.update({name: hits} if hits else {})
    assert found == {}


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("see /home/anna/scans", True),
        ("'/Users/anna'", True),
        ("open('/{}/x')".format("root"), True),
        ("-----BEGIN RSA PRIVATE KEY-----", True),
        ("key=AKIA" + "A" * 16, True),
        ("token ghp_" + "a" * 36, True),
        ("/home/doe, who is nobody", False),
        ("../home/anna", False),
        ("https://x.org/home/page", False),
    ],
)
def test_what_is_private_is_known(text: str, private: bool) -> None:
    assert bool(PRIVATE.search(text)) == private
