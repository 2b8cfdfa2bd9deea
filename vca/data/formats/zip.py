"""A zip of class folders, stored or deflated."""

import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from vca.data.scan import Entry, Scan, by_class_folder

HEADER = struct.Struct("<4s5H3L2H")  # signature, version, flags, method, time, date, crc, sizes, name, extra
SIGNATURE = b"PK\3\4"
STREAMED, TAIL = 8, 8  # flag of members whose CRC is behind them; bytes of an optional signature and the CRC


def scan_zip(paths: Sequence[Path], split: str) -> Scan:
    """Index a zip. An entry is a member with its local header, which `unpack` decodes."""
    folders = {path.parent for path in paths} if len(paths) > 1 else set()  # which change if a file is added
    scan = Scan("zip", list(paths), watched=[*paths, *folders])
    for number, path in enumerate(paths):
        try:
            with zipfile.ZipFile(path) as archive:
                infos = {}
                for info in archive.infolist():
                    if info.filename in infos:
                        scan.problems.append(f"{path}: {info.filename} exists twice; zip the folder again")
                    infos[info.filename] = info
        except NotImplementedError as error:
            scan.problems.append(f"{path}: cannot be read ({error}); zip the folder with `zip -0 -r`")
            continue
        except (zipfile.BadZipFile, OSError, ValueError) as error:  # of a seek, or a name that cannot be decoded
            if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened
                raise
            scan.problems.append(f"{path}: is not a zip or is truncated ({error}); copy it again")
            continue
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            for name, (below, label) in by_class_folder(list(infos), split).items():
                info = infos[name]
                header = os.pread(file.fileno(), HEADER.size, info.header_offset)
                problem = member_problem(info, header)
                size = member_size(info, header) if not problem else 0
                if problem is None and info.header_offset + size > length:
                    problem = "is truncated; copy it again"
                if problem is not None:
                    scan.problems.append(f"{path}: {name} {problem}")
                    continue
                scan.entries.append(Entry(below, label, number, info.header_offset, size, info.file_size))
    return scan


def member_problem(info: zipfile.ZipInfo, header: bytes) -> str | None:
    """Return why a member cannot be read, or None."""
    if len(header) < HEADER.size or not header.startswith(SIGNATURE):
        return "has no header; copy it again"
    if info.flag_bits & 1:
        return "is encrypted; zip the folder without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"has compression method {info.compress_type}; zip the folder with `zip -0 -r`"
    return None


def member_size(info: zipfile.ZipInfo, header: bytes) -> int:
    """Return the size of a member with its local header and, if it was written to a pipe, the CRC behind it."""
    _, _, flags, *_, name, extra = HEADER.unpack(header)
    return HEADER.size + name + extra + info.compress_size + (TAIL if flags & STREAMED else 0)


def unpack(member: bytes) -> bytes:
    """Decode a member with its local header.

    Raises:
        ValueError: if it is corrupt.
    """
    signature, _, flags, method, _, _, crc, _, _, name, extra = HEADER.unpack(member[: HEADER.size])
    content = member[HEADER.size + name + extra :]
    if signature != SIGNATURE:
        raise ValueError("no header in the zip; the zip changed")
    known = {crc}
    if flags & STREAMED:
        content, tail = content[:-TAIL], content[-TAIL:]
        known |= {int.from_bytes(tail[:4], "little"), int.from_bytes(tail[4:], "little")}
    try:
        content = content if method == zipfile.ZIP_STORED else zlib.decompress(content, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise ValueError(f"corrupt in the zip ({error})") from error
    if zlib.crc32(content) not in known:
        raise ValueError("bad CRC in the zip")
    return content
