"""A small made-up world that a tiny model learns in seconds."""

from random import Random


def toy_examples(count: int, seed: int = 0, *, wrong: float = 0.0) -> list[list[dict[str, str]]]:
    """Small triage tasks with a JSON answer; a share `wrong` of the answers has another verdict."""
    random = Random(seed)
    examples = []
    for _ in range(count):
        service, level = random.choice(["api", "mail", "search"]), random.choice(["low", "high", "dead"])
        verdict = {"low": "ignore", "high": "ticket", "dead": "page"}[level]
        if random.random() < wrong:
            verdict = random.choice([v for v in ("ignore", "ticket", "page") if v != verdict])
        answer = f'{{"verdict":"{verdict}","owner":"{service}"}}'
        question = f"service={service} level={level} hour={random.randrange(24)}"
        examples.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return examples
