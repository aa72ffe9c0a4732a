"""Tiny tasks in GLUE's layout, for the tests of peft-glue."""

from tiny_model import rows


def write(path, header, lines, mark=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = mark + "".join("\t".join(line) + "\n" for line in ([header] if header else []) + lines)
    path.write_text(text, encoding="utf-8")


def make_data(folder):
    """CoLA, STS-B and RTE, a few rows each; a quote is a character."""
    for split, seed, count in [("train", 1, 40), ("dev", 2, 24)]:
        single = [(label, text) for label, text in rows(count, seed)]
        pairs = rows(count, seed + 2, pairs=True)
        write(folder / "CoLA" / f"{split}.tsv", None,
              [["gj04", str(int(label == "cat")), "", '"' + text] for label, text in single])
        columns = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2",
                   "score"]
        write(folder / "STS-B" / f"{split}.tsv", columns,
              [[str(i), "g", "f", "y", "0", "none", "none", a, b, f"{len(b) % 6}.000"]
               for i, (_, a, b) in enumerate(pairs)])
        write(folder / "RTE" / f"{split}.tsv", ["index", "sentence1", "sentence2", "label"],
              [[str(i), a, b, "entailment" if label == "cat" else "not_entailment"]
               for i, (label, a, b) in enumerate(pairs)], mark="\ufeff")
    return folder
