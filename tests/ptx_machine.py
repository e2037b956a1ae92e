"""Law: CUDA kernels on a CPU: PTX, as NVRTC compiles it, becomes C++, which ``ptx_machine.h`` runs, one thread block at a time.

Each instruction becomes a call of a function of the same name, or a line below where it needs more; registers become variables
that hold their bits. What stands here is what the project's kernels use: another instruction fails by name.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

HEADER = Path(__file__).with_name("ptx_machine.h")
COMPILER = ["g++", "-std=c++20", "-O0", "-march=native", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
_SIZES = {"pred": "bool", "b16": "u16", "s16": "u16", "u16": "u16", "b32": "u32", "s32": "u32", "u32": "u32", "f32": "u32"}
_SIZES |= {"b64": "u64", "s64": "u64", "u64": "u64", "f64": "u64"}
_SIGNED = _SIZES | {"s8": "s8", "s16": "s16", "s32": "s32", "s64": "s64", "u8": "u8", "b8": "u8"}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_PLAIN = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^", "div": "/", "rem": "%"}
_SPECIAL = {"%tid.x": "(u32)gpu.me->number", "%ctaid.x": "gpu.block", "%nctaid.x": "gpu.blocks", "%laneid": "(u32)lane()"}
_SPECIAL |= {"%ntid.x": "(u32)gpu.threads.size()"}
_NOTHING = ("fence.", "createpolicy.", "prefetch.", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "setmaxnreg")
_MATRICES = {"s8": "Bytes", "f16": "Halves", "bf16": "Brains"}


def is_there() -> bool:
    """Whether there is a compiler that knows C++20 and numbers of 16 bits."""
    if shutil.which("g++") is None:
        return False
    return not subprocess.run([*COMPILER[:2], "-fsyntax-only", "-x", "c++", str(HEADER)], capture_output=True).returncode


class Machine:
    """A kernel that runs on the CPU. ``ptx``: what NVRTC made of it; ``folder``: where that is compiled."""

    def __init__(self, ptx: bytes, folder: Path) -> None:
        code = ptx.decode().rstrip("\0")
        name = re.search(r"\.entry\s+(\w+)", code)
        assert name is not None
        translated = _Translation(code)
        self._own = translated.shared  # bytes of shared memory that the kernel names
        source = folder / f"{name[1]}_{abs(hash(code)):x}.cpp"
        source.write_text(translated.source)
        library = source.with_suffix(".so")
        told = subprocess.run(
            [*COMPILER, str(source), "-I", str(HEADER.parent), "-o", str(library)], capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr[:3000]
        self._run = ctypes.CDLL(str(library)).run
        self._run.restype = ctypes.c_char_p

    def launch(
        self,
        blocks: int,
        threads: int,
        shared: int,
        values: Sequence[int],
        ranges: Iterable[tuple[int, int, bool]],
        seed: int = 0,
    ) -> str:
        """Run ``blocks`` thread blocks with ``shared`` bytes; ``values``: the kernel's arguments, as bits.

        ``ranges``: of addresses (first, last + 1) that it may read and, where the third is true, write. Returns what went
        wrong, which is "" if nothing did.
        """
        bounds = [int(x) for each in ranges for x in each]
        told, given = (ctypes.c_uint64 * len(bounds))(*bounds), (ctypes.c_uint64 * len(values))(*values)
        message = self._run(given, blocks, threads, shared + self._own, told, len(bounds) // 3, seed)
        return str(message, "ascii", "replace")


def _place(parts: Sequence[str]) -> str:
    return next((each for each in ("shared", "global", "local") if each in parts), "anywhere")


class _Translation:
    """``source``: C++. ``shared``: bytes of shared memory that variables of its own take."""

    def __init__(self, code: str) -> None:
        code = re.sub(r"//[^\n]*", "", code)
        entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\{(.*)\}\s*$", code, re.S)
        assert entry is not None
        self._params = {name: i for i, name in enumerate(re.findall(r"\.param\b[^,]*?(\w+)\s*(?:,|$)", entry[1]))}
        self._scopes: list[dict[str, str]] = [{}]  # C++ names of registers and labels, by their names
        self._labels = self.shared = 0
        self._arrays = {name: "(u64)SHARED" for name in re.findall(r"\.extern\s+\.shared.*?(\w+)\[\]", code)}
        lines = list(self._statements(entry[3]))
        self.source = "\n".join(
            [
                '#include "ptx_machine.h"',
                "static u64 params[32];",
                "static void kernel() {",
                "u64 carry = 0;",
                *lines,
                "end:;",
                "}",
                'extern "C" const char* run(const u64* given, u32 blocks, u32 threads, u32 shared, const u64* ranges,'
                " u32 count, u32 seed) {",
                f"    std::copy(given, given + {len(self._params)}, params);",
                "    return launch(kernel, blocks, threads, shared, (const Range*)ranges, count, seed);",
                "}",
            ]
        )

    def _statements(self, body: str) -> Iterator[str]:
        for token in re.findall(r"\s*(\{(?![^;{}]*\}[^;]*;)|\}|[$\w]+:(?!:)|(?:[^;{}]|\{[^;{}]*\})+;)", body):
            token = token.strip()
            if token == "{":
                self._scopes.append({})
                yield "{"
            elif token == "}":
                self._scopes.pop()
                yield "}"
            elif token.endswith(":"):
                yield f"{self._label(token[:-1])}:;"
            elif token.startswith(".reg"):
                yield from self._registers(token)
            elif token.startswith((".shared", ".local")):
                yield self._array(token)
            elif not token.startswith(".pragma"):
                yield self._instruction(token[:-1].strip())

    def _registers(self, told: str) -> Iterator[str]:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*);", told, re.S).groups()  # type: ignore[union-attr]
        for name in re.split(r"\s*,\s*", names.strip()):
            many = re.fullmatch(r"(%?\w+)<(\d+)>", name)
            each = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            own = []
            for register in each:
                variable = register.replace("%", "r_") if len(self._scopes) == 1 else f"{register.strip('%')}_{self._next()}"
                self._scopes[-1][register] = variable
                own.append(variable)
            if own:
                yield f"{_SIZES[kind]} {', '.join(own)};"

    def _array(self, told: str) -> str:
        memory, align, name, size = re.fullmatch(r"\.(\w+)\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\];", told).groups()  # type: ignore[union-attr]
        if memory == "local":
            self._arrays[name] = f"(u64){name}"
            return f"alignas({align}) u8 {name}[{size}];"
        first = -(-self.shared // int(align)) * int(align)
        self._arrays[name], self.shared = f"(u64)(SHARED + {first})", first + int(size)
        return ""

    def _next(self) -> int:
        self._labels += 1
        return self._labels

    def _label(self, name: str) -> str:
        if name.startswith("$"):
            return name.replace("$", "at_")
        scope = self._scopes[-1]  # of inline assembly
        return scope.setdefault("label " + name, f"{name}_{self._next()}")

    # -- operands ------------------------------------------------------------------------------------------------------
    def _value(self, told: str) -> str:
        told = told.strip()
        if told in _SPECIAL:
            return _SPECIAL[told]
        if told.startswith("!"):
            return f"!{self._value(told[1:])}"
        for scope in reversed(self._scopes):
            if told in scope:
                return scope[told]
        if told.startswith(("0f", "0F")):
            return f"{int(told[2:], 16)}u"
        if told.startswith(("0d", "0D")):
            return f"{int(told[2:], 16)}ull"
        if told in self._arrays:
            return self._arrays[told]
        return f"{int(told.rstrip('U'), 0)}ll"

    def _many(self, told: str) -> list[str]:
        told = told.strip()
        return [self._value(each) for each in told.strip("{} ").split(",")] if told.startswith("{") else [self._value(told)]

    def _address(self, told: str) -> str:
        base, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", told.strip()).groups()  # type: ignore[union-attr]
        if base in self._params:
            return f"params[{self._params[base]}]"
        return f"(u64)({self._value(base)} + {offset or 0})"

    @staticmethod
    def _split(told: str) -> list[str]:
        return [each.strip() for each in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", told) if each.strip()]

    # -- instructions --------------------------------------------------------------------------------------------------
    def _instruction(self, told: str) -> str:
        guard, name, rest = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", told, re.S).groups()  # type: ignore[union-attr]
        name = re.sub(r"\.aligned", "", name) if not name.startswith(("mma", "wgmma", "ldmatrix", "stmatrix")) else name
        found = self._done(name, self._split(rest))
        return f"if ({self._value(guard)}) {{ {found} }}" if guard else found

    def _done(self, name: str, operands: list[str]) -> str:
        parts, operands = name.split("."), [each.split("|")[0] for each in operands]  # no lane's own source is asked for
        if name.startswith(_NOTHING):
            return ""
        special: dict[str, Callable[[str, list[str], list[str]], str]] = {
            "bra": self._branch, "ret": lambda *_: "goto end;", "exit": lambda *_: "goto end;", "mov": self._move,
            "ld": self._load, "st": self._store, "setp": self._compare, "selp": self._select, "cvta": self._assign,
            "mma": self._matrices, "wgmma": self._matrices, "ldmatrix": self._ldmatrix, "stmatrix": self._stmatrix,
            "mbarrier": self._barrier, "nanosleep": lambda *_: "yield();",
        }  # fmt: skip
        if parts[0] in special:
            return special[parts[0]](name, parts, operands)
        if parts[0] == "cvt" and not any(kind.startswith(("f", "bf")) for kind in parts[1:]):
            return f"{self._value(operands[0])} = ({_SIGNED[parts[1]]})({_SIGNED[parts[2]]}){self._value(operands[1])};"
        if parts[0] in ("bar", "barrier"):
            name = name.replace("barrier.cta.", "bar.")
        plain = self._plain(parts, operands)
        if plain:
            return plain
        function = re.sub(r"[.:]+", "_", name)
        values = [self._address(each) if each.startswith("[") else self._value(each) for each in operands]
        if parts[0] in ("bar", "cp", "red") and not name.startswith("bar.red"):
            return f"{function}({', '.join(values)});"
        return f"{values[0]} = {function}({', '.join(values[1:])});"

    def _plain(self, parts: list[str], operands: list[str]) -> str | None:
        """Whole numbers by an operator of C++."""
        kind = parts[-1]
        if kind.startswith(("f", "bf")) or "x2" in kind or parts[0] in ("atom", "bar", "cp", "red"):
            return None
        signed = _SIGNED.get(kind, kind)
        values = [f"({signed}){self._value(each)}" for each in operands[1:]]
        to = self._value(operands[0])
        if kind == "pred" and parts[0] in ("and", "or", "xor"):
            return f"{to} = {self._value(operands[1])} {_PLAIN[parts[0]]} {self._value(operands[2])};"
        if parts[0] == "not":
            return f"{to} = {'!' if kind == 'pred' else '~'}{self._value(operands[1])};"
        if parts[0] == "neg":
            return f"{to} = -{self._value(operands[1])};"
        if parts[0] in ("max", "min") and kind in _SIGNED:
            return f"{to} = std::{parts[0]}<{signed}>({', '.join(values)});"
        if parts[0] == "mul" and parts[1] == "lo":
            return f"{to} = ({_SIZES[kind]}){self._value(operands[1])} * ({_SIZES[kind]}){self._value(operands[2])};"
        if "cc" in parts or parts[0] == "addc":  # of numbers of many words
            a, b, c, *_ = (f"(u64)(u32){self._value(each)}" for each in (*operands[1:], operands[-1]))
            found = {"lo": f"(u32)({a} * {b}) + {c}", "hi": f"({a} * {b} >> 32) + {c}"}.get(parts[1], f"{a} + {b}")
            found += " + carry" * parts[0].endswith("c")
            return f"{{ const u64 found = {found}; {to} = (u32)found; carry = found >> 32; }}"
        if parts[0] == "mad" and parts[1] == "lo" and kind in ("s32", "u32", "s64", "u64"):
            a, b, c = (f"({_SIZES[kind]}){self._value(each)}" for each in operands[1:])
            return f"{to} = {a} * {b} + {c};"
        if parts[0] in ("add", "sub") or (parts[0] in _PLAIN and parts[0] not in ("div", "rem")):
            unsigned = [f"({_SIZES[kind]}){self._value(each)}" for each in operands[1:]]
            return f"{to} = {unsigned[0]} {_PLAIN[parts[0]]} {unsigned[1]};"
        if parts[0] in ("div", "rem"):
            return f"{to} = {values[0]} {_PLAIN[parts[0]]} {values[1]};"
        return None

    def _branch(self, name: str, parts: list[str], operands: list[str]) -> str:
        return f"goto {self._label(operands[0])};"

    def _assign(self, name: str, parts: list[str], operands: list[str]) -> str:
        value = self._value(operands[1])
        return f"{self._value(operands[0])} = {'cvta_shared_u64(' + value + ')' if parts[1] == 'shared' else value};"

    def _move(self, name: str, parts: list[str], operands: list[str]) -> str:
        to, given = (self._many(each) for each in operands)
        if len(to) == len(given) == 1:
            return f"{to[0]} = {given[0]};"
        width = {"b32": 16, "b64": 32}[parts[1]]
        if len(to) > 1:
            whole = f"(u64){given[0]}"
            return " ".join(f"{each} = {whole} >> {i * width};" for i, each in enumerate(to))
        return f"{to[0]} = (u64){given[0]} | (u64){given[1]} << {width};"

    def _load(self, name: str, parts: list[str], operands: list[str]) -> str:
        to, kind, address = self._many(operands[0]), _SIGNED[parts[-1]], self._address(operands[1])
        if parts[1] == "param":
            return f"{to[0]} = {address};"
        place = _place(parts)
        puts = " ".join(f"{each} = got[{i}];" for i, each in enumerate(to))
        return f"{{ {kind} got[{len(to)}]; load_{place}<{kind}, {len(to)}>({address}, got); {puts} }}"

    def _store(self, name: str, parts: list[str], operands: list[str]) -> str:
        given, kind = self._many(operands[1]), _SIGNED[parts[-1]]
        place = _place(parts)
        values = ", ".join(f"({kind}){each}" for each in given)
        return (
            f"{{ const {kind} put[] = {{{values}}}; store_{place}<{kind}, {len(given)}>({self._address(operands[0])}, put); }}"
        )

    def _compare(self, name: str, parts: list[str], operands: list[str]) -> str:
        how, kind = parts[1], parts[-1]
        a, b = (self._value(each) for each in operands[1:3])
        if kind == "f32":
            a, b = f"f({a})", f"f({b})"
            unordered = how.endswith("u") and how != "u"
            how = how[:-1] if unordered else how
            found = f"{a} {_COMPARED[how]} {b}" if how not in ("num", "nan") else f"{a} == {a} && {b} == {b}"
            found = f"({a} != {a} || {b} != {b} || {found})" if unordered else f"({a} == {a} && {b} == {b} && {found})"
            found = f"!({found})" if how == "nan" else found
        else:
            signed = _SIGNED[kind]
            found = f"(({signed}){a} {_COMPARED[how]} ({signed}){b})"
        if parts[2] in ("and", "or"):
            found = f"{found} {'&&' if parts[2] == 'and' else '||'} {self._value(operands[3])}"
        return f"{self._value(operands[0])} = {found};"

    def _select(self, name: str, parts: list[str], operands: list[str]) -> str:
        to, yes, no, which = (self._value(each) for each in operands)
        kind = _SIZES[parts[-1]]
        return f"{to} = {which} ? ({kind}){yes} : ({kind}){no};"

    def _matrices(self, name: str, parts: list[str], operands: list[str]) -> str:
        """mma and wgmma: the sums, the first factor, the second one, and what is added."""
        shape = next(part for part in parts if re.fullmatch(r"m\d+n\d+k\d+", part))
        rows, columns, depth = map(int, re.findall(r"\d+", shape))
        kinds = [part for part in parts if part in _MATRICES]
        kind = _MATRICES["s8" if "s8" in kinds else "bf16" if "bf16" in kinds else "f16"]
        to, a = self._many(operands[0]), self._many(operands[1])
        words = depth // (4 if kind == "Bytes" else 2)
        given = f"const u32 a[] = {{{', '.join(f'(u32){each}' for each in a)}}};"
        puts = " ".join(f"{each} = d[{i}];" for i, each in enumerate(to))
        halves = next(part for part in parts if re.fullmatch(r"b?f16|f32|[su]8|s32", part)) == "f16"  # so are the sums
        if rows == 64:
            sums = f"u32 d[] = {{{', '.join(to)}}};"
            add = self._value(operands[3])
            bricks = self._value(operands[2])
            name = f"wgmma_halves<{columns // 8}>" if halves else f"wgmma<{kind}, {columns // 8}>"
            return f'{{ {given} {sums} {name}("{shape}", d, a, {bricks}, {add}); {puts} }}'
        b, c = self._many(operands[2]), self._many(operands[3])
        given += f" const u32 b[] = {{{', '.join(f'(u32){each}' for each in b)}}};"
        given += f" const u32 c[] = {{{', '.join(f'(u32){each}' for each in c)}}}; u32 d[4];"
        name = f"mma_halves<{words}>" if halves else f"mma<{kind}, {words}>"
        return f'{{ {given} {name}("{shape}", d, a, b, c); {puts} }}'

    def _ldmatrix(self, name: str, parts: list[str], operands: list[str]) -> str:
        to, turned = self._many(operands[0]), "true" if "trans" in parts else "false"
        puts = " ".join(f"{each} = got[{i}];" for i, each in enumerate(to))
        return f"{{ u32 got[{len(to)}]; ldmatrix<{len(to)}, {turned}>(got, {self._address(operands[1])}); {puts} }}"

    def _stmatrix(self, name: str, parts: list[str], operands: list[str]) -> str:
        assert "trans" in parts, name
        given = self._many(operands[1])
        words = ", ".join(f"(u32){each}" for each in given)
        return f"{{ const u32 put[] = {{{words}}}; stmatrix_trans<{len(given)}>({self._address(operands[0])}, put); }}"

    def _barrier(self, name: str, parts: list[str], operands: list[str]) -> str:
        if parts[1] in ("try_wait", "test_wait"):
            return f"{self._value(operands[0])} = is_complete({self._address(operands[1])}, {self._value(operands[2])});"
        if parts[1] == "arrive":
            return f"arrive({self._address(operands[1])}, {self._value(operands[2]) if len(operands) > 2 else 0});"
        return f"mbarrier_init_shared_cta_b64({self._address(operands[0])}, {self._value(operands[1])});"
