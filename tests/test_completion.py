"""What the tab key offers: the scripts of `dflow completion`, run by the shells themselves."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dflow import recipes
from dflow.cli import VERBS, build_parser, main
from dflow.cli.completion import FILES, FOLDERS, SHELLS, entries

pytestmark = pytest.mark.slow

#: Calls the function of the script for the words "$@", and prints what it offers.
ASK = {
    "bash": """
        source ./script
        ask() { COMP_WORDS=(dflow "$@"); COMP_CWORD=$#; _dflow; printf '%s\\n' "${COMPREPLY[@]}"; }
    """,
    # The completion system of zsh only runs in a terminal: what the function hands to it is printed instead.
    "zsh": """
        compdef() { true }
        compset() { true }
        _describe() { local -a pairs=(${(P)@[-1]}); print -rl -- ${(M)${pairs%%:*}:#$current*} }
        _files() { [[ $1 == -/ ]] && print -rl -- $current*(N/) || print -rl -- $current*(N) }
        source ./script
        ask() { local -a words=(dflow "$@"); local CURRENT=$#words; _dflow }
    """,
    "fish": """
        source ./script
        function ask; complete -C "dflow $(string join ' ' -- $argv)" | string split -f 1 \\t; end
    """,
}


def offered(shell: str, *lines: list[str]) -> list[set[str]]:
    """What a shell offers for each line, whose last word is the one that is written."""
    calls = "\n".join(f"ask {shlex.join(words)}; echo @@" for words in lines)
    done = subprocess.run([shell, "-c", f"{ASK[shell]}\n{calls}"], capture_output=True, text=True, check=True)
    assert not done.stderr
    parts = done.stdout.split("@@\n")[:-1]
    return [{word.strip().rstrip("/") for word in part.splitlines() if word.strip()} for part in parts]


@pytest.fixture(params=SHELLS)
def shell(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:  # fmt: skip
    """A shell that is installed, in a folder with its script, a recipe and a folder of a model."""
    name = str(request.param)
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    assert main(["completion", name]) == 0
    Path("script").write_text(capsys.readouterr().out, encoding="utf-8")
    Path("mine.yaml").touch()
    Path("trained").mkdir()
    return name


def test_words_flags_choices_recipes_and_folders(shell: str) -> None:
    cases = {
        "tra": {"train"},
        "data l": {"list"},
        "data check --fo": {"--folder"},
        "evaluate --sp": {"--split"},
        "evaluate --split ": {"train", "valid", "test", "all"},
        "evaluate --split v": {"valid"},
        "evaluate --split train --thr": {"--threads"},
        "evaluate --limit ": set[str](),
        "completion ": set(SHELLS),
        "check ": {"mine.yaml", "script", "trained"},
        "evaluate --model tr": {"trained"},
        "plot training tr": {"trained"},
        "compress m": {"mine.yaml"},
        "train ptb/ng": {"ptb/ngram"},
        "train ": {"mine.yaml", "trained", "script", *recipes.trainable()},
        "recipes accelerate/g": {"accelerate/gpus8"},
    }
    assert dict(zip(cases, offered(shell, *[line.split(" ") for line in cases]), strict=True)) == cases


def test_all_verbs_and_flags(shell: str) -> None:
    every = [entry for entry in entries(build_parser()) if len(entry.words) > 0]
    expected = [{name for option in entry.options for name in option.names} for entry in every]
    # A shell writes a short flag only where one dash stands there.
    expected = [{name for name in names if name.startswith("--")} for names in expected]
    assert offered(shell, *[[*entry.words, "--"] for entry in every]) == expected
    [verbs] = offered(shell, [""])
    assert verbs - {"--help", "--version", "-h"} == {verb.split()[0] for verb, *_ in VERBS}


def test_a_value_behind_a_sign(shell: str) -> None:
    words = ["evaluate", "--split", "=", "v"] if shell == "bash" else ["evaluate", "--split=v"]
    [choices] = offered(shell, words)
    assert choices in ({"valid"}, {"--split=valid"})


def test_every_text_that_a_verb_takes_is_a_place_or_has_words_or_is_free() -> None:
    """A new flag that names a file or a folder gets a line in the lists of `completion`."""
    places = ("file", "folder", "path")
    for entry in entries(build_parser()):
        for option in entry.options:
            if option.values and not (option.values.place or option.values.words):
                assert option.about.split()[0] not in places, (entry.words, option.names)
    assert not set(FILES) & set(FOLDERS)
