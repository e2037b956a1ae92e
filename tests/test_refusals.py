"""formats/refusals.txt: what a reader must refuse, and with which error. Its lines are born by make_refusals.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import second_decoder
import second_reader
from fuzz.base import ERRORS, attempt
from make_refusals import SOUND, cases, lines
from test_frames import error_of

import pqcodec

SPEC = (Path(__file__).parents[1] / "formats" / "SPEC.md").read_text()
REFUSALS = [(name, "" if error == SOUND else error, bytes.fromhex(data)) for name, error, data in map(str.split, lines())]
LISTS = {  # of numbered checks: what names of their examples begin with, and where a list begins
    "3.3-": "A decoder checks in this order",
    "II.5-open-": "A file is opened so:",
    "II.5-frame-": "A frame makes these errors",
    "II.5-tensor-": "A tensor makes these",
    "II.5-walk-": "Where the walk ends:",
}


def of_streams(name: str) -> bool:
    return name.startswith("3.3-")


@pytest.mark.parametrize(("error", "data"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_the_program_says_what_the_specification_does(request: pytest.FixtureRequest, error: str, data: bytes) -> None:
    if not of_streams(request.node.callspec.id):
        assert error_of(data) == error
        return
    for backend in ("reference", "cpu"):
        assert ERRORS[type(attempt(pqcodec.decode, data, backend=backend, fill=0)[1])] == error
        damage, refused = attempt(pqcodec.verify, data, backend=backend)
        assert (ERRORS[type(refused)] or ("corrupt" if damage else "")) == error


@pytest.mark.parametrize(("error", "data"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_readers_written_from_the_specification_say_it(request: pytest.FixtureRequest, error: str, data: bytes) -> None:
    if not of_streams(request.node.callspec.id):
        assert second_reader.refusal(data) == error
        return
    assert (second_decoder.refusal(data) or ("corrupt" if second_decoder.damage(data) else "")) == error


@pytest.mark.parametrize("begin", LISTS)
def test_every_numbered_check_has_an_example(begin: str) -> None:
    text = SPEC[SPEC.index(LISTS[begin]) :]
    numbered = re.search(r"\n\n((?:\d+\. .*\n(?: .*\n)*)+)", text)
    assert numbered
    numbers = {int(n) for n in re.findall(r"^(\d+)\. ", numbered[1], re.MULTILINE)}
    assert numbers == set(range(1, len(numbers) + 1))
    there = {int(name.removeprefix(begin).split("-")[0]) for name, *_ in REFUSALS if name.startswith(begin)}
    assert numbers <= there


def test_no_refusal_is_missing_or_there_twice() -> None:
    names = [name for name, *_ in REFUSALS]
    assert len(names) == len(set(names))
    assert {name for name, *_ in cases()} <= set(names)
