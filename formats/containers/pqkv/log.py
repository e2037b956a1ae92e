"""Law: the log of frames that a .pqkv file is (SPEC Part II): which frames there are, and what each of them says.

Every length is held against the file's real size before it is used.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, PQError, TruncatedStream, UnsupportedStream
from pqcodec.formats.containers.pqkv.frames import KINDS, Frame, frame_of, sealed
from pqcodec.formats.containers.reader import named
from pqcodec.formats.plain.documents import checksum_bytes, json_value, natural
from pqcodec.stream.checksum import checksum
from pqcodec.stream.source import Source, owned

_SEARCHED_BYTES = 16 << 20  # at once, behind the last commit


class Log:
    """The frames of a file, from a head, footers and indexes that hold; a file that has grown ends at its last footer.

    Raises TruncatedStream, CorruptStream, UnsupportedStream, or InvalidArgument for a single stream.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = source.size
        self.version = self._check_head()
        self.committed = self.size  # bytes up to the last footer
        self.items = self._open()

    def _open(self) -> list[Frame]:
        """The frames that the indexes list, in the order of the file."""
        grown = self.version == c.GROWN_VERSION
        footer = self._footer(self.size - c.FOOTER_STRUCT.size)
        whole = footer is not None and footer[1] == self.size
        if not whole and not grown:
            self._explain_missing_footer()
        end = self.committed = self.size if whole else self._last_commit()
        runs: list[list[Frame]] = []
        first: int | None = end
        while first is not None:
            items, first = self._listed(end, grown)
            runs.append(items)
            end = first or 0
        items = [item for run in reversed(runs) for item in run]
        seen: dict[str | None, Frame] = {}
        for item in items:
            before = seen.get(item.name)
            continues = grown and before is not None and before.kind == item.kind == c.FRAME_CODED
            if before is not None and not (continues and (before.layer, before.role) == (item.layer, item.role)):
                raise CorruptStream(f"index: two tensors are called {item.name!r}" if item.name else "index: two file metadata")
            seen[item.name] = item
        return items

    def _listed(self, size: int, grown: bool) -> tuple[list[Frame], int | None]:
        """The frames of the index whose footer ends at a byte, and where the footer before them ends (None: no other is)."""
        footer = self._footer(size - c.FOOTER_STRUCT.size)
        if footer is None or footer[1] != size:
            raise CorruptStream(f"no footer that holds ends at byte {size}")
        start, end = footer[0], size - c.FOOTER_STRUCT.size
        if not c.FILE_HEAD_STRUCT.size <= start <= end:
            raise CorruptStream(f"footer: the index is at byte {start}, outside the file")
        index, _ = self._frame(start, end)
        if index.kind != c.FRAME_INDEX or index.end != end or index.body_bytes > c.MAX_INDEX_BYTES + c.CHECKSUM_BYTES:
            raise CorruptStream(f"the frame at byte {start} is not an index that ends at the footer")
        listed = json_value(self.body(index).tobytes(), "index")
        previous = None
        if grown and isinstance(listed, dict):
            told, listed = listed.get("previous"), listed.get("frames")
            previous = told if isinstance(told, int) and natural(told) else 0
            if not c.FILE_HEAD_STRUCT.size < previous <= start:
                raise CorruptStream(
                    f"index at byte {start}: the footer before it ends at {told!r}, a byte before it is expected"
                )
        if not isinstance(listed, list):
            raise CorruptStream("index: a JSON list is expected")
        items = [frame_of(place, fields) for place, fields in enumerate(listed)]
        expected = c.FILE_HEAD_STRUCT.size if previous is None else previous
        for place, item in enumerate(items):
            if item.offset != expected:
                raise CorruptStream(f"index: frame {place} is at byte {item.offset}, the one before it ends at {expected}")
            expected = item.end
        if expected != start:
            raise CorruptStream(f"index: its frames end at byte {expected}, the index is at {start}")
        return items, previous

    def _check_head(self) -> int:
        """The file's version."""
        head = self._source.read(0, min(self.size, c.FILE_HEAD_STRUCT.size)).tobytes()
        magic = head[: len(c.FILE_MAGIC)]
        if magic == c.STREAM_MAGIC:
            raise InvalidArgument("is a single stream, not a .pqkv file; use pqcodec.decode")
        if magic != c.FILE_MAGIC[: len(magic)]:
            raise CorruptStream(f"magic is {magic!r}, a .pqkv file begins with {c.FILE_MAGIC!r}; is this the right file?")
        if len(head) < c.FILE_HEAD_STRUCT.size:
            raise TruncatedStream(f"{len(head)} bytes, a head takes {c.FILE_HEAD_STRUCT.size}; the file is cut off")
        _, version, reserved, _ = c.FILE_HEAD_STRUCT.unpack(head)
        if version not in (c.FILE_VERSION, c.GROWN_VERSION):
            known = f"{c.FILE_VERSION} and {c.GROWN_VERSION}"
            raise UnsupportedStream(f"file version {version}; this release reads {known}: install a newer pqcodec")
        if head != sealed(head):
            raise CorruptStream("head: checksum does not hold; fetch the file again")
        if any(reserved):
            raise UnsupportedStream("head: reserved bytes are not zero: install a newer pqcodec")
        return int(version)

    def _footer(self, place: int) -> tuple[int, int] | None:
        """Index offset and file size of a footer that holds at a byte, or None."""
        if place < c.FILE_HEAD_STRUCT.size:
            return None
        data = self._source.read(place, c.FOOTER_STRUCT.size).tobytes()
        magic, index, size, _ = c.FOOTER_STRUCT.unpack(data)
        return (index, size) if magic == c.FOOTER_MAGIC and data == sealed(data) else None

    def _explain_missing_footer(self) -> NoReturn:
        """Walk the frames to tell a file that was cut off from one that is damaged."""
        place, tensors, footers = self._walk()
        if self.size - place < max(c.FRAME_STRUCT.size, c.FOOTER_STRUCT.size) and not footers:
            raise TruncatedStream(f"the file is cut off at byte {self.size}; {tensors} whole tensors are before it")
        if footers:
            raise CorruptStream(f"{self.size - footers[0]} bytes behind the end of the file; cut them off")
        raise CorruptStream(
            f"at byte {place} is neither a frame nor a footer that holds; {tensors} whole tensors are before it"
        )

    def _last_commit(self) -> int:
        """Where the last footer of a grown file ends, if what lies behind it was cut off; raises where it was not."""
        place, tensors, footers = self._walk()
        rest = self.size - place
        if not footers:
            raise TruncatedStream(f"the file is cut off at byte {self.size}; {tensors} whole tensors are before it")
        if rest >= max(c.FRAME_STRUCT.size, c.FOOTER_STRUCT.size) and not self._runs_out(place):
            raise CorruptStream(
                f"at byte {place} is neither a frame nor a footer that holds; {tensors} whole tensors are before it"
            )
        if later := self._footer_behind(place):
            raise CorruptStream(f"at byte {place} a frame is damaged: a commit lies behind it, which ends at byte {later}")
        return footers[-1]

    def _footer_behind(self, place: int) -> int:
        """Where a footer ends that lies behind a byte and holds; 0 if none does."""
        for start in range(place, self.size, _SEARCHED_BYTES):
            data = self._source.read(start, min(_SEARCHED_BYTES + c.FOOTER_STRUCT.size, self.size - start)).tobytes()
            found = data.find(c.FOOTER_MAGIC)
            while 0 <= found <= len(data) - c.FOOTER_STRUCT.size:
                footer = self._footer(start + found)
                if footer and footer[1] == start + found + c.FOOTER_STRUCT.size:
                    return footer[1]
                found = data.find(c.FOOTER_MAGIC, found + 1)
        return 0

    def _walk(self) -> tuple[int, int, list[int]]:
        """Frames and footers from the head on: where the first begins that is not whole, tensors before it, ends of footers."""
        place, tensors, footers = c.FILE_HEAD_STRUCT.size, 0, []
        while self.size - place >= c.FRAME_STRUCT.size:
            magic = self._source.read(place, 4).tobytes()
            if magic == c.FRAME_MAGIC and not (self.version == c.GROWN_VERSION and self._runs_out(place)):
                with named(f"{tensors} whole tensors, then"):
                    item, _ = self._frame(place, self.size, TruncatedStream)
                place, tensors = item.end, tensors + (item.kind in (c.FRAME_CODED, c.FRAME_EXACT))
            elif (footer := self._footer(place)) and footer[1] == place + c.FOOTER_STRUCT.size:
                place += c.FOOTER_STRUCT.size
                footers.append(place)
                if self.version == c.FILE_VERSION:
                    break
            else:
                break
        return place, tensors, footers

    def _runs_out(self, place: int) -> bool:
        """Whether a frame begins at a byte whose header holds and which ends behind the file."""
        header = self._source.read(place, c.FRAME_STRUCT.size).tobytes()
        magic, _, _, meta_bytes, body_bytes, stored = c.FRAME_STRUCT.unpack(header)
        meta = place + c.FRAME_STRUCT.size
        if magic != c.FRAME_MAGIC or meta_bytes > c.MAX_META_BYTES:
            return False
        if meta + meta_bytes > self.size:
            return True  # the checksum is of the meta, too, which is not there
        holds = stored == checksum(header[: c.FRAME_CHECKED] + self._source.read(meta, meta_bytes).tobytes())
        return bool(holds) and meta + meta_bytes + body_bytes > self.size

    # -- frames --------------------------------------------------------------------------------------------------
    def _frame(
        self, place: int, end: int, beyond: type[PQError] = CorruptStream, meta_bytes_listed: int = 0
    ) -> tuple[Frame, dict[str, Any]]:
        """The frame at a byte, and its meta; raises ``beyond`` where the frame does not end at ``end`` or before.

        Where the size of the meta is listed, all is read at once.
        """
        if end - place < c.FRAME_STRUCT.size:
            raise beyond(f"frame at byte {place}: {end - place} bytes are there, its header takes {c.FRAME_STRUCT.size}")
        head = self._source.read(place, min(end - place, c.FRAME_STRUCT.size + meta_bytes_listed)).tobytes()
        header, meta = head[: c.FRAME_STRUCT.size], head[c.FRAME_STRUCT.size :]
        magic, kind, reserved, meta_bytes, body_bytes, stored = c.FRAME_STRUCT.unpack(header)
        if magic != c.FRAME_MAGIC:
            raise CorruptStream(f"frame at byte {place}: magic is {magic!r}, {c.FRAME_MAGIC!r} is expected")
        if meta_bytes > c.MAX_META_BYTES:
            raise CorruptStream(f"frame at byte {place}: {meta_bytes} bytes of meta, at most {c.MAX_META_BYTES} are allowed")
        body = place + c.FRAME_STRUCT.size + meta_bytes
        if body + body_bytes > end:
            raise beyond(f"frame at byte {place}: it takes {body + body_bytes - place} bytes, {end - place} are there")
        if len(meta) != meta_bytes:
            meta = self._source.read(place + c.FRAME_STRUCT.size, meta_bytes).tobytes()
        if stored != checksum(header[: c.FRAME_CHECKED] + meta):
            raise CorruptStream(f"frame at byte {place}: checksum does not hold; fetch the file again")
        if kind not in KINDS or any(reserved):
            raise UnsupportedStream(f"frame at byte {place}: kind {kind}, reserved {reserved!r}: install a newer pqcodec")
        fields = json_value(meta, f"frame at byte {place}")
        if not isinstance(fields, dict):
            raise CorruptStream(f"frame at byte {place}: a JSON object is expected")
        if kind == c.FRAME_METADATA and body_bytes:
            raise CorruptStream(f"frame at byte {place}: file metadata have a body of {body_bytes} bytes")
        tensor = kind in (c.FRAME_CODED, c.FRAME_EXACT)
        name, layer, role = (fields.get(key) if tensor else None for key in ("name", "layer", "role"))
        return Frame(place, kind, name, layer, role, meta_bytes, body_bytes), fields

    def check(self, item: Frame) -> None:
        """Make sure of the header and meta of a frame that the index lists, without reading what they say."""
        head = self._source.read(item.offset, c.FRAME_STRUCT.size + item.meta_bytes).tobytes()
        _, kind, _, meta_bytes, body_bytes, stored = c.FRAME_STRUCT.unpack_from(head)
        told = (kind, meta_bytes, body_bytes) == (item.kind, item.meta_bytes, item.body_bytes)
        if not told or stored != checksum(head[: c.FRAME_CHECKED] + head[c.FRAME_STRUCT.size :]):
            raise CorruptStream(f"frame at byte {item.offset}: checksum does not hold; fetch the file again")

    def meta(self, item: Frame) -> dict[str, Any]:
        """The meta of a frame that the index lists, and that says the same."""
        found, meta = self._frame(item.offset, item.end, meta_bytes_listed=item.meta_bytes)
        if found != item:
            raise CorruptStream(f"frame at byte {item.offset}: the index says {item}, the frame {found}")
        return meta

    def body(self, item: Frame) -> np.ndarray:
        return self.sealed_part(item.body_start, item.body_bytes)

    def sealed_part(self, start: int, count: int, seal: int | None = None) -> np.ndarray:
        """Bytes whose last four are the checksum of those before them (and ``seal``, if it is given), without these four."""
        if count < c.CHECKSUM_BYTES:
            raise CorruptStream(f"body at byte {start}: {count} bytes, the checksum alone takes {c.CHECKSUM_BYTES}")
        raw = owned(self._source, start, count)
        if raw[-c.CHECKSUM_BYTES :].tobytes() != checksum_bytes(raw[: -c.CHECKSUM_BYTES]):
            raise CorruptStream(f"body at byte {start}: checksum does not hold")
        if seal is not None and raw[-c.CHECKSUM_BYTES :].tobytes() != seal.to_bytes(c.CHECKSUM_BYTES, "little"):
            raise CorruptStream(f"body at byte {start}: is not the one that was written here (its seal does not hold)")
        return raw[: -c.CHECKSUM_BYTES]
