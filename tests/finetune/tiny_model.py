"""What the tests of peft-finetune share: a tiny random BERT with its tokenizer, data made of its words, safetensors
in Python's own library, and running the program (named by the environment's PEFT_FINETUNE)."""

import array
import json
import math
import os
import random
import struct
import subprocess
import sys

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "sun", "moon", "star", "one", "two", "three", "the", "a", "is"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = SPECIAL + WORDS + [c for c in LETTERS if c not in WORDS] + ["##" + c for c in LETTERS] + [".", ",", "!"]

# Matrices this small are not worth a second thread, and one that waits in a loop takes the others' time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Six decimals of a value in single precision are not enough, so files are compared and copied as bytes.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


def program():
    path = os.environ.get("PEFT_FINETUNE")
    if not path or not os.access(path, os.X_OK):
        print("skipped: PEFT_FINETUNE names no program")
        sys.exit(77)
    return path


def run(*arguments, **options):
    """Runs the program; the result has returncode, stdout and stderr (texts)."""
    options.setdefault("timeout", 300)
    done = subprocess.run([program(), *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **options)
    done.stdout = done.stdout.decode("utf-8", "replace")
    done.stderr = done.stderr.decode("utf-8", "replace")
    return done


def good(*arguments, **options):
    """Runs the program, which must succeed."""
    done = run(*arguments, **options)
    if done.returncode != 0:
        raise AssertionError(f"exit {done.returncode} of {' '.join(map(str, arguments))}\n{done.stderr}")
    return done


# --- safetensors -------------------------------------------------------------------------------------------------

def tensor(shape, values, dtype="F32"):
    """(dtype, shape, bytes) from numbers."""
    code = {"F32": "f", "F64": "d", "I64": "q", "I32": "i", "U8": "B"}[dtype]
    return dtype, list(shape), array.array(code, values).tobytes()


def numbers(value):
    dtype, _, data = value
    return array.array({"F32": "f", "F64": "d", "I64": "q", "I32": "i", "U8": "B"}[dtype], data).tolist()


def write_safetensors(path, tensors):
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            file.write(data)


def read_safetensors(path):
    """{name: (dtype, shape, bytes)}; whatever is cut short or does not fit is an error."""
    with open(path, "rb") as file:
        content = file.read()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    tensors, covered = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        count = 1
        for size in entry["shape"]:
            count *= size
        assert end - begin == count * SIZES[entry["dtype"]] and end <= len(data), f"{path}: {name}"
        covered += end - begin
        tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    assert covered == len(data), path
    return tensors


def largest_difference(a, b):
    return max((abs(x - y) for x, y in zip(numbers(a), numbers(b), strict=True)), default=0.0)


# --- the model ---------------------------------------------------------------------------------------------------

def config(hidden=16, layers=2, heads=2, intermediate=32, positions=130):
    return {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": len(VOCABULARY), "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": intermediate,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": positions, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
            "initializer_range": 0.02, "pad_token_id": 0}


def weights(settings, seed=1, labels=0):
    """Random tensors of a BertModel with pooler; with labels, of a BertForSequenceClassification."""
    rng = random.Random(seed)
    d, f = settings["hidden_size"], settings["intermediate_size"]
    shapes = {"embeddings.word_embeddings.weight": [settings["vocab_size"], d],
              "embeddings.position_embeddings.weight": [settings["max_position_embeddings"], d],
              "embeddings.token_type_embeddings.weight": [settings["type_vocab_size"], d],
              "embeddings.LayerNorm.weight": [d], "embeddings.LayerNorm.bias": [d]}
    for i in range(settings["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        for name, rows, columns in [("attention.self.query", d, d), ("attention.self.key", d, d),
                                    ("attention.self.value", d, d), ("attention.output.dense", d, d),
                                    ("intermediate.dense", f, d), ("output.dense", d, f)]:
            shapes[f"{layer}{name}.weight"] = [rows, columns]
            shapes[f"{layer}{name}.bias"] = [rows]
        for name in ["attention.output.LayerNorm", "output.LayerNorm"]:
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = [d]
    shapes["pooler.dense.weight"], shapes["pooler.dense.bias"] = [d, d], [d]
    if labels:
        shapes = {"bert." + name: shape for name, shape in shapes.items()}
        shapes["classifier.weight"], shapes["classifier.bias"] = [labels, d], [labels]
    result = {}
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        center = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        spread = 0.2 if len(shape) == 2 else 0.05
        result[name] = tensor(shape, [rng.gauss(center, spread) for _ in range(count)])
    return result


def tokenizer():
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    special = lambda token: {"id": token, "ids": [ids[token]], "tokens": [token]}
    place = lambda token, kind: {"SpecialToken": {"id": token, "type_id": kind}}
    text = lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for token in SPECIAL],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [place("[CLS]", 0), text("A", 0), place("[SEP]", 0)],
            "pair": [place("[CLS]", 0), text("A", 0), place("[SEP]", 0), text("B", 1), place("[SEP]", 1)],
            "special_tokens": {token: special(token) for token in ["[CLS]", "[SEP]"]},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": ids},
    }


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def make_model(folder, seed=1, labels=0, **sizes):
    """Writes a Hugging Face folder; returns its path."""
    os.makedirs(folder)
    settings = config(**sizes)
    if labels:
        settings["architectures"] = ["BertForSequenceClassification"]
        settings["id2label"] = {str(i): f"class_{i}" for i in range(labels)}
        settings["label2id"] = {f"class_{i}": i for i in range(labels)}
    write_json(os.path.join(folder, "config.json"), settings)
    write_json(os.path.join(folder, "tokenizer.json"), tokenizer())
    write_safetensors(os.path.join(folder, "model.safetensors"), weights(settings, seed, labels))
    return folder


def make_family(folder, family, labels=3, **sizes):
    """Writes a folder of a RoBERTa's or DeBERTa-v2's classifier; returns its path."""
    settings = config(**sizes) | {"model_type": family, "id2label": {str(i): f"class_{i}" for i in range(labels)},
                                  "label2id": {f"class_{i}": i for i in range(labels)}}
    tensors = weights(settings)
    d, rng = settings["hidden_size"], random.Random(2)
    drawn = lambda *shape: tensor(shape, [rng.gauss(0, 0.2) for _ in range(math.prod(shape))])
    pooler = {kind: tensors.pop(f"pooler.dense.{kind}") for kind in ("weight", "bias")}
    if family == "roberta":
        settings["architectures"] = ["RobertaForSequenceClassification"]
        tensors = {f"roberta.{name}": value for name, value in tensors.items()}
        tensors |= {f"classifier.dense.{kind}": value for kind, value in pooler.items()}
        tensors |= {"classifier.out_proj.weight": drawn(labels, d), "classifier.out_proj.bias": drawn(labels)}
    else:
        settings |= {"architectures": ["DebertaV2ForSequenceClassification"], "relative_attention": True,
                     "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "norm_rel_ebd": "layer_norm",
                     "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0,
                     "pooler_hidden_size": d, "pooler_hidden_act": "gelu", "pooler_dropout": 0}
        for name in ("query", "key", "value"):
            tensors = {key.replace(f".{name}.", f".{name}_proj."): value for key, value in tensors.items()}
        for name in ("position", "token_type"):
            del tensors[f"embeddings.{name}_embeddings.weight"]
        tensors |= {"encoder.rel_embeddings.weight": drawn(8, d), "encoder.LayerNorm.weight": drawn(d),
                    "encoder.LayerNorm.bias": drawn(d)}
        tensors = {f"deberta.{name}": value for name, value in tensors.items()}
        tensors |= {f"pooler.dense.{kind}": value for kind, value in pooler.items()}
        tensors |= {"classifier.weight": drawn(labels, d), "classifier.bias": drawn(labels)}
    os.makedirs(folder)
    write_json(os.path.join(folder, "config.json"), settings)
    write_json(os.path.join(folder, "tokenizer.json"), tokenizer())
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    return folder


# --- data --------------------------------------------------------------------------------------------------------

def rows(count, seed=1, pairs=False):
    """Texts of random words whose label is the first animal in them."""
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        words = [rng.choice([w for w in WORDS if w not in ("cat", "dog", "bird")]) for _ in range(rng.randrange(1, 9))]
        label = rng.choice(["cat", "dog", "bird"])
        words.insert(rng.randrange(len(words) + 1), label)
        texts = [" ".join(words[:1]), " ".join(words[1:])] if pairs else [" ".join(words)]
        result.append((label, *texts))
    return result


def write_tsv(path, table, pairs=False):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("label\ttext_a\ttext_b\n" if pairs else "label\ttext\n")
        for row in table:
            file.write("\t".join(row) + "\n")
    return path


def write_batches(path, count, settings, seed=1, labels=3, rows_each=4):
    """`--inputs`: padded batches b0, b1, …"""
    rng = random.Random(seed)
    tensors = {}
    for i in range(count):
        lengths = [rng.randrange(2, 12) for _ in range(rows_each)]
        width = max(lengths)
        ids, mask = [], []
        for length in lengths:
            ids += [rng.randrange(5, settings["vocab_size"]) for _ in range(length)] + [0] * (width - length)
            mask += [1] * length + [0] * (width - length)
        tensors[f"b{i}.input_ids"] = tensor([rows_each, width], ids, "I64")
        tensors[f"b{i}.attention_mask"] = tensor([rows_each, width], mask, "I64")
        if labels:
            tensors[f"b{i}.labels"] = tensor([rows_each], [rng.randrange(labels) for _ in range(rows_each)], "I64")
    write_safetensors(path, tensors)
    return path
