"""Bytes that nobody wrote, for every parser; and edits of sound files, for every container.

    python -m tests.fuzz stream --seconds 60 --seed 0      or header, pqkv, safetensors, plain, zarr, zarr-cache
    python -m tests.fuzz stream --coding scalar --seconds 300      streams of one coding
    python -m tests.fuzz edits --container pqkv --count 100000      or safetensors, zarr, zarr-cache
    python -m tests.fuzz try plain FILE      one input
    python -m tests.fuzz seeds      writes the seeds that are not there yet to tests/data/fuzz

A target takes bytes; it returns or raises PQError. Anything else is a finding: another exception, two answers that
contradict each other, an error other than the specification's (header, pqkv), a hang, or memory out of proportion. An edit
must be refused, or change nothing that a reader tells.

Inputs come from a mutator that knows the formats and half of the time makes checksums hold again, so that what lies behind
them is reached. Where atheris is installed (``pip install atheris``) it measures coverage and chooses what to go on with;
otherwise, or with ``--engine plain``, an input that is refused in a new place is kept. Exit status 1: something was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .base import FOLDER
from .codings import CODINGS
from .damage import CONTAINERS, edits
from .seeds import seeds
from .sessions import ENGINES, Session, _engine, distil, warm
from .table import TARGETS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the readers of pqcodec.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in TARGETS:
        verb = verbs.add_parser(name, help=(TARGETS[name].read.__doc__ or "a reader of caches").splitlines()[0])
        verb.add_argument("--seconds", type=float, default=60)
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--corpus", type=Path, help="a folder of inputs to begin with and to add to")
        verb.add_argument("--findings", type=Path, default=Path("build/fuzz"), help="a folder for inputs that were found")
        verb.add_argument("--engine", choices=list(ENGINES), default=_engine())
        if name == "stream":
            verb.add_argument("--coding", choices=list(CODINGS), help="streams of this coding, their shared tables there, too")
    verb = verbs.add_parser("edits", help="random edits of a sound file")
    verb.add_argument("--container", choices=list(CONTAINERS), required=True)
    verb.add_argument("--count", type=int, default=100_000)
    verb.add_argument("--seed", type=int, default=0)
    verb = verbs.add_parser("try", help="one file through a target")
    verb.add_argument("target", choices=list(TARGETS))
    verb.add_argument("file", type=Path)
    verb = verbs.add_parser("distil", help="choose inputs of a folder to keep beside the tests")
    verb.add_argument("target", choices=list(TARGETS))
    verb.add_argument("--corpus", type=Path, required=True)
    verb.add_argument("--most", type=int, default=5)
    verbs.add_parser("seeds", help="write the seeds that are not there yet")
    given = parser.parse_args(arguments)
    if given.verb == "edits":
        result = edits(given.container, given.count, given.seed)
        print(json.dumps(result))
        return int(bool(result["faults"]))
    if given.verb == "try":
        warm(given.target)
        session = Session(given.target, strict=True)
        print(session.run(given.file.read_bytes()))
        return int(bool(session.found))
    if given.verb == "distil":
        distil(given.target, given.corpus, given.most)
        return 0
    if given.verb == "seeds":
        for name in TARGETS:
            (FOLDER / name).mkdir(parents=True, exist_ok=True)
            for file, data in seeds(name).items():
                if not (FOLDER / name / file).exists():
                    (FOLDER / name / file).write_bytes(data)
        return 0
    folder = given.corpus or Path(tempfile.mkdtemp(prefix="corpus-"))
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(given.verb, given.findings / given.verb, coding=getattr(given, "coding", None))
    ENGINES[given.engine](session, given.seconds, given.seed, folder)
    return int(bool(session.found))


if __name__ == "__main__":
    sys.exit(main())
