"""Tokenizers made up for compare_tokenizer.py: RoBERTa's, Unigram's, and folders that have no tokenizer.json.

Needs tokenizers, transformers, sentencepiece and protobuf.
"""
import io
import itertools
import json
import os

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def added_token(content, rng=None, **flags):
    token = dict(content=content, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    if rng and rng.random() < 0.3:
        token |= {flag: rng.random() < 0.5 for flag in ("single_word", "lstrip", "rstrip", "normalized")}
    return {**token, **flags}


def train_byte_level(texts, size, special, add_prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def roberta_tokenizer(rng, texts):
    """Everything that roberta-base's tokenizer.json has."""
    made = json.loads(train_byte_level(texts, 1500, ROBERTA_SPECIAL[:4]).to_str())
    vocabulary = made["model"]["vocab"]
    vocabulary["<mask>"] = len(vocabulary)
    made["added_tokens"] = [{"id": vocabulary[t], **added_token(t, normalized=t != "<mask>" and rng.random() < 0.5,
                                                                lstrip=t == "<mask>")} for t in ROBERTA_SPECIAL]
    flags = {"add_prefix_space": rng.random() < 0.5, "trim_offsets": rng.random() < 0.5}
    made["pre_tokenizer"] = made["decoder"] = {"type": "ByteLevel", **flags, "use_regex": True}
    made["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], **flags}
    made["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    if rng.random() < 0.5:
        made["model"]["merges"] = [" ".join(merge) for merge in made["model"]["merges"]]
    return made


def train_sentencepiece(texts, size=500, **options):
    """The bytes of an spm.model."""
    model = io.BytesIO()
    lines = [t for text in texts for t in [text.replace("\n", " ").replace("\0", "")] if t.strip()]
    size += len(set("".join(lines)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, hard_vocab_limit=False, minloglevel=2,
        model_type="unigram", character_coverage=1.0, **options)
    return model.getvalue()


def charsmaps(texts):
    """The tables of replacements that SentencePiece has."""
    result = []
    for name in ("nmt_nfkc", "nmt_nfkc_cf", "nfkc"):
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(train_sentencepiece(texts[:200], normalization_rule_name=name))
        result.append(model.normalizer_spec.precompiled_charsmap)
    return result


def random_normalizer(rng, maps):
    import base64
    part = lambda: rng.choice([
        {"type": "NFC"}, {"type": "NFD"}, {"type": "NFKC"}, {"type": "NFKD"}, {"type": "Lowercase"},
        {"type": "StripAccents"}, {"type": "Prepend", "prepend": rng.choice(["\u2581", "x "])},
        {"type": "Strip", "strip_left": rng.random() < 0.5, "strip_right": rng.random() < 0.5},
        {"type": "Replace", "pattern": {"Regex": rng.choice([r" {2,}", r"\s{2,}|[\n\r\t]", r"\s+", r"[\p{P}\d]", "``|''"])},
         "content": rng.choice([" ", "", "\u2581", '"'])},
        {"type": "Replace", "pattern": {"String": rng.choice(["``", " ", "a", "'s", "."])}, "content": rng.choice(["\u2581", '"', "", "ab"])},
        *[{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(m).decode()} for m in maps]])
    kind = rng.random()
    if kind < 0.1:
        return None
    if kind < 0.3:
        return part()
    return {"type": "Sequence", "normalizers": [part() for _ in range(rng.randint(0, 4))]}


def keeps_start(normalizer):
    """Whether the prepend_scheme "first" is read behind it; see text/normalizers.h."""
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(keeps_start, normalizer["normalizers"]))
    if normalizer["type"] == "Replace":
        return len(normalizer["content"]) <= 1
    return normalizer["type"] in ("NFC", "Lowercase", "Strip", "StripAccents")


def random_pre_tokenizer(rng, first):
    schemes = ["always", "always", "never"] + ["first"] * 3 * first
    metaspace = {"type": "Metaspace", "replacement": rng.choice("\u2581\u2581\u2581_"), "prepend_scheme": rng.choice(schemes),
                 "split": rng.random() < 0.7}
    before = lambda: rng.choice([{"type": "WhitespaceSplit"}, {"type": "Punctuation", "behavior": "Isolated"},
                                 {"type": "Digits", "individual_digits": rng.random() < 0.5}, {"type": "BertPreTokenizer"}])
    kind = rng.random()
    if kind < 0.1:
        return None
    if kind < 0.4:
        return metaspace
    return {"type": "Sequence", "pretokenizers": [before() for _ in range(rng.randint(0, 2))] + [metaspace] +
            [before() for _ in range(rng.random() < 0.2)]}


def unigram_tokenizer(rng, texts, maps, added_tokens):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = rng.sample(texts, rng.choice([30, 200]))
    characters = len(set("".join(texts)))
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=characters + rng.choice([50, 1000]), show_progress=False, unk_token="<unk>",
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"]))
    made = json.loads(tokenizer.to_str())
    model = made["model"]
    kind = rng.random()
    for piece in model["vocab"][4:]:
        if kind < 0.3:  # many cuts that are equally likely, but for how their sums are rounded
            piece[1] = -rng.choice([0.1, 0.2, 0.3, 0.7, 1.1]) * len(piece[0])
        elif kind < 0.5:
            piece[1] = -rng.random() * 12
    if rng.random() < 0.5:
        model["byte_fallback"] = True
        missing = rng.random() < 0.3
        model["vocab"] += [[f"<0x{byte:02X}>", 0.0 if rng.random() < 0.5 else -5.0] for byte in range(256) if not missing or byte % 7]
    normalizer = made["normalizer"] = random_normalizer(rng, maps)
    made["pre_tokenizer"] = random_pre_tokenizer(rng, keeps_start(normalizer))
    made["decoder"] = rng.choice([None, {"type": "WordPiece", "prefix": "\u2581", "cleanup": rng.random() < 0.5},
                                  *[{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": s, "split": True}
                                    for s in ("always", "first", "never")]])
    pieces = lambda *names: [{"Sequence": {"id": n, "type_id": ord(n) - 65}} if n in "AB" else
                             {"SpecialToken": {"id": n, "type_id": 0}} for n in names]
    made["post_processor"] = rng.choice([
        None, {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
        {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True, "add_prefix_space": True},
        {"type": "TemplateProcessing", "single": pieces("<s>", "A", "</s>"), "pair": pieces("<s>", "A", "</s>", "B", "</s>"),
         "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<s>", 0), ("</s>", 2))}}])
    known = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    fresh = itertools.count(len(model["vocab"]))
    made["added_tokens"] += [{"id": known[t["content"]] if t["content"] in known else next(fresh), **t,
                              "special": rng.random() < 0.5} for t in added_tokens]
    return made


def random_token(rng, name, content):
    """A named token as old and new settings have it."""
    if content != "[UNK]":  # which BERT's vocabulary must have
        content = rng.choice([content] * 5 + [f"<{name}>", "the"])
    if rng.random() < 0.5:
        return content
    token = added_token(content, rng)
    del token["special"]
    return {"__type": "AddedToken", **token}


def write_folder(rng, folder, kind, texts):
    """A folder of one of transformers' classes, with the settings that older ones have."""
    sp = {"deberta-v2": "spm.model", "xlm-roberta": "sentencepiece.bpe.model"}
    square = kind in ("bert", "deberta-v2")
    names = dict(zip(("bos", "eos", "unk", "sep", "pad", "cls", "mask"),
                     ("[CLS] [SEP] [UNK] [SEP] [PAD] [CLS] [MASK]" if square else "<s> </s> <unk> </s> <pad> <s> <mask>").split()))
    if kind == "bert":
        letters = sorted({c for text in texts for c in text.lower() if not c.isspace()})
        tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", *letters, *("##" + c for c in letters)])
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    elif kind in sp:
        options = dict(pad_id=0, pad_piece="[PAD]", bos_id=1, bos_piece="[CLS]", eos_id=2, eos_piece="[SEP]", unk_id=3,
                       unk_piece="[UNK]") if square else dict(unk_id=0, bos_id=1, eos_id=2)
        user = rng.choice([[], ["<x>", "豈"]])
        (folder / sp[kind]).write_bytes(train_sentencepiece(texts, rng.choice([300, 1000]), user_defined_symbols=user, **options,
                                        normalization_rule_name=rng.choice(["nmt_nfkc", "nmt_nfkc_cf", "identity"])))
    else:
        special = rng.choice([[], ["<|endoftext|>"]] if kind == "gpt2" else [ROBERTA_SPECIAL, ROBERTA_SPECIAL[:4]])
        train_byte_level(texts, 800, special).model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    config = {}
    flags = {"bert": ["do_lower_case", "tokenize_chinese_chars", "strip_accents"], "gpt2": ["add_prefix_space", "add_bos_token", "add_eos_token"],
             "roberta": ["add_prefix_space", "trim_offsets"], "deberta-v2": ["do_lower_case", "split_by_punct", "add_prefix_space"],
             "xlm-roberta": ["add_prefix_space"]}[kind]
    for flag in flags:
        if rng.random() < 0.5:
            config[flag] = rng.random() < 0.5
    if rng.random() < 0.5:
        config["tokenizer_class"] = {"bert": "BertTokenizer", "gpt2": "GPT2TokenizerFast", "roberta": "RobertaTokenizer",
                                     "deberta-v2": "DebertaV2Tokenizer", "xlm-roberta": "XLMRobertaTokenizer"}[kind]
    style = rng.choice(["none", "config", "map", "decoder"])
    tokens = {f"{name}_token": random_token(rng, name, content) for name, content in names.items() if rng.random() < 0.6}
    if kind == "gpt2":
        tokens = {name: token for name, token in tokens.items() if name in ("bos_token", "eos_token", "pad_token")}
    if style == "config":
        config |= tokens
        if rng.random() < 0.3:
            config["additional_special_tokens"] = rng.choice([[], ["<e 1>", "wo"]])
    if style == "map":
        for token in tokens.values():
            if isinstance(token, dict):
                del token["__type"]
        if rng.random() < 0.3:
            tokens["additional_special_tokens"] = ["<e 1>", "wo"]
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
        if rng.random() < 0.5:
            (folder / "added_tokens.json").write_text(json.dumps({names["mask"]: 5000, "<x>": 5001}))
    if style == "decoder":
        config |= {name: token if isinstance(token, str) else token["content"] for name, token in tokens.items()}
        config["added_tokens_decoder"] = {str(i): added_token(content, rng, special=rng.random() < 0.7)
                                          for i, content in ((0, names["pad"]), (1, names["cls"]), (9000, names["mask"]), (9001, "<x>"))}
    if config or rng.random() < 0.5:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return style


def plain(tokenizer_json):
    """A tokenizer.json as far as it counts: without padding and truncation, defaults filled in."""
    result = {key: tokenizer_json.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")}
    model = dict(tokenizer_json["model"])
    if isinstance(model.get("merges"), list):
        model["merges"] = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]
                           if not (isinstance(m, str) and m.startswith("#version"))]
    result["model"] = {key: model.get(key) for key in ("type", "vocab", "merges", "unk_id", "unk_token")}
    if (result["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        del result["pre_tokenizer"]["trim_offsets"]
    return result
