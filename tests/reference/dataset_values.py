"""Prints the numbers of tests/text/test_dataset.cpp: hashes of texts and the order of an epoch.

    python tests/reference/dataset_values.py
"""

MASK = (1 << 64) - 1


def mix(h):
    h ^= h >> 33
    h = h * 0xFF51AFD7ED558CCD & MASK
    h ^= h >> 33
    h = h * 0xC4CEB9FE1A85EC53 & MASK
    return h ^ h >> 33


def h64(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = (h ^ byte) * 0x100000001B3 & MASK
    return mix(h)


def order(texts, seed, epoch):
    key = mix(1000 * seed + epoch + 1)
    return sorted(range(len(texts)), key=lambda i: mix(h64(texts[i]) ^ key))


print("mix(1)", f"{mix(1)}u")
print("h64 of ''", f"{h64('')}u")
print("h64 of 'café'", f"{h64('café')}u")
print("order of a…h, seed 0, epoch 0", order("abcdefgh", 0, 0))
print("order of a…h, seed 3, epoch 1", order("abcdefgh", 3, 1))
