"""``dflow completion``: what a shell offers when the tab key is pressed, read off the parser of all verbs."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from dflow import recipes, shipped
from dflow.cli.flags import Verbs, argument

#: Arguments that take a file or a folder, by their names.
FILES = ("auxiliary", "data", "file", "files", "output", "prime", "prompt_file", "recipe", "text", "_modules")
FOLDERS = ("draft", "folder", "init", "model", "models", "runs")
#: Those that also take the name of a model that comes with dflow.
MODELS = ("draft", "init", "model", "models")


@dataclass(kw_only=True)
class Completion:
    """Print a script for the tab key: verbs, flags, recipes.

    In ~/.bashrc: `source <(dflow completion bash)`; in ~/.zshrc, behind compinit: `source <(dflow completion
    zsh)`; in ~/.config/fish/config.fish: `dflow completion fish | source`.
    """

    shell: Literal["bash", "zsh", "fish"] = argument("shell that reads the script: bash, zsh or fish")


@dataclass(frozen=True)
class Values:
    """What an argument takes.

    Attributes:
        words: pairs of a word and what it means.
        place: "file", "folder", or "" for neither; without words either it is anything, like a number.
    """

    words: tuple[tuple[str, str], ...] = ()
    place: str = ""


@dataclass(frozen=True)
class Option:
    """A flag: its names, what it means, and what it takes; None for a switch."""

    names: tuple[str, ...]
    about: str
    values: Values | None


@dataclass(frozen=True)
class Entry:
    """What may follow some words after ``dflow``: flags, and what the positional arguments take."""

    words: tuple[str, ...]
    options: tuple[Option, ...]
    values: Values


def completion(flags: Completion) -> int:
    """`dflow completion`."""
    from dflow.cli.parser import build_parser

    print(SHELLS[flags.shell](list(entries(build_parser()))), end="")
    return 0


def entries(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Entry]:
    """The entries of a parser and of all parsers below it."""
    options, values = list[Option](), Values()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = [(str(choice.dest), brief(choice.help or "")) for choice in action._choices_actions]
            values = Values(tuple(below))
            for word, inner in action.choices.items():
                yield from entries(inner, (*words, word))
        elif action.option_strings:
            takes = None if action.nargs == 0 else values_of(action, words)
            options.append(Option(tuple(action.option_strings), brief(action.help or ""), takes))
        else:
            values = values_of(action, words)
    yield Entry(words, tuple(options), values)


def values_of(action: argparse.Action, verb: tuple[str, ...]) -> Values:
    """What an argument takes, by its name and, where it has choices, by these."""
    metavar = str(action.metavar)
    if "|" in metavar:
        return Values(tuple((word, "") for word in metavar.split("|")))
    if (action.dest, *verb) == ("recipe", "train"):
        return Values(tuple((name, recipes.about(name)) for name in recipes.trainable()), "file")
    if (action.dest, *verb) == ("name", "recipes"):
        return Values(tuple((name, recipes.about(name)) for name in recipes.names()))
    if action.dest in MODELS:
        return Values(tuple((name, "comes with dflow") for name in shipped.names()), "folder")
    if action.dest in FILES:
        return Values(place="file")
    return Values(place="folder" if action.dest in FOLDERS else "")


def brief(text: str) -> str:
    """The beginning of a help text.

    >>> brief("number of rows; 100%% of them (default: all)")
    'number of rows'
    """
    return re.split(r" \(|[;:]", text.replace("%%", "%"), maxsplit=1)[0]


def _groups(every: list[Entry]) -> list[str]:
    """The verbs that have verbs of their own."""
    return sorted({entry.words[0] for entry in every if len(entry.words) == 2})


_BASH = """\
# Completion of dflow, written by `dflow completion bash`.
_dflow() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} verb= options words place
    # In --split=te the sign is a word of its own.
    [[ $previous == = ]] && previous=${COMP_WORDS[COMP_CWORD-2]}
    [[ $current == = ]] && current=
    ((COMP_CWORD > 1)) && verb=${COMP_WORDS[1]}
    case $verb in
        GROUPS) ((COMP_CWORD > 2)) && verb="$verb ${COMP_WORDS[2]}";;
    esac
    case $verb in
CASES
    esac
    [[ $current == -* && $options ]] && words=$options place=
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    local IFS=$'\\n'
    case $place in
        file) COMPREPLY+=($(compgen -f -- "$current"));;
        folder) COMPREPLY+=($(compgen -d -- "$current"));;
    esac
    # A folder gets a slash behind it, and no space.
    [[ $place ]] && compopt -o filenames 2>/dev/null
    return 0
}
complete -F _dflow dflow
"""

_ZSH = """\
#compdef dflow
# Completion of dflow, written by `dflow completion zsh`.
_dflow() {
    local current=$words[CURRENT] previous=$words[CURRENT-1] verb= place=
    local -a options choices
    if [[ $current == --*=* ]]; then
        previous=${current%%=*}
        compset -P '*='
        current=${current#*=}
    fi
    ((CURRENT > 2)) && verb=$words[2]
    case $verb in
        GROUPS) ((CURRENT > 3)) && verb="$verb $words[3]";;
    esac
    case $verb in
CASES
    esac
    if [[ $current == -* ]] && (($#options)); then
        _describe -o flag options
        return
    fi
    (($#choices)) && _describe word choices
    case $place in
        file) _files;;
        folder) _files -/;;
    esac
}
if [[ $funcstack[1] == _dflow ]]; then
    _dflow "$@"
else
    compdef _dflow dflow
fi
"""

_FISH = """\
# Completion of dflow, written by `dflow completion fish`.
function __dflow_at --description 'whether the words behind dflow are these, or begin so'
    set -l words (commandline -opc)
    set -l last (math 1 + (count $argv))
    test "$words[2..$last]" = "$argv"
end
function __dflow_behind --description 'whether the words behind dflow are these, and no others'
    test (commandline -opc | string join ' ') = (string join ' ' dflow $argv)
end
complete -c dflow -f
"""


def _filled(
    script: str, every: list[Entry], options: Callable[[Entry], str], values: Callable[[Values], str]
) -> str:
    """A script of bash or zsh with its cases: what each verb takes, and in them what each flag takes."""
    lines = []
    for entry in every:
        lines.append(f"        {shlex.quote(' '.join(entry.words))})")
        lines.append(f"            options={options(entry)} {values(entry.values)}")
        lines.append("            case $previous in")
        names: dict[Values, list[str]] = {}
        for option in entry.options:
            if option.values is not None:
                names.setdefault(option.values, []).extend(option.names)
        no_options = options(Entry((), (), Values()))
        for taken, flags in names.items():
            lines.append(f"                {'|'.join(flags)}) options={no_options} {values(taken)};;")
        lines.append("            esac;;")
    return script.replace("GROUPS", "|".join(_groups(every))).replace("CASES", "\n".join(lines))


def bash(every: list[Entry]) -> str:
    """The script for bash, version 3.2 or newer."""

    def options(entry: Entry) -> str:
        return shlex.quote(" ".join(name for option in entry.options for name in option.names))

    def values(of: Values) -> str:
        return f"words={shlex.quote(' '.join(word for word, _ in of.words))} place={of.place}"

    return _filled(_BASH, every, options, values)


def zsh(every: list[Entry]) -> str:
    """The script for zsh."""

    def described(pairs: list[tuple[str, str]]) -> str:
        escaped = [(word.replace(":", r"\:"), about) for word, about in pairs]
        return "(" + " ".join(shlex.quote(":".join(filter(None, pair))) for pair in escaped) + ")"

    def options(entry: Entry) -> str:
        return described([(name, option.about) for option in entry.options for name in option.names])

    def values(of: Values) -> str:
        return f"choices={described(list(of.words))} place={of.place}"

    return _filled(_ZSH, every, options, values)


def fish(every: list[Entry]) -> str:
    """The script for fish."""
    lines = []
    for entry in every:
        words = " ".join(entry.words)
        exact = not entry.words or words in _groups(every)
        here = f"complete -c dflow -n '__dflow_{'behind' if exact else 'at'} {words}'"
        lines += [f"{here} {taken}" for taken in _taken_in_fish(entry.values)]
        for option in entry.options:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
            )
            start = f"{here} {names} -d {_fish_quoted(option.about)}"
            ends = [""] if option.values is None else _taken_in_fish(option.values)
            lines += [f"{start} {end}".rstrip() for end in ends]
    return _FISH + "\n".join(lines) + "\n"


def _taken_in_fish(values: Values) -> list[str]:
    """Ends of `complete` commands, which offer these values."""
    ends = [f"-x -a {_fish_quoted(word)} -d {_fish_quoted(about)}" for word, about in values.words if about]
    if plain := " ".join(word for word, about in values.words if not about):
        ends.append(f"-x -a '{plain}'")
    ends += {"file": ["-rF"], "folder": ["-x -a '(__fish_complete_directories)'"], "": []}[values.place]
    return ends or ["-x"]


def _fish_quoted(text: str) -> str:
    r"""A text in quotes of fish.

    >>> print(_fish_quoted("the model's"))
    'the model\'s'
    """
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[list[Entry]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}

VERBS: Verbs = (("completion", Completion, completion, "dflow completion bash"),)
