"""peft-bench at sizes that prove nothing but that it works: its rows, its files, its words for wrong input.

    PEFT_BENCH=build/examples/peft-bench python3 tests/finetune/test_bench.py [PATTERN]

Needs Python's own library only. Nothing here looks at a time: a busy machine must not fail a test.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import xml.dom.minidom

from run_tests import check, run_tests, tests_of

PROGRAM = os.environ.get("PEFT_BENCH")


def run(*arguments):
    done = subprocess.run([PROGRAM, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=600)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def good(*arguments):
    done = run(*arguments)
    check(done.returncode == 0, f"exit {done.returncode} of {arguments}\n{done.stderr[-3000:]}")
    return done


def bad(*arguments):
    done = run(*arguments)
    check(done.returncode != 0, f"{arguments} must be refused")
    return done.stderr + done.stdout


def measured(root, *arguments):
    """(the JSON, what was printed) of a tiny run."""
    out = f"{root}/{len(os.listdir(root))}"
    done = good("--tiny", "--no-python", "--out", out, *arguments)
    picture = xml.dom.minidom.parse(f"{out}/bench.svg")
    check(picture.documentElement.tagName == "svg", "bench.svg is an SVG picture")
    with open(f"{out}/bench.json", encoding="utf-8") as file:
        return json.load(file), done.stdout


def check_rows(report, sets):
    check({row["set"] for row in report["rows"]} == set(sets), f"rows of {sets}")
    for row in report["rows"]:
        check("problem" not in row, f"{row['set']} {row['name']}: {row.get('problem')}")
        check(row["base"] in row["variants"], f"{row['name']}: its base is among the variants")
        check(row["rounds"] > 0, row)
        for name, variant in row["variants"].items():
            numbers = [variant[key] for key in ("cpu_seconds", "wall_seconds", "ratio", "ratio_lower_quartile",
                                                "ratio_upper_quartile")]
            check(all(math.isfinite(number) and number >= 0 for number in numbers), f"{row['name']}, {name}: {variant}")
            check(numbers[3] <= numbers[2] <= numbers[4], f"quartiles of {row['name']}, {name}: {variant}")


def test_every_set_works(root):
    report, printed = measured(root)
    check_rows(report, ["C1", "C2", "C3", "C4", "C5", "C8", "G1", "G2", "G3", "G5"])
    for row in report["rows"]:
        if row["set"] in ("C1", "C2", "C4", "G1", "G2"):
            check({"floor", "plain", "ours"} <= set(row["variants"]), row["name"])
            check(row["variants"]["floor"]["ratio"] == 1, row["name"])
        if row["set"] in ("C1", "C2") and "drop" not in row["name"]:
            check(row["agreement"]["largest"] <= row["agreement"]["tolerance"], row["name"])
        if row["set"] in ("C2", "G1", "G2"):
            facts = row["facts"]
            check(facts["saved bytes, ours"] > 0 and facts["saved bytes, floor"] > 0, f"{row['name']}: {facts}")
    for name in ("cpu", "blas", "threads", "malloc", "libtorch", "clock"):
        check(report["machine"][name] and report["machine"][name] in printed, f"the header says {name}")


def test_targets(root):
    report, printed = measured(root, "--set", "C4,C5")
    numbers = [row["row"] for row in report["targets"]]
    check(set(numbers) == {str(i) for i in range(1, 26)}, f"every target row: {numbers}")
    for row in report["targets"]:
        check(row["metric"] in printed, f"the table names {row['metric']}")
        check(row["verdict"] in ("must", "stretch", "misses") if row["ours"] is not None else
              row["verdict"].startswith("not "), row)
    by_number = {row["row"]: row for row in report["targets"]}
    check(by_number["16"]["ours"] is not None and by_number["11"]["ours"] is not None, "rows that were measured")
    check("GPU" in by_number["20"]["verdict"] and "not in this run" in by_number["7"]["verdict"], "rows that were not")


def test_filter_and_list(root):
    listed = good("--list", "--set", "C1").stdout.splitlines()
    check(len(listed) > 50 and all(line.startswith("C1 ") for line in listed), listed[:3])
    check(len(set(listed)) == len(listed), "no row twice")
    report, _ = measured(root, "--set", "C1", "--filter", "dora r8 T128")
    check([row["name"] for row in report["rows"]] == ["dora r8 T128 768x768"], report["rows"])
    quick = good("--list", "--quick").stdout.splitlines()
    check(5 < len(quick) < 60 and all("(quick)" in line for line in quick), quick)


def test_wrong_input(root):
    message = bad("--set", "C1,C77", "--no-python", "--list")
    check("C77" in message and "C1, C2" in message, message)
    check("--list" in bad("--filter", "no such row", "--no-python"), "an empty choice")
    check("--threads" in bad("--threads", 0), "threads")
    check("--python" in bad("--tiny", "--set", "C4", "--python", ""), "Python must be named or left out")
    message = bad("--device", "cuda", "--no-python", "--set", "G1")
    check(re.search("CUDA|GPU", message), message)
    message = bad("--tiny", "--set", "C4", "--python", f"{root}/no-python")
    check("--no-python" in message, message)


def test_help(root):
    text = good("--help").stdout
    for option in ("--set", "--quick", "--filter", "--threads", "--out", "--no-python", "--list", "--device"):
        check(option in text, text)


def main():
    if not PROGRAM or not os.access(PROGRAM, os.X_OK):
        print("skipped: PEFT_BENCH names no program")
        return 77
    with tempfile.TemporaryDirectory() as root:
        return run_tests([(name, functools.partial(test, root)) for name, test in tests_of(globals())], at_once=1)


if __name__ == "__main__":
    sys.exit(main())
