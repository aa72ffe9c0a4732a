"""Makes tests/text/unigram_values.h: Unigram tokenizers, a SentencePiece file, folders with such a file or a byte-level
BPE, and what Hugging Face's libraries make of texts and ids with them.

    python tests/reference/unigram_values.py > tests/text/unigram_values.h

Needs tokenizers, transformers, sentencepiece and protobuf.
"""
import base64
import json
import pathlib
import tempfile
import textwrap

import made_tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, __version__
from transformers import AutoTokenizer
from transformers import __version__ as transformers_version

TEXTS = ["the cat sat on the mat", "the dogs and the cats chatted", "a naïve café, a test of tests: ½ ﬁve №5", "aaaa aaaaaaa aa",
         "banana bandana", "the DOG (and 2 cats) ate 1234 mats!"]
# NFKC's half, ligature and number sign, an accent for one grapheme and its letter, and a control character to nothing.
RULES = "BD\t31 2044 32\nFB01\t66 69\n2116\t4E 6F\n45 301\t C9\nE9\t65\n1F\t\n"


def spm(folder, **options):
    rules = pathlib.Path(folder) / "rules.tsv"
    rules.write_text(RULES.replace("\t ", "\t"))
    return made_tokenizers.train_sentencepiece(TEXTS * 20, 20, normalization_rule_tsv=str(rules), **options)


def tokens(*contents):
    return [{"id": i, **made_tokenizers.added_token(content, lstrip=content == "<mask>")} for i, content in contents]


def pieces(*names):
    return [{"Sequence": {"id": n[0], "type_id": int(n[1])}} if n[0] in "AB" else
            {"SpecialToken": {"id": n[:-1], "type_id": int(n[-1])}} for n in names]


def unigram(folder):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(spm(folder, unk_id=0, bos_id=1, eos_id=2))
    vocabulary = [["<s>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]
    vocabulary += [[p.piece, round(p.score, 3)] for p in model.pieces[3:]] + [["aa", -3.3], ["aaa", -4.9], ["<mask>", 0.0]]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": tokens(*((i, t) for i, (t, _) in enumerate(vocabulary) if i < 4 or t == "<mask>")),
        "normalizer": {"type": "Precompiled",
                       "precompiled_charsmap": base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {"type": "TemplateProcessing", "single": pieces("<s>0", "A0", "</s>0"),
                           "pair": pieces("<s>0", "A0", "</s>0", "</s>0", "B1", "</s>1"),
                           "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in ((0, "<s>"), (2, "</s>"))}},
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary, "byte_fallback": False}}


def variants(made):
    vocabulary = made["model"]["vocab"]
    first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    sequence = lambda *parts: {"type": "Sequence", "normalizers": list(parts)}
    return {
        "as it is": {},
        "deberta": {"normalizer": sequence({"type": "Strip", "strip_left": True, "strip_right": True}, made["normalizer"],
                                           {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}),
                    "pre_tokenizer": made["decoder"]},
        "first": {"normalizer": sequence({"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": False},
                                         {"type": "NFC"}), "pre_tokenizer": first, "decoder": first},
        "pieces": {"normalizer": sequence({"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Prepend", "prepend": "a"},
                                          {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}),
                   "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                       {"type": "Punctuation", "behavior": "Isolated"}, {"type": "Digits", "individual_digits": True},
                       {**made["decoder"], "prepend_scheme": "never"}]},
                   "decoder": {**made["decoder"], "prepend_scheme": "never"}, "post_processor": None},
        "bytes": {"normalizer": None, "pre_tokenizer": None, "decoder": None, "added_tokens": made["added_tokens"][:4],
                  "model": {**made["model"], "byte_fallback": True,
                            "vocab": vocabulary + [[f"<0x{b:02X}>", -9.5] for b in range(256)]},
                  "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0],
                                     "trim_offsets": True, "add_prefix_space": True}}}


ENCODED = TEXTS + ["", " ", "  the\t\tcat \n", "caf\u00e9 cafe\u0301 E\u0301E", "\x1fthe \x1f\x1f", "中国 cat😀", "the <mask> cat<mask>the",
                   "a ``test''", "<unk>x<unk>", "banananananananananana aaaaaaaaaaaaaaaaaaaaaaaaaa", "½½ №12"]


def encoded(tokenizer, **request):
    encoding = tokenizer.encode(request["a"], request.get("b"))
    return {**request, "ids": encoding.ids, "type_ids": encoding.type_ids}


def folder_of(parent, name, model_type, files):
    folder = pathlib.Path(parent) / name
    folder.mkdir()
    for file, content in {"config.json": {"model_type": model_type}, **files}.items():
        (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = ENCODED + ["[CLS] the [MASK]", "<s> the <mask>", "<x> the"]
    return {"name": name, "files": {file: {"base64": base64.b64encode(content).decode()} if isinstance(content, bytes) else content
                                    for file, content in {"config.json": {"model_type": model_type}, **files}.items()},
            "pad_id": theirs.pad_token_id, "size": len(theirs), "encodings":
                [encoded(theirs.backend_tokenizer, a=a) for a in texts] + [encoded(theirs.backend_tokenizer, a="the cat", b="sat")]}


def folders(parent):
    names = dict(pad_id=0, pad_piece="[PAD]", bos_id=1, bos_piece="[CLS]", eos_id=2, eos_piece="[SEP]", unk_id=3, unk_piece="[UNK]")
    deberta = {"spm.model": spm(parent, user_defined_symbols=["<x>"], **names)}
    bpe = made_tokenizers.train_byte_level(TEXTS, 290, made_tokenizers.ROBERTA_SPECIAL[:4])
    bpe.model.save(str(parent))
    files = {name: pathlib.Path(parent, name).read_bytes() for name in ("vocab.json", "merges.txt")}
    mask = {"content": "<mask>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    letters = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat ##s dog".split()
    yield folder_of(parent, "DeBERTa", "deberta-v2", {**deberta, "tokenizer_config.json": {"do_lower_case": False, "vocab_type": "spm"}})
    yield folder_of(parent, "DeBERTa, other settings", "deberta-v2", {
        **deberta, "tokenizer_config.json": {"do_lower_case": True, "split_by_punct": True, "add_prefix_space": False},
        "added_tokens.json": {"[MASK]": 128000, "cat": 128001}, "special_tokens_map.json": {"mask_token": "[MASK]"}})
    yield folder_of(parent, "XLM-RoBERTa", "xlm-roberta", {"sentencepiece.bpe.model": spm(parent, unk_id=0, bos_id=1, eos_id=2)})
    yield folder_of(parent, "RoBERTa", "roberta", {**files, "special_tokens_map.json": {"mask_token": mask}})
    yield folder_of(parent, "RoBERTa, other settings", "", {
        **files, "config.json": {}, "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizerFast", "add_prefix_space": True,
                                                              "mask_token": {"__type": "AddedToken", **mask}}})
    yield folder_of(parent, "GPT-2", "gpt2", {**files, "tokenizer_config.json": {"add_bos_token": True, "pad_token": "<pad>"}})
    yield folder_of(parent, "BERT", "bert", {"vocab.txt": "\n".join(letters).encode(), "tokenizer_config.json": {"do_lower_case": True}})


def show(name, value):
    print(f"inline constexpr const char* {name} =")
    for line in textwrap.wrap(json.dumps(value), 95, drop_whitespace=False, break_on_hyphens=False):
        print(f'    R"json({line})json"')
    print("    ;\n")


with tempfile.TemporaryDirectory() as place:
    FILE = unigram(place)
    VARIANTS = variants(FILE)
    encodings, decodings = [], []
    for name, patch in VARIANTS.items():
        tokenizer = Tokenizer.from_str(json.dumps({**FILE, **patch}))
        encodings += [encoded(tokenizer, variant=name, a=text) for text in ENCODED]
        encodings.append(encoded(tokenizer, variant=name, a="the cat", b="a dog"))
        for row in [tokenizer.encode(text).ids for text in ENCODED[2:]] + [[], [5, 4, 4]]:
            decodings += [{"variant": name, "ids": row, "skip": skip, "text": tokenizer.decode(row, skip_special_tokens=skip)}
                          for skip in (False, True)]
    FOLDERS = list(folders(place))

print(f"""// Made by tests/reference/unigram_values.py: Unigram tokenizers and folders without a tokenizer.json, and what Hugging
// Face's tokenizers {__version__} and transformers {transformers_version} make of texts and ids with them. All in JSON.
#pragma once

namespace unigram_values {{

// clang-format off""")
show("tokenizer_json", FILE)
show("variants_json", VARIANTS)
show("encodings_json", encodings)
show("decodings_json", decodings)
show("folders_json", FOLDERS)
print("// clang-format on\n\n}  // namespace unigram_values")
