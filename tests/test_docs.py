"""The command lines of the documents parse: commands, options, recipes and fields exist."""

import argparse
import importlib
import pathlib
import re
import shlex

import pytest

from mae_jax.config import FIELDS
from tests.program import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines(document):
    """(file that is run, its arguments) of every line of bash that runs one of ours."""
    for block in re.findall(r"```(?:bash|console|sh)\n(.*?)```", document.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for at, word in enumerate(words):
                if words[at : at + 2] == ["python", "-m"] and words[at + 2].startswith("mae_jax."):
                    yield words[at + 2], words[at + 3 :]
                elif word.startswith("launch/") and word.endswith(".py") and "python" in words:
                    yield word, words[at + 1 :]  # the command after -- comes by itself


class ParsedError(Exception):
    pass


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(document, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments):
        parse(self, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for program, arguments in command_lines(document):
        if "..." in " ".join(arguments):
            continue
        if program.startswith("launch/"):
            monkeypatch.syspath_prepend(ROOT / "launch")
            module = importlib.import_module(pathlib.Path(program).stem)
        else:
            module = importlib.import_module(program)
        monkeypatch.setattr("sys.argv", [program, *arguments])
        with pytest.raises(ParsedError):
            module.main() if program.startswith("launch/") else module.main(arguments)
        for argument in arguments:
            if recipe := re.fullmatch(r"--config=(configs/[^:]*)(:.*)?", argument):
                assert (ROOT / recipe[1]).exists(), argument
            if field := re.match(r"--(?:no)?config\.([^=]*)", argument):
                assert field[1] in FIELDS, argument
