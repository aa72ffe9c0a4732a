"""How the scripts of tests here run their tests: each on its own, with its time and a line for what became of it."""

import concurrent.futures
import os
import sys
import time


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def tests_of(names):
    """[(name, function)] of a script's tests, in their order, from its globals()."""
    return [(name, test) for name, test in names.items() if name.startswith("test_")]


def run_tests(jobs, at_once=os.cpu_count()):
    """Calls the functions of [(name, function)] whose name holds the script's argument. What the script exits with."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    jobs = [job for job in jobs if pattern in job[0]]
    failures = 0

    def run(job):
        name, test = job
        start = time.monotonic()
        try:
            test()
            return f"{name} ({time.monotonic() - start:.1f} s): ok"
        except Exception as error:  # the next test is independent of this one
            return f"{name}: FAILED: {type(error).__name__}: {error}"

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for result in pool.map(run, jobs):
            failures += "FAILED" in result
            print(result, flush=True)
    print(f"{len(jobs)} tests, {failures} failures")
    return 1 if failures or not jobs else 0
