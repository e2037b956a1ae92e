"""Law: the frames of a .pqkv file as a log (SPEC II.3 to II.5): found by footers and indexes, or by walking after damage.

Every length is checked against the file's real size before it is used.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, TruncatedStream, UnsupportedStream
from pqcodec.formats.containers.pqkv.frames import KINDS, Frame, frame_of, sealed
from pqcodec.formats.containers.reader import named
from pqcodec.formats.plain.documents import checksum_bytes, json_value, natural
from pqcodec.stream.checksum import checksum
from pqcodec.stream.magic import whose
from pqcodec.stream.source import Source, owned
from pqcodec.stream.tables import SharedTable, table_called

_SEARCHED_BYTES = 16 << 20  # after the last commit, read at once


class Log:
    """The frames of a file, from its head, footers and indexes; a file that has grown ends at its last sound footer.

    Raises TruncatedStream, CorruptStream, UnsupportedStream, or InvalidArgument for a single stream.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = source.size
        self.version = self._check_head()
        self.committed = self.size  # bytes up to the end of the last footer
        self.items = self._open()

    def _open(self) -> list[Frame]:
        """The frames of all indexes, in file order."""
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
            if item.kind == c.FRAME_TABLE:
                continue
            before = seen.get(item.name)
            continues = grown and before is not None and before.kind == item.kind == c.FRAME_CODED
            if before is not None and not (continues and (before.layer, before.role) == (item.layer, item.role)):
                raise CorruptStream(f"index: two tensors are called {item.name!r}" if item.name else "index: two file metadata")
            seen[item.name] = item
        return items

    def _listed(self, size: int, grown: bool) -> tuple[list[Frame], int | None]:
        """The frames of the index whose footer ends at byte ``size``, and where the footer before ends (None: no footer)."""
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
            previous_end, listed = listed.get("previous"), listed.get("frames")
            previous = previous_end if isinstance(previous_end, int) and natural(previous_end) else 0
            if not c.FILE_HEAD_STRUCT.size < previous <= start:
                raise CorruptStream(
                    f"index at byte {start}: the footer before it ends at {previous_end!r}, a byte before it is expected"
                )
        if not isinstance(listed, list):
            raise CorruptStream("index: a JSON list is expected")
        items = [frame_of(number, fields) for number, fields in enumerate(listed)]
        expected = c.FILE_HEAD_STRUCT.size if previous is None else previous
        for number, item in enumerate(items):
            if item.offset != expected:
                raise CorruptStream(f"index: frame {number} is at byte {item.offset}, the one before it ends at {expected}")
            expected = item.end
        if expected != start:
            raise CorruptStream(f"index: its frames end at byte {expected}, the index is at {start}")
        return items, previous

    def _check_head(self) -> int:
        """The file's version, after checking the head."""
        head = self._source.read(0, min(self.size, c.FILE_HEAD_STRUCT.size)).tobytes()
        magic = head[: len(c.FILE_MAGIC)]
        if magic == c.STREAM_MAGIC:
            raise InvalidArgument("is a single stream, not a .pqkv file; use pqcodec.decode")
        if magic != c.FILE_MAGIC[: len(magic)]:
            raise CorruptStream(f"magic is {magic!r}, a .pqkv file begins with {c.FILE_MAGIC!r}{whose(head)}")
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

    def _footer(self, offset: int) -> tuple[int, int] | None:
        """Index offset and file size from the footer at a byte; None where no footer with a sound checksum is there."""
        if offset < c.FILE_HEAD_STRUCT.size:
            return None
        data = self._source.read(offset, c.FOOTER_STRUCT.size).tobytes()
        magic, index, size, _ = c.FOOTER_STRUCT.unpack(data)
        return (index, size) if magic == c.FOOTER_MAGIC and data == sealed(data) else None

    def _explain_missing_footer(self) -> NoReturn:
        """Walk the frames to distinguish a truncated file from a damaged one, and raise the error for it."""
        offset, tensors, footers = self._walk()
        if self._begins(offset) and not footers:
            raise TruncatedStream(f"the file is cut off at byte {self.size}; {tensors} whole tensors are before it")
        if footers:
            raise CorruptStream(f"{self.size - footers[0]} bytes behind the end of the file; cut them off")
        raise CorruptStream(
            f"at byte {offset} is neither a frame nor a footer that holds; {tensors} whole tensors are before it"
        )

    def _last_commit(self) -> int:
        """The end of a grown file's last footer, if an interrupted append follows it; raises CorruptStream if damage does."""
        offset, tensors, footers = self._walk()
        if not self._begins(offset):
            raise CorruptStream(
                f"at byte {offset} is neither a frame nor a footer that holds; {tensors} whole tensors are before it"
            )
        if not footers:
            raise TruncatedStream(f"the file is cut off at byte {self.size}; {tensors} whole tensors are before it")
        if later := self._footer_behind(offset):
            raise CorruptStream(f"at byte {offset} a frame is damaged: a commit lies behind it, which ends at byte {later}")
        return footers[-1]

    def _footer_behind(self, offset: int) -> int:
        """The end of a sound footer somewhere after a byte; 0 if there is none."""
        for start in range(offset, self.size, _SEARCHED_BYTES):
            data = self._source.read(start, min(_SEARCHED_BYTES + c.FOOTER_STRUCT.size, self.size - start)).tobytes()
            found = data.find(c.FOOTER_MAGIC)
            while 0 <= found <= len(data) - c.FOOTER_STRUCT.size:
                footer = self._footer(start + found)
                if footer and footer[1] == start + found + c.FOOTER_STRUCT.size:
                    return footer[1]
                found = data.find(c.FOOTER_MAGIC, found + 1)
        return 0

    def _walk(self) -> tuple[int, int, list[int]]:
        """Walk from the head: the offset where whole frames and footers end, tensors before it, and the ends of the footers."""
        offset, tensors, footers = c.FILE_HEAD_STRUCT.size, 0, []
        while self.size - offset >= c.FRAME_STRUCT.size:
            magic = self._source.read(offset, 4).tobytes()
            if magic == c.FRAME_MAGIC and not self._runs_out(offset):
                with named(f"{tensors} whole tensors, then"):
                    item, _ = self._frame(offset, self.size)
                offset, tensors = item.end, tensors + (item.kind in (c.FRAME_CODED, c.FRAME_EXACT))
            elif (footer := self._footer(offset)) and footer[1] == offset + c.FOOTER_STRUCT.size:
                offset += c.FOOTER_STRUCT.size
                footers.append(offset)
                if self.version == c.FILE_VERSION:
                    break
            else:
                break
        return offset, tensors, footers

    def _begins(self, offset: int) -> bool:
        """Whether the bytes from a byte on are the beginning of a frame or of a footer, or none."""
        rest = self._source.read(offset, min(self.size - offset, c.FRAME_STRUCT.size)).tobytes()
        if len(rest) == c.FRAME_STRUCT.size and not self._runs_out(offset):
            return False
        frames = (c.FRAME_MAGIC + bytes([kind]) + bytes(3) for kind in KINDS)
        known = len(c.FRAME_MAGIC) + 4  # bytes of a frame's header that do not depend on its sizes
        return c.FOOTER_MAGIC.startswith(rest[:4]) or any(frame.startswith(rest[:known]) for frame in frames)

    def _runs_out(self, offset: int) -> bool:
        """Whether a frame with a sound header begins at a byte and ends beyond the file."""
        header = self._source.read(offset, c.FRAME_STRUCT.size).tobytes()
        magic, _, _, meta_bytes, body_bytes, stored = c.FRAME_STRUCT.unpack(header)
        meta = offset + c.FRAME_STRUCT.size
        if magic != c.FRAME_MAGIC or meta_bytes > c.MAX_META_BYTES:
            return False
        if meta + meta_bytes > self.size:
            return True  # the checksum covers the meta, which is missing
        holds = stored == checksum(header[: c.FRAME_CHECKED] + self._source.read(meta, meta_bytes).tobytes())
        return bool(holds) and meta + meta_bytes + body_bytes > self.size

    # -- frames --------------------------------------------------------------------------------------------------
    def _frame(self, offset: int, end: int, meta_bytes_listed: int = 0) -> tuple[Frame, dict[str, Any]]:
        """The frame at a byte, and its meta; raises CorruptStream where the frame ends after ``end``.

        ``meta_bytes_listed``: the size of the meta in the index, so that header and meta take one read.
        """
        if end - offset < c.FRAME_STRUCT.size:
            raise CorruptStream(
                f"frame at byte {offset}: {end - offset} bytes are there, its header takes {c.FRAME_STRUCT.size}"
            )
        head = self._source.read(offset, min(end - offset, c.FRAME_STRUCT.size + meta_bytes_listed)).tobytes()
        header, meta = head[: c.FRAME_STRUCT.size], head[c.FRAME_STRUCT.size :]
        magic, kind, reserved, meta_bytes, body_bytes, stored = c.FRAME_STRUCT.unpack(header)
        if magic != c.FRAME_MAGIC:
            raise CorruptStream(f"frame at byte {offset}: magic is {magic!r}, {c.FRAME_MAGIC!r} is expected")
        if meta_bytes > c.MAX_META_BYTES:
            raise CorruptStream(f"frame at byte {offset}: {meta_bytes} bytes of meta, at most {c.MAX_META_BYTES} are allowed")
        body = offset + c.FRAME_STRUCT.size + meta_bytes
        takes = f"frame at byte {offset}: it takes {body + body_bytes - offset} bytes, {end - offset} are there"
        if body > end:
            raise CorruptStream(takes)
        if len(meta) != meta_bytes:
            meta = self._source.read(offset + c.FRAME_STRUCT.size, meta_bytes).tobytes()
        if stored != checksum(header[: c.FRAME_CHECKED] + meta):
            raise CorruptStream(f"frame at byte {offset}: checksum does not hold; fetch the file again")
        if body + body_bytes > end:
            raise CorruptStream(takes)
        if kind not in KINDS or any(reserved):
            raise UnsupportedStream(f"frame at byte {offset}: kind {kind}, reserved {reserved!r}: install a newer pqcodec")
        fields = json_value(meta, f"frame at byte {offset}")
        if not isinstance(fields, dict):
            raise CorruptStream(f"frame at byte {offset}: a JSON object is expected")
        if kind == c.FRAME_METADATA and body_bytes:
            raise CorruptStream(f"frame at byte {offset}: file metadata have a body of {body_bytes} bytes")
        tensor = kind in (c.FRAME_CODED, c.FRAME_EXACT)
        name, layer, role = (fields.get(key) if tensor else None for key in ("name", "layer", "role"))
        return Frame(offset, kind, name, layer, role, meta_bytes, body_bytes), fields

    def check(self, item: Frame) -> None:
        """Check the header and the checksum of a frame of the index without parsing its meta; raises CorruptStream."""
        head = self._source.read(item.offset, c.FRAME_STRUCT.size + item.meta_bytes).tobytes()
        _, kind, _, meta_bytes, body_bytes, stored = c.FRAME_STRUCT.unpack_from(head)
        same = (kind, meta_bytes, body_bytes) == (item.kind, item.meta_bytes, item.body_bytes)
        if not same or stored != checksum(head[: c.FRAME_CHECKED] + head[c.FRAME_STRUCT.size :]):
            raise CorruptStream(f"frame at byte {item.offset}: checksum does not hold; fetch the file again")

    def meta(self, item: Frame) -> dict[str, Any]:
        """The meta of a frame of the index; raises CorruptStream where index and frame differ."""
        found, meta = self._frame(item.offset, item.end, meta_bytes_listed=item.meta_bytes)
        if found != item or type(found.layer) is not type(item.layer):
            raise CorruptStream(f"frame at byte {item.offset}: the index says {item}, the frame {found}")
        return meta

    @property
    def has_tables(self) -> bool:
        """Whether the file carries shared tables."""
        return any(item.kind == c.FRAME_TABLE for item in self.items)

    def table(self, item: Frame) -> SharedTable:
        """The shared table of a frame; raises CorruptStream or UnsupportedStream."""
        name = self.meta(item).get("table")
        if item.body_bytes > c.MAX_TABLE_BYTES + c.CHECKSUM_BYTES:
            raise CorruptStream(
                f"frame at byte {item.offset}: a shared table of {item.body_bytes} bytes; {c.MAX_TABLE_BYTES} are the most"
            )
        with named(f"frame at byte {item.offset}"):
            return table_called(str(name), self.body(item).tobytes())

    def body(self, item: Frame) -> np.ndarray:
        """The body of a frame, uint8, checked and without its checksum."""
        return self.sealed_part(item.body_start, item.body_bytes)

    def sealed_part(self, start: int, count: int, seal: int | None = None) -> np.ndarray:
        """``count`` bytes without their last four, the checksum of the others (and equal to ``seal``, where that is given).

        Raises CorruptStream.
        """
        if count < c.CHECKSUM_BYTES:
            raise CorruptStream(f"body at byte {start}: {count} bytes, the checksum alone takes {c.CHECKSUM_BYTES}")
        raw = owned(self._source, start, count)
        if raw[-c.CHECKSUM_BYTES :].tobytes() != checksum_bytes(raw[: -c.CHECKSUM_BYTES]):
            raise CorruptStream(f"body at byte {start}: checksum does not hold")
        if seal is not None and raw[-c.CHECKSUM_BYTES :].tobytes() != seal.to_bytes(c.CHECKSUM_BYTES, "little"):
            raise CorruptStream(f"body at byte {start}: is not the one that was written here (its seal does not hold)")
        return raw[: -c.CHECKSUM_BYTES]
