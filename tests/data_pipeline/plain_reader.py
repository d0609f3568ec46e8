"""A reader of shard files written from docs/shard-format.md alone: the tests' second opinion."""

import hashlib
import json
import struct
from pathlib import Path

import xxhash
import zstandard


def unzip(data):
    return zstandard.ZstdDecompressor().decompress(data)


def xxh64(*parts):
    return xxhash.xxh3_64_intdigest(b"".join(parts))


def read_shard(path):
    """(list of documents as lists of ids, their names)."""
    data = Path(path).read_bytes()
    header, trailer = data[:64], data[-32:]
    magic, version, width, frame_tokens, vocab_size = struct.unpack("<8sIIII", header[:24])
    assert magic == b"HOPETOK\x00"
    assert version == 1
    assert width == (2 if vocab_size <= 65536 else 4)
    assert header[40:56] == bytes(16)
    assert xxh64(header[:56]) == struct.unpack("<Q", header[56:])[0]
    at, packed_size, size, check, end = struct.unpack("<QIIQ8s", trailer)
    assert end == b"HOPETOK\xff"
    packed = data[at : at + packed_size]
    assert at + packed_size == len(data) - 32
    assert xxh64(header, packed, trailer[:16]) == check
    footer = unzip(packed)
    assert len(footer) == size
    counts = struct.unpack("<QQQQQQII", footer[:56])
    tokens, documents, _, names_packed, names_size, names_check, frames, zero = counts
    assert zero == 0
    assert frames == -(-tokens // frame_tokens)
    columns = struct.unpack(f"<{frames}Q{frames}I{frames}I{documents}I", footer[56:])
    checks, columns = columns[:frames], columns[frames:]
    sizes, firsts, lengths = columns[:frames], columns[frames : 2 * frames], columns[2 * frames :]
    ids, offset = [], 64
    for check, length, first in zip(checks, sizes, firsts, strict=True):
        frame = data[offset : offset + length]
        assert xxh64(frame) == check
        content = unzip(frame)
        ids += struct.unpack(f"<{len(content) // width}{'H' if width == 2 else 'I'}", content)
        assert ids[-(len(content) // width)] == first
        offset += length
    packed_names = data[offset:at]
    assert (len(packed_names), xxh64(packed_names)) == (names_packed, names_check)
    names = json.loads(unzip(packed_names))
    assert len(unzip(packed_names)) == names_size
    assert max(ids, default=0) < vocab_size
    split, start = [], 0
    for length in lengths:
        split.append(ids[start : start + length])
        start += length
    assert start == len(ids) == tokens
    return split, names


def read_corpus(folder):
    """(documents, names, manifest) of a whole corpus."""
    manifest = json.loads((Path(folder) / "manifest.json").read_bytes())
    rest = {k: v for k, v in manifest.items() if k != "fingerprint"}
    spelled = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(spelled).hexdigest() == manifest["fingerprint"]
    documents, names = [], []
    for entry in manifest["shards"]:
        data = (Path(folder) / entry["file"]).read_bytes()
        assert xxhash.xxh3_128_hexdigest(data) == entry["xxh3_128"]
        some, their_names = read_shard(Path(folder) / entry["file"])
        documents += some
        names += their_names
    return documents, names, manifest
