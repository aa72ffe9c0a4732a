"""Makes tests/text/wordpiece_values.h: a small tokenizer.json and what Hugging Face's tokenizers make of texts.

    python tests/reference/wordpiece_values.py > tests/text/wordpiece_values.h

Needs tokenizers.
"""

import json
import textwrap

import tokenizers

VOCABULARY = ("[PAD] [UNK] [CLS] [SEP] [MASK] the un ##aff ##able want ##ed run ##ning , . ! ? ' - # a b c ##a ##b ##c "
              "naive strasse straße stra ##ss ##e Hello hello 中 国 e ##\u0301 σας σ ##α ##σ ##ς i ##\u0307 \u10d6 <x> "
              "\u00e9 É").split(" ")

SPECIAL = [dict(id=VOCABULARY.index(token), content=token, single_word=False, lstrip=False, rstrip=False,
                normalized=False, special=True) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]


def added(id, content, single_word=False, lstrip=False, rstrip=False, normalized=False):
    return dict(id=id, content=content, single_word=single_word, lstrip=lstrip, rstrip=rstrip, normalized=normalized,
                special=False)


ADDED = [added(len(VOCABULARY), "<L>", lstrip=True), added(len(VOCABULARY) + 1, "<R>", rstrip=True),
         added(len(VOCABULARY) + 2, "WÖRD", single_word=True, normalized=True),
         added(len(VOCABULARY) + 3, "<<"), added(len(VOCABULARY) + 4, "<<<"),
         added(len(VOCABULARY) + 5, "Two Words", normalized=True)]

TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
               {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
    "pair": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
             {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
             {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                       "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}},
}

TOKENIZER = {
    "version": "1.0",
    "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0},
    "padding": {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "[PAD]"},
    "added_tokens": SPECIAL + ADDED,
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                   "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": TEMPLATE,
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
              "max_input_chars_per_word": 12, "vocab": {token: i for i, token in enumerate(VOCABULARY)}},
}

TEXTS = [
    "", " \t\n", "The unaffable wanted RUNNING", "unwanted, unaffabl!?", "abcabcabcabc", "abcabcabcabca", "don't",
    "na\u00efve nai\u0308ve NAÏVE", "straße STRASSE stra\u1e9ee", "中国a中 b", "a\u0000b\u0001c\ufffd\u200d\u00adb",
    "a\u00a0b\u3000c\u2028a\u0085b", "ΣΑΣ σας", "İ i\u0307 I", "Hello HELLO hello", "\u1c96 \u10d6", "a\u166db\u1734c\ua9bdb",
    "[CLS] a [MASK]b[SEP][UNK] [mask] [PAD", "a  <L> b  <R>  c <L><R>", "wörd word WORDa WÖRD. a-WoRd_", "a<<<<b <<<<<",
    "two words TWO WORDS two  words", "#a ##a # #", "\U0002b820 \U0002b920 \u9fff", "É é e\u0301",
]
PAIRS = [("the want", "a b"), ("", ""), ("a b c", "want")]
CUT = [("a b c a b c", None, n) for n in (2, 3, 5, 8, 9)] + [
    (a, b, n) for a, b in (("a b c a b c", "the"), ("the", "a b c a b c"), ("a a a a a", "b b b b b"), ("unaffable", "a b c"))
    for n in (3, 4, 5, 6, 7, 8, 9, 12)]

VARIANTS = {
    "as it is": {},
    "cased": dict(strip_accents=None, lowercase=False),
    "lower case with accents": dict(strip_accents=False, lowercase=True),
    "no accents, but case": dict(strip_accents=True, lowercase=False),
    "nothing": dict(clean_text=False, handle_chinese_chars=False, strip_accents=False, lowercase=False),
    "BertProcessing": None,
}


def literal(text):
    """A C++ string literal of the text's UTF-8; octal escapes end after three digits, unlike hexadecimal ones."""
    return '"' + "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode()) + '"'


def string(text):
    """The same as a std::string, which may hold zero bytes."""
    return f"std::string({literal(text)}, {len(text.encode())})"


def numbers(values):
    return "{" + ", ".join(map(str, values)) + "}"


def case(tokenizer, variant, a, b, max_length):
    tokenizer.no_truncation()
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
    encoding = tokenizer.encode(a) if b is None else tokenizer.encode(a, b)
    second = "std::nullopt" if b is None else string(b)
    length = "text::Tokenizer::no_limit" if max_length is None else max_length
    return (f"    {{{literal(variant)}, {string(a)}, {second}, {length},\n"
            f"     {numbers(encoding.ids)},\n     {numbers(encoding.type_ids)}}},")


def main():
    print("// Made by tests/reference/wordpiece_values.py: a small tokenizer.json, texts, and their ids in Hugging Face's\n"
          f"// tokenizers {tokenizers.__version__}.\n#pragma once\n\n"
          "#include <cstdint>\n#include <optional>\n#include <string>\n#include <vector>\n\n#include \"text/tokenizer.h\"\n\n"
          "namespace wordpiece_values {\n\n"
          "struct Case {\n  std::string variant;\n  std::string a;\n  std::optional<std::string> b;\n"
          "  std::int64_t max_length;\n  std::vector<std::int64_t> ids, type_ids;\n};\n\n// clang-format off")
    print("inline constexpr const char* tokenizer_json =")
    for line in textwrap.wrap(json.dumps(TOKENIZER), 100, drop_whitespace=False, break_on_hyphens=False):
        print(f'    R"({line})"')
    print("    ;\n\n// The changes to it, in JSON, by the names the cases give.\n"
          "inline const std::vector<std::pair<std::string, std::string>> variants = {")
    lines = []
    for name, change in VARIANTS.items():
        if change is None:
            patch = {"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}}
        else:
            patch = {"normalizer": {**TOKENIZER["normalizer"], **change}}
        print(f'    {{"{name}",\n     R"({json.dumps(patch)})"}},')
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**TOKENIZER, **patch}))
        tokenizer.no_padding()
        requests = [(text, None, None) for text in TEXTS] + [(a, b, None) for a, b in PAIRS]
        if not change:
            requests += CUT
        lines += [case(tokenizer, name, *request) for request in requests]
    print("};\n\ninline const std::vector<Case> cases = {")
    print("\n".join(lines))
    print("};\n// clang-format on\n\n}  // namespace wordpiece_values")


main()
