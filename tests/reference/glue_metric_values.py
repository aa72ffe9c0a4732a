"""The numbers of tests/glue/test_metrics.cpp, from scikit-learn and SciPy.

    python glue_metric_values.py
"""

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def pseudo_random(count, seed):
    """Numbers from 0 to 99 that C++ can make too."""
    state, values = seed, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        values.append(state // 65536 % 100)
    return values


right, predicted = pseudo_random(200, 1), pseudo_random(200, 2)
classes = [int(x < 70) for x in right]
guesses = [int(a < 70) if b < 75 else int(b % 2) for a, b in zip(right, predicted)]
print("accuracy", accuracy_score(classes, guesses))
print("F1", f1_score(classes, guesses))
print("Matthews", matthews_corrcoef(classes, guesses))
print("Matthews, one class predicted", matthews_corrcoef(classes, [1] * 200))
print("F1, class 1 never predicted", f1_score(classes, [0] * 200, zero_division="warn"))
scores = [x // 5 / 4 for x in right]  # many ties
outputs = [0.03 * a + 0.02 * b for a, b in zip(right, predicted)]
coarse = [float(int(x)) for x in outputs]
print("Pearson", pearsonr(outputs, scores).statistic)
print("Spearman", spearmanr(outputs, scores).statistic)
print("Spearman, ties on both sides", spearmanr(coarse, scores).statistic)
