"""The SPIN paper's benchmark results, to be shown next to one's own.

Source: arXiv 2401.01335 (ICML 2024), table 4 in appendix B.4, in percent; all thirty numbers, and the
averages it prints beside them, were compared with the paper's text. Measured with lm-eval 0.4.0; the
authors say that other versions give other scores with the same trend (README of uclaml/SPIN). The
leaderboard's own measurements of these models differ from them by up to 1.6 points on average: 57.56 for
theta_0 (discussion 2 of alignment-handbook/zephyr-7b-sft-full), then 62.37, 62.86, 63.54, 63.70 (the cards
of the models that the authors published).
"""

from __future__ import annotations

MODEL = "zephyr-7b-sft-full"
WHERE = "arXiv 2401.01335, table 4"

# As in conf/evaluation/open_llm_leaderboard.yaml: task -> examples before each question, metric
TASKS: dict[str, tuple[int, str]] = {
    "arc_challenge": (25, "acc_norm"),
    "truthfulqa_mc2": (0, "acc"),
    "winogrande": (5, "acc"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
}

# Percent, in the order of TASKS: theta_0, then the models that iterations 0 to 3 made
SCORES: tuple[tuple[float, ...], ...] = (
    (60.41, 43.73, 74.19, 26.76, 82.85, 60.92),
    (63.40, 49.18, 72.69, 35.10, 84.38, 60.03),
    (65.19, 55.17, 72.30, 35.78, 84.96, 59.34),
    (65.96, 54.91, 73.56, 38.06, 85.41, 59.93),
    (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
)
