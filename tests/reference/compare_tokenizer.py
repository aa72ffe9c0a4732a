#!/usr/bin/env python3
"""Compares our tokenizers with Hugging Face's `tokenizers` on fresh random texts and every assigned code point.

usage: compare_tokenizer.py PROGRAM MODEL_DIR [COUNT] [--seed N] [--all]
PROGRAM is the built tests/text/tokenize_lines.cpp; MODEL_DIR holds a WordPiece tokenizer.json; COUNT random
texts (default 100000). Compared are ids and type ids of
 * COUNT random texts and pairs, half of them cut to a random length, and every code point that may be assigned alone,
   and between letters (with made-up tokenizers also among combining marks), with the model's own tokenizer.json;
 * the same, with fewer random texts, with tokenizers made up here: a vocabulary of single characters, so that no
   difference hides behind the unknown token; choices of the normalizer's options (with --all each of the 24, else
   eight drawn anew in every run); added tokens with all their flags; BertProcessing;
 * the same with byte-level BPEs trained here on random texts, some with their merges thinned out and shuffled: every
   choice of options and post-processor, both forms of merges; and the texts that ids become again;
 * the same with RoBERTa's byte-level BPE; and with Unigrams trained here, some with scores that make many cuts equally
   likely, behind every normalizer and pre-tokenizer, SentencePiece's tables of replacements among them;
 * the same with folders that hold no tokenizer.json, but vocab.txt, vocab.json and merges.txt, or a SentencePiece
   model, with every kind of settings, as AutoTokenizer reads them; also the tokenizer.json each stands for;
and, of BPEs trained by both sides on the same texts, the whole tokenizer.json.
Exit status 1 if anything differs but what KNOWN, SINGLE_WORD, NewerLetters and Newer describe.
"""
import argparse
import collections
import itertools
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import unicodedata

import made_tokenizers
from tokenizers import Tokenizer, __version__, models, pre_tokenizers, trainers

# The only code points whose texts may differ, and only with the tokenizers made up here (a model that has
# no such letters in its vocabulary makes the same unknown token of both cases): capital letters that came
# with Unicode 16 and 17, of which an older ICU does not know the small ones. Found by this script.
KNOWN = {c: "lower case came with Unicode 16 or 17; equal from ICU 76 or 78 on" for c in [
    0x1C89, 0xA7CB, 0xA7CC, 0xA7CE, 0xA7D2, 0xA7D4, 0xA7DA, 0xA7DC, *range(0x10D50, 0x10D66), *range(0x16EA0, 0x16EB9)]}

# For the same reason an added token with `single_word` may be found before or behind a letter that came later
# than the ICU in use: for the older one it is no letter. Python's own Unicode stands for ICU's here.
SINGLE_WORD = re.compile("(.?)(?:w[oö]rd|wo|<y z>|<<)(.?)", re.IGNORECASE | re.DOTALL)


def newer_letter_beside_token(text):
    return any(c and unicodedata.category(c) == "Cn" for match in SINGLE_WORD.finditer(text) for c in match.groups())



class NewerLetters:
    """The letters and digits of `tokenizers` that came later than the Unicode of this Python, which is no newer than
    ICU's: for an older ICU they are neither, which moves the ends of BPE's words."""

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def __contains__(self, c):
        joins = lambda other: len(self.words.pre_tokenize_str(other + chr(c) + other)) == 1
        return unicodedata.category(chr(c)) == "Cn" and (joins("a") or joins("1"))

    def __getitem__(self, c):
        return "a letter or digit newer than this ICU"


class Newer:
    """What came later than the Unicode of this Python, which is no newer than ICU's: for an older ICU it is neither a
    number nor part of a grapheme."""

    def __contains__(self, c):
        return unicodedata.category(chr(c)) == "Cn"

    def __getitem__(self, c):
        return "newer than this ICU"


SURROGATES = range(0xD800, 0xE000)
POOLS = {  # name: (weight, characters)
    "letters": (8, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "words": (8, ["the", "unaffable", "Description", "library", "for", "don't", "e-mail", "C++", "naïve", "STRASSE"]),
    "digits and marks": (4, "0123456789.,;:!?-_'\"()[]{}<>#$%&*+/=@\\^`|~"),
    "white space": (3, "  \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"),
    "control and format": (2, "\0\x01\x08\x0e\x7f\x80\x9f\xad\u061c\u180e\u200b\u200c\u200d\u200e\u2060\u2066\ufeff"
                              "\ufff9\ufffd\ue000\uf8ff\U000e0001\U000e0041\U000f0000\U0010fffd"),
    "special": (2, ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[mask]", "[MASK", "MASK]", "##", "##ing", "[unused5]",
                    "<x>", "<Y z>", "wörd", "wo", "Ａ", "<<", "<<<", " s p "]),
    "latin": (3, "".join(map(chr, range(0xA1, 0x250))) + "İıſßẞǅǆŉΐﬁﬀꟋꟜ"),
    "marks": (3, [chr(c) for c in itertools.chain(range(0x300, 0x370), range(0x483, 0x48A), range(0x591, 0x5C8),
                                                  range(0x64B, 0x660), range(0x1AB0, 0x1B00), range(0x1DC0, 0x1E00),
                                                  range(0x20D0, 0x20F1), range(0xFE20, 0xFE30), range(0x302A, 0x3030),
                                                  range(0x1D165, 0x1D17A), range(0x1E8D0, 0x1E8D7))]),
    "greek, cyrillic": (3, "".join(map(chr, range(0x370, 0x530))) + "".join(map(chr, range(0x1F00, 0x2000)))),
    "hebrew, arabic": (2, "".join(map(chr, range(0x590, 0x750)))),
    "indic": (2, "".join(map(chr, range(0x900, 0xE00)))),
    "other scripts": (2, "".join(map(chr, range(0xE00, 0x1400))) + "".join(map(chr, range(0x1700, 0x1C80)))),
    "kana, ideographs": (3, "".join(map(chr, range(0x3000, 0x3100))) + "".join(map(chr, range(0x4E00, 0x4F00)))
                         + "豈﨑\u9fff\u3400\U00020000\U0002b820\U0002b920\U0002f800\U00030000"),
    "hangul": (2, "".join(map(chr, range(0xAC00, 0xAD00))) + "".join(map(chr, range(0x1100, 0x1200)))),
    "signs": (2, "".join(map(chr, range(0x2010, 0x2800)))),
    "apostrophes": (2, ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'L", "\u2019s", "''", "it's", "we'll", " '", "l'an"]),
    "emoji": (2, ["😀", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "❤️", "1️⃣", "🏴\U000e0067\U000e007f"]),
    "wide": (1, "".join(map(chr, range(0xFF00, 0xFFF0)))),
}


def random_text(rng):
    weights = [weight for weight, _ in POOLS.values()]
    pools = [pool for _, pool in POOLS.values()]
    chosen = rng.choices(pools, weights, k=rng.randint(1, 4))  # texts of few scripts, as real ones are
    parts = []
    for _ in range(rng.choice([0, 1, 2, 5, 10, 20, 40])):
        kind = rng.random()
        if kind < 0.02:
            c = rng.randrange(0x110000 - len(SURROGATES))
            parts.append(chr(c if c < SURROGATES.start else c + len(SURROGATES)))
        elif kind < 0.03:
            parts.append(rng.choice(rng.choice(chosen)) * rng.choice([50, 99, 100, 101, 130]))  # long words
        else:
            parts.append(rng.choice(rng.choice(chosen)))
            if rng.random() < 0.15:
                parts.append(" ")
    return "".join(parts)


def random_requests(rng, count, least=3):
    for _ in range(count):
        request = {"a": random_text(rng)}
        if rng.random() < 0.3:
            request["b"] = random_text(rng)
        if rng.random() < 0.5:
            request["max_length"] = max(least, rng.choice([3, 4, 5, 8, 9, 16, 17, 48, 128]))
        yield request


def code_points(step=1):
    """Every one but of planes in which none is assigned or all are private; of those a few."""
    for c in itertools.chain(range(0, 0x34000, step), range(0x34000, 0xE0000, 0x1000), range(0xE0000, 0xE1000, step),
                             range(0xE1000, 0x110000, 0x1000)):
        if c not in SURROGATES:
            yield c


def code_point_requests(marks):
    for c in code_points():
        # The last one shows the order of marks: the two around it are kept when accents are stripped.
        for text in (chr(c), f"a{chr(c)}b", f"e{chr(c)}\u0301\u0327 ", f"o\U0001d16d{chr(c)}\U0001d165")[:4 if marks else 2]:
            yield {"a": text}


def expected(tokenizer, requests):
    """Hugging Face's answers, in batches of one length."""
    answers = [None] * len(requests)
    groups = collections.defaultdict(list)
    for i, request in enumerate(requests):
        if "ids" in request:
            answers[i] = tokenizer.decode(request["ids"], skip_special_tokens=request["skip_special_tokens"])
        else:
            groups[request.get("max_length")].append(i)
    for max_length, members in groups.items():
        tokenizer.no_truncation()
        if max_length is not None:
            tokenizer.enable_truncation(max_length)
        inputs = [(requests[i]["a"], requests[i]["b"]) if "b" in requests[i] else requests[i]["a"] for i in members]
        for i, encoding in zip(members, tokenizer.encode_batch(inputs)):
            answers[i] = (encoding.ids, encoding.type_ids)
    return answers


def ours(program, tokenizer_json, requests):
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    run = subprocess.run([program, tokenizer_json], input=lines.encode(), stdout=subprocess.PIPE, check=True)
    answers = []
    for line in run.stdout.decode().split("\n")[:-1]:
        if "\t" not in line:
            answers.append(json.loads(line))
            continue
        ids, type_ids = line.split("\t")
        answers.append(([int(i) for i in ids.split()], [int(i) for i in type_ids.split()]))
    return answers


class Comparison:
    def __init__(self, program):
        self.program, self.compared, self.known, self.unknown, self.beside = program, 0, {}, 0, 0

    def run(self, title, path, requests, excused=KNOWN, tokenizer=None):
        """`path` is a tokenizer.json; or a folder, of which `tokenizer` is Python's."""
        tokenizer = tokenizer or Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        compared = different = 0
        iterator = iter(requests)
        while block := list(itertools.islice(iterator, 200000)):
            mine = ours(self.program, str(path), block)
            if len(mine) != len(block):
                sys.exit(f"{title}: {len(block)} texts, but {len(mine)} answers")
            for request, theirs, own in zip(block, expected(tokenizer, block), mine):
                compared += 1
                if theirs == own:
                    continue
                text = request.get("a", "") + "\n" + request.get("b", "")
                known = {c: excused[c] for c in set(map(ord, text)) if c in excused}
                if known:
                    self.known.update(known)
                    continue
                if excused and newer_letter_beside_token(text):
                    self.beside += 1
                    continue
                different += 1
                if different <= 20:
                    print(f"  differs: {json.dumps(request)}\n    theirs {theirs}\n    ours   {own}")
        print(f"{title}: compared {compared}, unexpected differences {different}", flush=True)
        self.compared += compared
        self.unknown += different


def character_tokenizer(normalizer, added_tokens=(), bert_processing=False):
    """A tokenizer.json in which (nearly) every character is a token."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "wo", "##rd", "word"]
    for c in itertools.chain(range(1, 0x32400), range(0xE0000, 0xE0200)):
        if c not in SURROGATES:
            tokens += [chr(c), "##" + chr(c)]
    vocabulary = {}
    for token in tokens:
        vocabulary.setdefault(token, len(vocabulary))
    added = [dict(content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for t in tokens[:5]] + [dict(special=False, **a) for a in added_tokens]
    fresh = itertools.count(len(vocabulary))
    for entry in added:
        entry["id"] = vocabulary[entry["content"]] if entry["content"] in vocabulary else next(fresh)
    sequence = lambda name, type_id: {"Sequence": {"id": name, "type_id": type_id}}
    special = lambda name, type_id: {"SpecialToken": {"id": name, "type_id": type_id}}
    post_processor = {
        "type": "TemplateProcessing",
        "single": [special("[CLS]", 0), sequence("A", 0), special("two", 7)],
        "pair": [special("[CLS]", 3), sequence("B", 1), special("two", 0), sequence("A", 2)],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                           "two": {"id": "two", "ids": [3, 4], "tokens": ["[SEP]", "[MASK]"]}},
    }
    if bert_processing:
        post_processor = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", **normalizer}, "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": post_processor, "decoder": None,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocabulary},
    }


def flagged(content, flags, normalized):
    return dict(content=content, single_word="w" in flags, lstrip="l" in flags, rstrip="r" in flags,
                normalized=normalized)


ADDED = [
    [flagged("<x>", "", False), flagged("<Y z>", "", True), flagged("wörd", "w", True), flagged("<<", "l", False),
     flagged("<<<", "r", False), flagged("豈", "", True)],
    [flagged("<x>", "lr", True), flagged("wo", "wlr", False), flagged("<Y z>", "w", False), flagged("Ａ", "lr", True),
     flagged(" s p ", "", False), flagged("<<", "rw", True)],
]


def bpe_settings(rng):
    return {"vocabulary_size": rng.choice([262, 300, 600, 1500, 3000]), "min_frequency": rng.choice([0, 2, 5]),
            "special_tokens": rng.choice([[], ["<|endoftext|>"], ["<s>", "</s>", "<pad>", "the"]]),
            "add_prefix_space": rng.random() < 0.5}


def train_bpe(settings, texts, use_regex=True):
    """A tokenizer.json of Hugging Face's trainer. Without `use_regex` merges are learned across the ends of words, so
    that wherever a word ends by mistake, other ids come out."""
    tokenizer = Tokenizer(models.BPE())
    flags = dict(add_prefix_space=settings["add_prefix_space"], trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings["add_prefix_space"],
                                                       use_regex=use_regex)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=settings["vocabulary_size"], min_frequency=settings["min_frequency"], show_progress=False,
        special_tokens=settings["special_tokens"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    byte_level = {"type": "ByteLevel", **flags}
    return {**json.loads(tokenizer.to_str()), "post_processor": byte_level, "decoder": byte_level}


def compare_training(comparison, rng):
    texts = [random_text(rng) for _ in range(rng.choice([20, 300, 1000]))]
    settings = bpe_settings(rng)
    run = subprocess.run([comparison.program, "--train", json.dumps(settings)], check=True, stdout=subprocess.PIPE,
                         input="".join(json.dumps(text) + "\n" for text in texts).encode())
    theirs, own = train_bpe(settings, texts), json.loads(run.stdout)
    differing = [key for key in theirs if theirs[key] != own.get(key)]
    # Words are cut otherwise at newer letters, so what is learned there may differ.
    if differing and not any(c in NewerLetters() for text in texts for c in map(ord, text)):
        comparison.unknown += 1
        print(f"  training differs in {differing}: {settings}")
    comparison.compared += 1


def bpe_tokenizer(rng, added_tokens):
    """A trained tokenizer.json, changed in everything a file may choose."""
    made = train_bpe({**bpe_settings(rng), "special_tokens": ["<s>", "</s>", "<pad>"]},
                     [random_text(rng) for _ in range(500)], use_regex=rng.random() < 0.3)
    model, byte_level = made["model"], dict(made["decoder"])
    if rng.random() < 0.5:  # tokens that no merges build, and pairs that build the same
        rng.shuffle(model["merges"])
        del model["merges"][len(model["merges"]) * 3 // 4:]
    if rng.random() < 0.5 and not any(" " in part for merge in model["merges"] for part in merge):
        model["merges"] = ["#version: 0.2"] * rng.randrange(2) + [" ".join(merge) for merge in model["merges"]]
    if rng.random() < 0.3:
        del model["type"]
    model["ignore_merges"] = rng.random() < 0.5
    made["pre_tokenizer"]["use_regex"] = rng.random() < 0.8
    fresh = itertools.count(len(model["vocab"]))
    made["added_tokens"] += [{"id": model["vocab"].get(token["content"]) or next(fresh), **token,
                              "special": rng.random() < 0.5} for token in added_tokens]
    pieces = lambda *names: [{"Sequence": {"id": n, "type_id": ord(n) - 65}} if n in "AB" else
                             {"SpecialToken": {"id": n, "type_id": 1}} for n in names]
    made["post_processor"] = rng.choice([
        None, byte_level,
        {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0], "trim_offsets": True,
         "add_prefix_space": True},
        {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]},
        {"type": "TemplateProcessing", "single": pieces("<s>", "A"), "pair": pieces("<s>", "A", "</s>", "B", "</s>"),
         "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in enumerate(("<s>", "</s>"))}}])
    return made


def decoding_requests(rng, made, count):
    vocabulary = made["model"]["vocab"]
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))),
           *(token["id"] for token in made["added_tokens"])]
    for _ in range(count):
        yield {"ids": rng.choices(ids, k=rng.choice([0, 1, 5, 50])), "skip_special_tokens": rng.random() < 0.5}


def class_bpe():
    """A tokenizer.json that shows of what class a character is: "a" joins with its first byte where both are letters,
    and so on, if they are one word."""
    made = train_bpe({"vocabulary_size": 256, "min_frequency": 0, "special_tokens": [], "add_prefix_space": False}, [])
    vocabulary = made["model"]["vocab"]
    made["model"]["merges"] = [[first, byte] for first in "a1!\u0120\u010a" for byte in list(vocabulary)]
    for merge in made["model"]["merges"]:
        vocabulary["".join(merge)] = len(vocabulary)
    return made


def class_requests(at_once=8):
    for start in code_points(at_once):
        yield {"a": "".join(f"{c} a{c}1{c}!{c}\n{c}" for c in map(chr, range(start, start + at_once)))}


def compare_folders(comparison, rng, parent, count):
    from transformers import AutoTokenizer
    for i in range(20):
        kind = ("bert", "roberta", "gpt2", "deberta-v2", "xlm-roberta")[i % 5]
        folder = parent / f"folder{i}"
        folder.mkdir()
        style = made_tokenizers.write_folder(rng, folder, kind, [random_text(rng) for _ in range(300)])
        theirs = AutoTokenizer.from_pretrained(folder)
        run = subprocess.run([comparison.program, "--folder", folder], check=True, stdout=subprocess.PIPE)
        made, own = json.loads(theirs.backend_tokenizer.to_str()), json.loads(run.stdout)
        pad = (own["padding"] or {}).get("pad_id")
        a, b = made_tokenizers.plain(made), made_tokenizers.plain(own)
        differing = [key for key in a if a[key] != b[key]] + ["padding"] * (pad != theirs.pad_token_id)
        if differing:
            comparison.unknown += 1
            print(f"  folder of {kind}, {style}: differs in {differing}")
            for key in [k for k in differing if k in a and k != "model"]:
                print(f"    theirs {json.dumps(a[key])}\n    ours   {json.dumps(b[key])}")
        requests = itertools.chain(random_requests(rng, count, least=4), decoding_requests(rng, made, count // 2))
        comparison.run(f"folder of {kind}, settings {style}", folder, requests, Newer(), theirs.backend_tokenizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("model_dir", type=pathlib.Path)
    parser.add_argument("count", type=int, nargs="?", default=100000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    print(f"tokenizers {__version__}, seed {arguments.seed}")
    rng = random.Random(arguments.seed)
    comparison = Comparison(arguments.program)
    model = arguments.model_dir / "tokenizer.json"
    comparison.run("model, random texts", model, random_requests(rng, arguments.count), {})
    comparison.run("model, every code point", model, code_point_requests(False), {})

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tokenizer.json"
        plain = dict(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
        path.write_text(json.dumps(character_tokenizer(plain)))
        comparison.run("characters, every code point", path, code_point_requests(True))
        choices = list(itertools.product((False, True), (False, True), (None, False, True), (False, True)))
        if not arguments.all:
            choices = rng.sample(choices, 8)
        for i, choice in enumerate(choices):
            normalizer = dict(zip(plain, choice))
            path.write_text(json.dumps(character_tokenizer(normalizer, ADDED[i % 2], i % 3 == 0)))
            comparison.run(f"characters {normalizer}, added tokens {i % 2}", path,
                           random_requests(rng, max(100, arguments.count // 50)))

        for i in range(8):
            made = bpe_tokenizer(rng, ADDED[i % 2])
            path.write_text(json.dumps(made))
            requests = itertools.chain(random_requests(rng, max(100, arguments.count // 50), least=4),
                                       decoding_requests(rng, made, max(100, arguments.count // 100)))
            choices = {"ignore_merges": made["model"]["ignore_merges"], **made["pre_tokenizer"],
                       "post_processor": (made["post_processor"] or {}).get("type")}
            comparison.run(f"BPE {choices}, added tokens {i % 2}", path, requests, NewerLetters())
        path.write_text(json.dumps(class_bpe()))
        comparison.run("BPE, every assigned code point", path, class_requests(), NewerLetters())

        few = max(100, arguments.count // 50)
        texts = [random_text(rng) for _ in range(1000)]
        for _ in range(2):
            made = made_tokenizers.roberta_tokenizer(rng, texts)
            path.write_text(json.dumps(made))
            requests = itertools.chain(random_requests(rng, 4 * few, least=4), decoding_requests(rng, made, few))
            comparison.run(f"RoBERTa {made['pre_tokenizer']}", path, requests, NewerLetters())
        maps = made_tokenizers.charsmaps(texts)
        for i in range(24):
            made = made_tokenizers.unigram_tokenizer(rng, texts, maps, ADDED[i % 2])
            path.write_text(json.dumps(made))
            requests = itertools.chain(random_requests(rng, few, least=4), decoding_requests(rng, made, few // 2))
            parts = [[p["type"] for p in (part or {}).get(name, [part or {"type": None}])] for name, part in
                     (("normalizers", made["normalizer"]), ("pretokenizers", made["pre_tokenizer"]))]
            comparison.run(f"Unigram {parts}, added tokens {i % 2}", path, requests, Newer())
        compare_folders(comparison, rng, pathlib.Path(folder), few)
        for _ in range(20):
            compare_training(comparison, rng)
        print(f"training: compared 20 tokenizers, unexpected differences so far {comparison.unknown}", flush=True)

    print(f"compared {comparison.compared} texts; known differences in {len(comparison.known)} code points, "
          f"unexpected differences {comparison.unknown}")
    for reason in sorted(set(comparison.known.values())):
        points = [f"U+{c:04X}" for c, why in sorted(comparison.known.items()) if why == reason]
        print(f"  {reason}: {' '.join(points[:60])}" + (f" and {len(points) - 60} more" if len(points) > 60 else ""))
    if comparison.beside:
        print(f"  {comparison.beside} texts: a single-word token beside a letter newer than this ICU")
    gone = set(KNOWN) - set(comparison.known)
    if gone:
        print("listed, but equal here: " + " ".join(f"U+{c:04X}" for c in sorted(gone)))
    return 1 if comparison.unknown else 0


if __name__ == "__main__":
    sys.exit(main())
