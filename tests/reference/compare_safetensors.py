"""Compares our safetensors reader and writer with Python's, live.

    python tests/reference/compare_safetensors.py --tool TOOL [--files 200] [--fuzz 20000]

1. Random files (every supported type, random shapes, odd names, metadata) written by Python are read by ours:
   metadata, order, types, shapes and every byte equal.
2. Ours writes them again: the bytes equal those of Python's writer, which also reads them.
3. Fuzz: valid files are damaged at random and read by both. A file that Python refuses must be refused by
   ours, one that both take must read the same; what only ours refuses is counted by reason, and each reason must be
   listed in STRICTER. The tool must never crash: build it with -fsanitize=address,undefined for this.

Needs torch and safetensors. Exit status 0 only when nothing differs.
"""

import argparse
import collections
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile

import safetensors
import safetensors.torch
import torch

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
         "BOOL": torch.bool}

# What ours refuses and Python takes, each for a reason.
STRICTER = {
    "is not supported": "a type that LibTorch, or the older of the two we support, does not have",
    "is given twice": "duplicate keys, of which Python keeps the last",
    "expected dtype, shape and data_offsets": "keys the format does not have",
    "must start with '{'": "the format says so; Python also takes white space before it",
    "must end with '}' and spaces": "the format pads with spaces only; Python takes other white space too",
    "must be an object, but it is null": "metadata that is null; Python takes it for none",
    "must be an object, but it is an array": "serde also builds a struct from an array of its fields' values",
    "is too large": "sizes beside a zero whose product overflows: LibTorch could not compute the strides",
}


def random_name(rng):
    alphabet = "abcdefghijklmnopqrstuvwxyz._0123456789" + "ABü\"\\/\n\t 漢😀\x01\x7f"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 24)))


def random_tensor(rng):
    shape = [rng.choice([0, 1, 1, 2, 3, 5]) for _ in range(rng.randrange(0, 5))]
    dtype = TYPES[rng.choice(list(TYPES))]
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    return torch.randint(0 if dtype == torch.uint8 else -100, 100, shape).to(dtype)


def random_file(rng):
    tensors = {random_name(rng): random_tensor(rng) for _ in range(rng.randrange(0, 9))}
    # More than one key of metadata, and Python's writer may put them in any order.
    metadata = rng.choice([{"format": "pt"}, {"format": rng.choice(["np", "ü\n\"", ""])}])
    return tensors, metadata


def raw_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def run(tool, *arguments):
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="halt_on_error=1")
    done = subprocess.run([tool, *arguments], capture_output=True, env=environment)
    if done.returncode != 0:
        error = done.stderr.decode(errors="replace")[-4000:]
        sys.exit(f"the tool failed with status {done.returncode}:\n{error}")
    return done.stdout.decode()


def dump(tool, paths, *options):
    lines = run(tool, "dump", *options, *paths).splitlines()
    assert len(lines) == len(paths), (len(lines), len(paths))
    return [json.loads(line) for line in lines]


def read_in_python(path):
    """What ours should print of a file, or the reason Python gives for refusing it."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
    except Exception as error:  # its exceptions have no common base, and a panic is one of them
        return str(error) or type(error).__name__, None, None
    names = {dtype: name for name, dtype in TYPES.items()}
    return None, metadata or {}, {
        name: {"dtype": names.get(tensor.dtype, str(tensor.dtype)), "shape": list(tensor.shape),
               "data": raw_bytes(tensor).hex()}
        for name, tensor in tensors.items()}


def compare_valid(tool, count, rng, folder):
    files, tensors_read = [], 0
    for i in range(count):
        tensors, metadata = random_file(rng)
        path = os.path.join(folder, f"valid{i}.safetensors")
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        files.append((path, tensors, metadata))
        tensors_read += len(tensors)
    paths = [path for path, _, _ in files]
    for options in ([], ["--no-map"]):
        for (path, tensors, metadata), ours in zip(files, dump(tool, paths, *options)):
            _, _, expected = read_in_python(path)
            assert ours == {"metadata": metadata, "names": ours["names"], "tensors": expected}, (path, ours)
            assert set(ours["names"]) == set(tensors), path
    run(tool, "copy", *(name for path in paths for name in (path, path + ".copy")))
    for path, tensors, _ in files:
        with open(path, "rb") as one, open(path + ".copy", "rb") as two:
            assert one.read() == two.read(), f"{path}: the bytes differ"
        back = safetensors.torch.load_file(path + ".copy")
        assert back.keys() == tensors.keys()
        assert all(raw_bytes(back[name]) == raw_bytes(tensors[name]) for name in tensors)
    print(f"valid files: {count} with {tensors_read} tensors read equal, mapped and not; "
          "written byte for byte equal")


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return data[8:8 + length].decode(), data[8 + length:]


def with_header(header, body):
    encoded = header if isinstance(header, bytes) else header.encode(errors="surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + body


def damage(data, rng):
    """One random change to a file: of bytes, of the header's text, or of what the header says."""
    kind = rng.randrange(10)
    header, body = header_of(data)
    if kind == 0:
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1:]
    if kind == 1:
        return data[:rng.randrange(len(data) + 1)]
    if kind == 2:
        return data + bytes(rng.randrange(1, 9))
    if kind == 3:
        length = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, len(header) + rng.randrange(-9, 10)])
        return struct.pack("<Q", max(length, 0) % 2**64) + data[8:]
    encoded = header.encode()
    if kind == 4:  # a few bytes of the header
        encoded = bytearray(encoded)
        for _ in range(rng.randrange(1, 4)):
            encoded[rng.randrange(len(encoded))] = rng.randrange(256)
        return with_header(bytes(encoded), body)
    if kind == 5:  # a piece of the header removed, doubled or moved
        a, b = sorted(rng.randrange(len(encoded) + 1) for _ in range(2))
        piece = encoded[a:b]
        place = rng.randrange(len(encoded) + 1)
        return with_header(rng.choice([encoded[:a] + encoded[b:], encoded[:a] + piece + encoded[a:],
                                       encoded[:place] + piece + encoded[place:]]), body)
    if kind == 6:  # a number
        numbers = list(re.finditer(r"\d+", header))
        if numbers:
            spot = rng.choice(numbers)
            value = int(spot.group())
            new = rng.choice([str(value + rng.randrange(-3, 4)), str(value * 2), "-1", "-0", "0", "1.0",
                              "1e1", "18446744073709551615", "18446744073709551616", "9223372036854775808",
                              "4294967296", "[]", "null", "\"1\"", "true", "01", ""])
            return with_header(header[:spot.start()] + new + header[spot.end():], body)
    if kind == 7:  # a type
        types = list(re.finditer(r'"dtype":"(\w+)"', header))
        if types:
            spot = rng.choice(types)
            new = rng.choice([*TYPES, "U16", "U32", "U64", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "F128",
                              ""])
            return with_header(header[:spot.start(1)] + new + header[spot.end(1):], body)
    content = json.loads(header)
    names = [name for name in content if name != "__metadata__"]
    if kind == 8 and names:  # two entries share or swap what they say
        a, b = rng.choice(names), rng.choice(names)
        field = rng.choice(["dtype", "shape", "data_offsets"])
        if rng.random() < 0.5:
            content[a][field] = content[b][field]
        else:
            content[a][field], content[b][field] = content[b][field], content[a][field]
        if rng.random() < 0.2:
            del content[a][field]
        return with_header(json.dumps(content), body)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    if names and rng.random() < 0.4:  # a name or a key given twice
        name = rng.choice(names)
        return with_header(text[:-1] + "," + json.dumps(name) + ":" + json.dumps(content[name]) + "}", body)
    return with_header(rng.choice([
        text + " ", text + "\n", text + "\0", text + "x", text + "{}", " " + text, "[" + text + "]", "{}",
        "[]", "null",
        text[:-1] + ",}", "\ufeff" + text, text.replace("{", "{\n", 1), text.replace('"format"', '"\\ud800"'),
        text.replace('"pt"', rng.choice(["1", "null", "{}", "[]", "true", '"\ud800"'])),
        text.replace('{"format": "pt"}', rng.choice(["null", "[]", "3", '{"a":"b","a":"c"}'])),
        text.replace('"dtype"', '"extra": 1, "dtype"', 1),
        text[:1] + '"deep":' + "[" * rng.choice([10, 10**5]) + text[1:],
        text[:1] + '"deep":' + '{"a":' * rng.choice([10, 10**5]) + text[1:],
    ]), body)


def fuzz(tool, count, rng, folder):
    seeds = []
    for i in range(60):
        path = os.path.join(folder, f"seed{i}.safetensors")
        tensors, metadata = random_file(rng)
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        with open(path, "rb") as file:
            seeds.append(file.read())
    both_refuse = both_take = 0
    stricter, problems = collections.Counter(), []
    for start in range(0, count, 500):
        paths = []
        for i in range(min(500, count - start)):
            data = rng.choice(seeds)
            for _ in range(rng.choice([1, 1, 1, 2])):
                try:
                    data = damage(data, rng)
                except (AttributeError, KeyError, RecursionError, TypeError, ValueError, struct.error):
                    break  # the first change left no header for the second
            paths.append(os.path.join(folder, f"fuzz{i}.safetensors"))
            with open(paths[-1], "wb") as file:
                file.write(data)
        mapped, unmapped = dump(tool, paths), dump(tool, paths, "--no-map")
        for path, ours, other in zip(paths, mapped, unmapped):
            refusal, metadata, tensors = read_in_python(path)
            problem = None
            if ours != other:
                problem = "mapped and read files differ"
            elif refusal is not None and "error" not in ours:
                problem = f"Python refuses it ({refusal}), ours takes it"
            elif refusal is not None:
                both_refuse += 1
            elif "error" in ours:
                reason = next((text for text in STRICTER if text in ours["error"]), None)
                stricter[reason] += 1
                if reason is None:
                    problem = f"Python takes it, ours refuses it: {ours['error']}"
            elif ours["metadata"] != metadata or ours["tensors"] != tensors:
                problem = "both take it and read different things"
            else:
                both_take += 1
            if problem:
                keep = os.path.join(tempfile.gettempdir(), f"safetensors-difference-{len(problems)}")
                os.replace(path, keep)
                problems.append(f"{keep}: {problem}")
    print(f"damaged files: {count}: both refuse {both_refuse}, both take and agree {both_take}, "
          f"only ours refuses {sum(stricter.values())}")
    for reason, times in stricter.most_common():
        print(f"  only ours, {times}: {reason}: {STRICTER.get(reason)}")
    for problem in problems[:20]:
        print("  DIFFERENCE", problem)
    return not problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", required=True)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--fuzz", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(2**32)
    print(f"safetensors {safetensors.__version__}, seed {seed}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        compare_valid(options.tool, options.files, rng, folder)
        return 0 if fuzz(options.tool, options.fuzz, rng, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
