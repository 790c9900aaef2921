"""How well a label can be told from a text by simple means; what a grader or a filter has to beat."""

from collections import Counter
from typing import Any

from cluster.settings.capture import AuditSettings


def baseline_scores(labels: list[Any], texts: list[str], settings: AuditSettings) -> list[dict[str, Any]]:
    """Macro precision, recall and F1 of guessing the commonest label, and of a linear text classifier.

    The classifier (logistic regression on words and word pairs) is scored by cross-validation. Empty
    where a label has too few rows for the folds.
    """
    counts = Counter(labels)
    if len(counts) < 2 or min(counts.values()) < settings.baseline_folds:
        return []
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    names = [str(label) for label in labels]
    commonest = str(counts.most_common(1)[0][0])
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )
    folds = StratifiedKFold(settings.baseline_folds, shuffle=True, random_state=0)
    predicted = [str(p) for p in cross_val_predict(model, texts, names, cv=folds)]
    return [
        {"name": f"always {commonest}", **macro_scores(names, [commonest] * len(names))},
        {"name": "linear on words, cross-validated", **macro_scores(names, predicted)},
    ]


def macro_scores(labels: list[str], predicted: list[str]) -> dict[str, Any]:
    """Unweighted means over the labels; precision of a label never predicted counts as 0."""
    pairs = Counter(zip(labels, predicted, strict=True))
    actual, guessed = Counter(labels), Counter(predicted)
    precisions = [pairs[name, name] / guessed[name] if guessed[name] else 0.0 for name in actual]
    recalls = [pairs[name, name] / actual[name] for name in actual]
    f1s = [2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precisions, recalls, strict=True)]
    size = len(actual)
    return {
        "rows": len(labels),
        "precision": round(sum(precisions) / size, 4),
        "recall": round(sum(recalls) / size, 4),
        "f1": round(sum(f1s) / size, 4),
    }
