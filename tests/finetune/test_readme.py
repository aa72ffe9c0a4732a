"""The README's program is examples/01_train_lora.cpp to the letter, and what the README links is there."""
import pathlib
import re
import sys

root = pathlib.Path(__file__).resolve().parents[2]
readme = (root / "README.md").read_text(encoding="utf-8")
program = (root / "examples/01_train_lora.cpp").read_text(encoding="utf-8")
problems = []
blocks = re.findall(r"```cpp\n(.*?)```", readme, re.S)
if program not in blocks:
    problems.append("README.md does not show examples/01_train_lora.cpp as it is")
for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme):
    if not (root / link).exists():
        problems.append(f"README.md links {link}, which is not there")
for line in problems:
    print(line, file=sys.stderr)
sys.exit(1 if problems else 0)
