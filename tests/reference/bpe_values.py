"""Makes tests/text/bpe_values.h: a byte-level BPE, and what Hugging Face's tokenizers make of texts and ids with it.

    python tests/reference/bpe_values.py > tests/text/bpe_values.h

Needs tokenizers.
"""

import json
import textwrap

from tokenizers import Tokenizer, __version__, models, pre_tokenizers, trainers

TEXTS = [
    "The cat sat on the mat; the dog, that's the neighbours', didn't.",
    "the cats and the dogs chatted on and on and on",
    "They've said we'll see it in 1999, in 1909 or in 2019.", "straße, naïve café, naïve cafés, die Straßen",
    "  two blanks  between  words\n\tand a tab,\n\nand lines", "banana bandana banana", "中国 中国人 日本",
    "abcabcabcab abc bc ab",
]
SETTINGS = {"vocabulary_size": 300, "min_frequency": 2, "special_tokens": ["<|endoftext|>", "<pad>"],
            "add_prefix_space": False}


def trained():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=SETTINGS["vocabulary_size"], min_frequency=SETTINGS["min_frequency"], show_progress=False,
        special_tokens=SETTINGS["special_tokens"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {**json.loads(tokenizer.to_str()), "post_processor": byte_level, "decoder": byte_level}


def added(id, content, special=False, **flags):
    return {"id": id, "content": content, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": special, **flags}


FILE = trained()
SIZE = len(FILE["model"]["vocab"])
MERGES = FILE["model"]["merges"]
ADDED = FILE["added_tokens"] + [added(SIZE, "<mask>", special=True, lstrip=True), added(SIZE + 1, "é X", rstrip=True),
                                added(SIZE + 2, "zz", single_word=True, normalized=True), added(SIZE + 3, "<<"),
                                added(SIZE + 4, "<<<")]
CLS_SEP = {"sep": ["<pad>", 1], "cls": ["<|endoftext|>", 0]}
VARIANTS = {  # JSON merge patches
    "as it is": {},
    "prefix": {"pre_tokenizer": {"add_prefix_space": True}, "added_tokens": ADDED},
    "one word": {"pre_tokenizer": {"use_regex": False}},
    "strings, no type": {"model": {"type": None, "merges": ["#version: 0.2"] + [" ".join(merge) for merge in MERGES]}},
    "ignore_merges": {"model": {"ignore_merges": True, "merges": MERGES[::3]}},
    "backwards": {"model": {"merges": MERGES[::-1]}},
    "twice": {"model": {"merges": MERGES + MERGES[::-2]}},
    "roberta": {"post_processor": {"type": "RobertaProcessing", **CLS_SEP}, "added_tokens": ADDED},
    "bert": {"post_processor": {"type": "BertProcessing", **CLS_SEP,
                                **dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"))}},
    "nothing after": {"post_processor": None},
}
ENCODED = TEXTS + [
    "", " ", "\n", " \n x", "x  ", "a  b   c \t d\n\ne", "'s 'S ''s it's'd 'll'l 're've'm'r", "1a2 ²½Ⅷ٣ x1y",
    "\u00a0a\u2003b\u3000 c\u0085d",
    "e\u0301 né", "👩\u200d👩\u200d👧 👍🏽!?", "zz zzz  zz. <<<<< <mask>  <mask>é X  é Xzz <|endoftext|>the",
    "\0\x01\x7f\xad\ufeff\U0010ffff",
]
PAIRS = [("the cat", "the dog sat"), ("", "on"), ("and on and on", "")]
CUT = [("the cats and the dogs", None), ("the cats and the dogs", "on and on and on")]


def merge_patch(target, patch):
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def encoded(tokenizer, variant, a, b=None, max_length=None):
    tokenizer.no_truncation()
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
    encoding = tokenizer.encode(a, b)
    request = {"a": a, "b": b, "max_length": max_length}
    return {"variant": variant, **{key: value for key, value in request.items() if value is not None},
            "ids": encoding.ids, "type_ids": encoding.type_ids}


def show(name, value):
    print(f"inline constexpr const char* {name} =")
    for line in textwrap.wrap(json.dumps(value), 95, drop_whitespace=False, break_on_hyphens=False):
        print(f'    R"json({line})json"')
    print("    ;\n")


encodings, decodings = [], []
for name, patch in VARIANTS.items():
    made = merge_patch(FILE, patch)
    if name == "nothing after":
        made["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(made))
    full = name in ("as it is", "roberta")
    encodings += [encoded(tokenizer, name, text) for text in (ENCODED if full or name == "prefix" else TEXTS[::2])]
    encodings += [encoded(tokenizer, name, a, b) for a, b in PAIRS]
    if full:
        encodings += [encoded(tokenizer, name, a, b, length) for a, b in CUT for length in (4, 5, 8, 9, 11, 12)]
        ids = [tokenizer.encode(text).ids for text in ENCODED[2:]] + [[0, 1, 260, 0], [], [150, 151, 100, 2, 200, 255, 299]]
        ids = [row[2:-2] if i % 2 else row for i, row in enumerate(ids)]
        decodings += [{"variant": name, "ids": row, "skip": skip,
                       "text": tokenizer.decode(row, skip_special_tokens=skip)} for row in ids for skip in (False, True)]

print(f"""// Made by tests/reference/bpe_values.py: a byte-level BPE, and what Hugging Face's tokenizers {__version__} make of
// texts and ids with it. All in JSON.
#pragma once

namespace bpe_values {{

// clang-format off""")
show("training_json", {"texts": TEXTS, "settings": SETTINGS})
show("tokenizer_json", FILE)
show("variants_json", VARIANTS)
show("encodings_json", encodings)
show("decodings_json", decodings)
print("// clang-format on\n\n}  // namespace bpe_values")
