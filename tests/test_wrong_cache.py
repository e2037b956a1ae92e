"""Random sequences of what people do around a store, a model and a disk: every answer is the model's own, or a refusal.

CI runs ``SEQUENCES`` of them; ``python tests/test_wrong_cache.py 2000 [first seed]`` runs as many as are asked for, and prints
those that went wrong with their actions.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sampled

from pqcodec.errors import PQError
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.store import PrefixStore

transformers = pytest.importorskip("transformers")
from families import build  # noqa: E402

SEQUENCES, ACTIONS = 40, 14
FAMILIES = ("llama", "gemma3_text", "qwen3_next")
TOLERANCE, COARSE = 2e-3, 0.15  # of logits: in float32, and under autocast to bfloat16; what is changed here changes them more
ASKED = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
TROUBLE = (PQError, OSError, sqlite3.Error)  # what a call by hand may raise, but ``generate`` only a refusal


class WrongCache(AssertionError):
    pass


class User:
    """One sequence: a model of its own, a store in a folder of its own, and conversations that go on."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.model = copy.deepcopy(build(self.random.choice(FAMILIES)))
        self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.folder, self.done = folder, []  # type: Path, list[str]
        self.autocast = False
        self.undo: list[Callable[[], None]] = []
        self.prompts = [self.ids(self.random.choice([40, 250, 300, 520]))]
        self.quota: int | None = None
        self.store = self.opened()
        self.asked = self.refused = self.found = 0

    # -- what is asked ---------------------------------------------------------------------------------------------
    def ids(self, tokens: int) -> torch.Tensor:
        return torch.tensor([[self.random.randrange(3, 100) for _ in range(tokens)]])

    def opened(self) -> PrefixStore:
        return PrefixStore(self.folder / "store", preset="exact", max_bytes=self.quota)

    def prompt(self) -> torch.Tensor:
        """A conversation that goes on, is asked again, branches, or begins."""
        ids, kind = self.random.choice(self.prompts), self.random.random()
        if kind < 0.4:
            ids = torch.cat([ids, self.ids(self.random.randrange(1, 60))], 1)
        elif kind < 0.6:
            ids = torch.cat([ids[:, : self.random.randrange(1, ids.shape[1])], self.ids(self.random.randrange(1, 40))], 1)
        elif kind < 0.7:
            ids = self.ids(self.random.choice([3, 100, 257, 300]))
        return ids if ids.shape[1] < 700 else ids[:, :300]

    @contextmanager
    def running(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def check(self, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        error = float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
        if not error <= (COARSE if self.autocast else TOLERANCE):
            raise WrongCache(f"{what}: the logits' relative error is {error:.2g}")

    def generate(self) -> None:
        ids, options = self.prompt(), dict(ASKED)
        options |= self.random.choice(
            [{}, {}, {}, {"num_beams": 2}, {"repetition_penalty": 1.2}, {"output_hidden_states": True}]
        )
        with self.running(), torch.inference_mode(self.random.random() < 0.2):
            try:
                found = self.store.generate(self.model, ids, wait=self.random.random() < 0.7, **options)
            except PQError as refusal:
                self.refused += 1
                self.done.append(f"({refusal!s:.60})")
                return
            expected = self.model.generate(ids, **options)
        self.asked += 1
        self.check(found.logits[0][:1], expected.logits[0][:1], "generate")
        if torch.equal(found.sequences, expected.sequences):
            for x, y in zip(found.logits, expected.logits, strict=True):
                self.check(x, y, "generate")
        self.prompts = [*self.prompts, found.sequences[:1].clone()][-3:]

    def by_hand(self) -> None:
        """Get, feed the rest, put."""
        ids = self.prompt()
        with self.running(), torch.no_grad():
            try:
                cache, length = self.store.get(self.model, ids)
            except TROUBLE:
                self.refused += 1
                return
            self.found += bool(length)
            name = tc.argument_of(self.model)
            found = self.model(input_ids=ids[:, length:], **{name: cache}).logits[:, -1]
            self.check(found, self.model(input_ids=ids).logits[:, -1], f"by hand from {length} of {ids.shape[1]}")
            self.asked += 1
            try:
                self.store.put(self.model, ids, cache, wait=self.random.random() < 0.7)
            except TROUBLE:
                self.refused += 1

    # -- what is changed -------------------------------------------------------------------------------------------
    def edit_weights(self) -> None:
        name, weight = self.random.choice([(n, p) for n, p in self.model.named_parameters() if p.ndim > 1])
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(self.random.randrange(1000))) * weight.std()
        how = self.random.choice(["add to .data", "replace .data", "add", "load"])
        if how == "add to .data":
            weight.data += noise
        elif how == "replace .data":
            weight.data = weight.data + noise
        elif how == "add":
            with torch.no_grad():
                weight.add_(noise)
        else:
            self.model.load_state_dict({**self.model.state_dict(), name: weight.detach() + noise})
        self.done.append(f"({how}, {name})")

    def restore_weights(self) -> None:
        for name, tensor in self.model.state_dict().items():
            tensor.data.copy_(self.weights[name])

    def number(self) -> None:
        """A number that is neither a weight nor in the config."""
        found = []
        for module in self.model.modules():
            found += [(module, name) for name in ("variance_epsilon", "eps", "scaling") if name in vars(module)]
            found += [(module, name) for name in module._buffers if name == "inv_freq"]
        module, name = self.random.choice(found)
        before = getattr(module, name)
        setattr(module, name, before * 1.7 if name != "variance_epsilon" and name != "eps" else before + 0.5)
        self.undo.append(lambda: setattr(module, name, before))
        self.done.append(f"({type(module).__name__}.{name})")

    def steer(self) -> None:
        layer = self.random.choice(list(self.model.model.layers))
        vector = torch.randn(64) * 3

        def moved(_: Any, __: Any, output: Any) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        hook = layer.register_forward_hook(moved)
        self.undo.append(hook.remove)

    def replace_forward(self) -> None:
        module = self.random.choice(list(self.model.model.layers)).mlp
        before = module.forward
        module.forward = lambda *args, **options: before(*args, **options) * 2
        self.undo.append(lambda: module.__dict__.pop("forward", None) and None)

    def train(self) -> None:
        self.model.train()
        attention = [module for module in self.model.modules() if "attention_dropout" in vars(module)]
        for module in attention:
            module.attention_dropout = 0.5

        def back() -> None:
            self.model.eval()
            for module in attention:
                module.attention_dropout = 0.0

        self.undo.append(back)

    def undo_one(self) -> None:
        if self.undo:
            self.undo.pop(self.random.randrange(len(self.undo)))()

    def toggle_autocast(self) -> None:
        self.autocast = not self.autocast

    # -- what happens to the store ---------------------------------------------------------------------------------
    def reopen(self) -> None:
        self.quota = self.random.choice([None, 1, 200_000, 1 << 40])
        self.close()
        self.store = self.opened()

    def close(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.store.close()

    def lock(self) -> None:
        """Another process holds the index for a while when something is asked."""
        other = sqlite3.connect(self.folder / "store" / "index.sqlite", timeout=1, check_same_thread=False)
        try:
            other.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            other.close()
            return
        timer = threading.Timer(0.3, other.rollback)
        timer.start()
        try:
            self.generate()
        finally:
            timer.join()
            other.close()

    def full_disk(self) -> None:
        def full(*_: Any, **__: Any) -> Any:
            raise OSError(28, "No space left on device")

        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr("pqcodec.formats.store.blocks.write_pieces", full)
            self.generate()

    def damage(self) -> None:
        blocks = [path for path in (self.folder / "store" / "blocks").rglob("*.pqkv") if path.is_file()]
        if not blocks:
            return
        path = self.random.choice(blocks)
        if self.random.random() < 0.3:
            path.unlink(missing_ok=True)
            return
        data = bytearray(path.read_bytes())
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        path.write_bytes(data)

    def lose_index(self) -> None:
        self.close()
        for path in (self.folder / "store").glob("index.sqlite*"):
            path.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.store = self.opened()

    def clean(self) -> None:
        with suppress(*TROUBLE):  # what saving in the background met
            self.store.flush()
        self.store.shelf.gc(grace=0)

    def fork(self) -> None:
        """A child asks and saves, and is killed meanwhile or ends well."""
        killed = self.random.random() < 0.4
        child = os.fork()
        if child == 0:
            code = 3
            try:
                self.generate()
                self.by_hand()
                self.close()
                code = 0
            except WrongCache:
                code = 4
            except BaseException as error:  # told by the code
                print(f"a child ended with {error!r}", file=sys.stderr)
            finally:
                os._exit(code)
        if killed:
            time.sleep(self.random.random() * 0.05)
            os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise WrongCache("a child hangs")
            time.sleep(0.005)
        if not killed and (code := os.waitstatus_to_exitcode(ended[1])):
            raise WrongCache(f"a child ended with {code}")

    def run(self) -> None:
        asking = [self.generate] * 9 + [self.by_hand] * 5
        changing = [self.edit_weights, self.edit_weights, self.restore_weights, self.restore_weights, self.number, self.steer]
        changing += [self.replace_forward, self.train, self.undo_one, self.undo_one, self.undo_one, self.toggle_autocast]
        happening = [self.reopen, self.lock, self.full_disk, self.damage, self.lose_index, self.clean, self.fork]
        try:
            for _ in range(ACTIONS):
                action = self.random.choice(asking + changing + happening)
                self.done.append(action.__name__)
                action()
        except Exception as error:
            raise WrongCache(f"{error!r} after {', '.join(self.done)}") from error
        finally:
            self.close()


def sequence(seed: int) -> User:
    folder = Path(tempfile.mkdtemp())
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a child of a process whose threads compute would wait for them
    try:
        user = User(seed, folder)
        user.run()
        return user
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("part", sampled(range(4)))
def test_no_sequence_of_actions_gives_a_wrong_cache(part: int) -> None:
    users = [sequence(seed) for seed in range(part, SEQUENCES, 4)]
    assert sum(user.asked for user in users) > SEQUENCES / 4
    assert sum(user.found for user in users) > 0


def main() -> None:
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    wrong = asked = refused = found = 0
    begun = time.monotonic()
    for seed in range(first, first + count):
        try:
            user = sequence(seed)
            asked, refused, found = asked + user.asked, refused + user.refused, found + user.found
        except WrongCache as error:
            wrong += 1
            print(f"seed {seed}: {error}", flush=True)
        if (seed + 1 - first) % 50 == 0:
            print(f"{seed + 1 - first} of {count}: {wrong} wrong, {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{count} sequences: {wrong} wrong; {asked} answers, {refused} refusals, {found} prefixes found by hand")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
