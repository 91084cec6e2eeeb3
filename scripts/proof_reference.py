#!/usr/bin/env python3
"""A second implementation of docs/proofs.md, written from its text: prints the test vectors.

`pip install blake3`, then run it; `proof/commit.rs` pins the same values.
"""

import struct

from blake3 import blake3

MASK = (1 << 64) - 1
CHANNELS, SHIFT = 40, 4
EXPONENTS = [c % 5 - 2 for c in range(CHANNELS)]
MEANS = [c * 7 % 50 - 25 for c in range(CHANNELS)]


def u32(x):
    return struct.pack("<I", x)


def listed(b):
    return u32(len(b)) + b


def ids(v):
    return u32(len(v)) + b"".join(map(u32, v))


def named(name, *parts):
    return blake3(listed(name.encode()) + b"".join(parts)).digest()


def first_u64(h):
    return struct.unpack("<Q", h[:8])[0]


def philox(key, counter):
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def widen(bits):
    return struct.unpack("<f", u32(bits << 16))[0]


def mix(x):
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & MASK
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ (x >> 33)


def whiten(c, x):
    scaled = max(-65535.0, min(65535.0, x * 2.0 ** (EXPONENTS[c] + 8)))
    return max(-32767, min(32767, round(scaled) - MEANS[c]))


def sketch(key, position, row):
    sums = [0] * 4
    for c, bits in enumerate(row):
        words = philox(key, [position, c // 32, 0, 0x7369676E])
        for j in range(4):
            q = whiten(c, widen(bits))
            sums[j] += q if words[j] >> c % 32 & 1 else -q
    return bytes((s + (1 << SHIFT - 1) >> SHIFT) & 255 for s in sums)


def exact(key, position, row):
    base = key + position * 0x9E3779B97F4A7C15
    return sum(mix(base + (c << 16 | bits) & MASK) for c, bits in enumerate(row)) & MASK


def main():
    floats = struct.pack("<7f", 0.8, 1, 0, 0, 1, 0, 0)
    request = named("targon-engine/request/1", ids([1, 2, 3]), floats, u32(0), u32(0), b"\1",
                    struct.pack("<q", 42), u32(0), u32(64), u32(0), b"\0", ids([]), u32(1),
                    listed(b"END"), b"\0")
    calibration = named("targon-engine/calibration/1", u32(CHANNELS), bytes([SHIFT]),
                        struct.pack("<40b", *EXPONENTS), struct.pack("<40h", *MEANS))
    model = named("targon-engine/model/2", b"\1" * 32, listed(b"bf16"), listed(b"canon-2"),
                  b"\2" * 32)
    root = named("targon-engine/proof/1", b"\1", b"\7" * 32, request, model, b"\3" * 32)
    sign_key = first_u64(named("targon-engine/sketch/1", root))
    exact_key = first_u64(named("targon-engine/exact/1", root))
    noise = first_u64(named("targon-engine/sampler/nonce/1", b"\7" * 32, request))
    rows = [[0x3F00 + (i * 131 + c * 57) % 256 for c in range(CHANNELS)] for i in range(3)]
    hashes = [struct.pack("<Q", exact(exact_key, 10 + i, row)) for i, row in enumerate(rows)]
    data = b"".join(sketch(sign_key, 10 + i, row) for i, row in enumerate(rows))
    data += named("targon-engine/chunk/1", root, u32(3), b"".join(hashes))[:8]
    digest = blake3(root + u32(0) + ids([100, 101, 102]) + listed(data)).digest()
    end = named("targon-engine/proof-end/1", digest, u32(3), b"\4")
    nonce = named("targon-engine/nonce/1", listed(b"0d5c1a4e-8f0b-4a8e-9c1d-2b3c4d5e6f70"))
    for name, value in [("request", request), ("calibration", calibration), ("model", model),
                        ("root", root), ("chunk data", data), ("digest", digest), ("end", end),
                        ("nonce", nonce)]:
        print(f"{name:12} {value.hex()}")
    print(f"{'keys':12} {sign_key:016x} {exact_key:016x}")
    print(f"{'noise key':12} {noise:016x}")


if __name__ == "__main__":
    main()
