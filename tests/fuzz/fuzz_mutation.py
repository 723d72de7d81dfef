"""Changes that a dishonest author would make to the plain values in a file."""

import base64
import copy
import json

VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        255,
        2**20,
        2**31,
        2**63,
        2**64,
        10**30,
        1e308,
        -0.0,
        0.5,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "a" * 300,
        "0" * 64,
        "\x00",
        "\ud800",
        "\n\x1b[2J",
        "../x",
        "/dev/zero",
        "${oc.env:HOME}",
        "{0.__class__}",
        "e\u0301",
    ),
    *([], [[]], [0] * 70, {}, {"": 0}, {"_target_": "os.system"}, [{"a": 1}]),
)


def places(value, found=None):
    """Return every (container, key) in plain values."""
    found = [] if found is None else found
    for key, child in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        found.append((value, key))
        places(child, found)
    return found


def changed(value, rng):
    """Return plain values with one to four changes."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        container, key = rng.choice(places(root))
        kind = rng.randrange(7)
        if kind == 0 and container is not root:
            del container[key]
        elif kind == 1:
            other, at = rng.choice(places(root))
            container[key] = copy.deepcopy(other[at])
        elif kind == 2 and isinstance(container, list) and container is not root:
            container[key:key] = [copy.deepcopy(container[key])] * rng.choice((1, 2, 40))
        elif kind == 3 and isinstance(container, dict):
            container[rng.choice(("", "x", "__class__", "_target_", str(key) + "_"))] = container[key]
        elif kind == 4:
            container[key] = (
                [container[key]] if rng.random() < 0.5 else nested(container[key], rng.choice((3, 300)))
            )
        else:
            container[key] = nudged(container[key], rng)
    return root[0]


def nested(value, depth):
    for _ in range(depth):
        value = [value]
    return value


def nudged(value, rng):
    """Return a value near the given one, or one that often causes trouble."""
    if rng.random() < 0.4:
        if type(value) is int:
            return rng.choice(
                (value + 1, value - 1, -value, value * 2, value * 2**16, float(value), str(value))
            )
        if isinstance(value, str) and value:
            at = rng.randrange(len(value))
            return value[:at] + rng.choice(("", value[at] * 2, "0", "f", "\x00", "\u202e")) + value[at + 1 :]
    return copy.deepcopy(rng.choice(VALUES))


def from_json(data):
    return json.loads(data)


def to_json(value):
    return json.dumps(value).encode()


def to_canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def from_lines(data):
    return [json.loads(line) for line in data.splitlines()]


def to_lines(value):
    return b"".join(json.dumps(line).encode() + b"\n" for line in value)


def from_der(data):
    """Return DER or PEM as lists of parts, primitive contents in hexadecimal."""
    if data.startswith(b"-----BEGIN"):
        blocks = data.split(b"-----BEGIN CERTIFICATE-----")[1:]
        return {"pem": [_parts(base64.b64decode(block.split(b"-----")[0])) for block in blocks]}
    return _parts(data)


def to_der(value):
    if isinstance(value, dict) and "pem" in value:
        texts = [base64.encodebytes(_joined(parts)) for parts in value["pem"]]
        return b"".join(
            b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n" for text in texts
        )
    return _joined(value)


def _parts(data):
    parts, at = [], 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if length >= 0x80:
            n = length & 0x7F
            length = int.from_bytes(data[at : at + n], "big")
            at += n
        content = data[at : at + length]
        at += length
        parts.append(
            {"tag": tag, "parts": _parts(content)} if tag & 0x20 else {"tag": tag, "hex": content.hex()}
        )
    return parts


def _joined(parts):
    data = b""
    for part in parts:
        content = bytes.fromhex(part["hex"]) if "hex" in part else _joined(part["parts"])
        length = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
        data += (
            bytes([part["tag"], *([len(content)] if len(content) < 0x80 else [0x80 | len(length), *length])])
            + content
        )
    return data
