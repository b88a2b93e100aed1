"""What can be wrong with any file: bytes, and the values of a JSON file."""

import json
import random
import re
from typing import Any

Random = random.Random
Files = dict[str, bytes | None]  # what a case puts beside, or in the place of, its base's files

NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 32767, 65535, 65536, 10**6, 2**24, 80_000_000,
           2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
VALUES = (
    *NUMBERS, -1, -2, 10**400, 0.5, 1e-300, 1e300, float("nan"), float("inf"), True, False, None,
    "", "a", "\n", "\x00", "\ud800", "no", "../x", "/etc/passwd", "<image>", "é" * 10**5, "(1x1),...,(99x99)",
    [], {}, [[]], [None], [0, 0], [48000, 48000], [1.5] * 3, [-1] * 1000, {"a": {"b": []}},
)  # fmt: skip
STRANGE = (
    b"", b"\n", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    b"PK\x03\x04", b"\x80\x04\x95", b"[]", b"null", b'{"a":' * 10**5, b"[" * 10**5, b"\xff" * 10**6,
    b"\xff\xfe{\x00}\x00", b"\x00" * 10**5, b"9" * 10**5, b'{"a": ' + b"9" * 10**5 + b"}",
)  # fmt: skip


def spot(rng: Random, size: int) -> int:
    """A place in a file: often in its head, sometimes in its tail, where the tables are."""
    where = rng.random()
    if where < 0.4:
        return rng.randrange(min(size, 512))
    return rng.randrange(max(0, size - 4000), size) if where < 0.6 else rng.randrange(size)


def damage(rng: Random, data: bytes) -> bytes:
    """Bytes flipped, numbers replaced, stretches cut out, doubled or overwritten."""
    new = bytearray(data or b"\x00")
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not new:
            break
        at, length = spot(rng, len(new)), rng.choice((1, 4, 16, 200, 5000))
        match rng.randrange(8):
            case 0 | 1:
                for _ in range(rng.choice((1, 5, 50))):
                    new[spot(rng, len(new))] = rng.randrange(256)
            case 2:
                put(rng, new, at)
            case 3:  # the size in front of a name of four letters, or a number behind it
                tags = [t.start() for t in re.finditer(rb"[a-zA-Z][a-zA-Z0-9]{3}", new)][:400]
                put(rng, new, max(0, rng.choice(tags or [at]) + rng.choice((-4, 4, 8, 12, 16, 20))))
            case 4:
                del new[at:]
            case 5:
                del new[at : at + length]
            case 6:
                other = spot(rng, len(new))
                new[at:at] = new[other : other + length]
            case 7:
                new[at : at + length] = rng.choice((bytes(length), rng.randbytes(length)))
    return bytes(new)


def put(rng: Random, data: bytearray, at: int) -> None:
    """A number that is often an edge of something, of 2, 4 or 8 bytes, in either order."""
    size, order = rng.choice((2, 4, 4, 8)), rng.choice(("big", "little"))
    data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, order)


def retell(rng: Random, data: bytes, beside: tuple[Any, ...] = ()) -> bytes:
    """A JSON file with some values replaced, moved, lost or repeated; `beside`: values to try."""
    tree = {"": json.loads(data)}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parent, key = pick(rng, tree)
        match rng.randrange(8):
            case 0 | 1 | 2:
                parent[key] = rng.choice(VALUES + beside)
            case 3:
                from_parent, from_key = pick(rng, tree)
                parent[key] = json.loads(json.dumps(from_parent[from_key]))
            case 4 if key != "":
                del parent[key]
            case 5 if isinstance(parent, dict) and key != "":
                parent[rng.choice(("", "\n", key + "x", "é" * 300))] = parent.pop(key)
            case 6 if isinstance(parent[key], list | str):
                parent[key] = parent[key] * rng.choice((2, 1000))
            case 7 if isinstance(parent[key], int | float):
                parent[key] *= rng.choice((-1, 2, 3, 0.1, 1000))
    text = json.dumps(tree[""], ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    return damage(rng, text) if rng.random() < 0.1 else text


def pick(rng: Random, tree: Any) -> tuple[Any, Any]:
    """A (parent, key) of a tree, each level as likely as the others, however full it is."""
    parent, key = tree, ""
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.75:
        parent = parent[key]
        key = rng.choice(sorted(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    return parent, key
