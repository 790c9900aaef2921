import shutil
from pathlib import Path

import pytest

from cluster.errors import InputError
from cluster.settings import Settings, load_settings
from cluster.settings.curation import DetectorSettings
from data.detectors.cases import cases
from data.detectors.embeddings import Embeddings
from data.detectors.grounding import ungrounded_share
from data.detectors.interface import Item
from data.detectors.linear import LinearDetector, shipped
from data.detectors.make import sentiment_by, similarity_by, topics_of
from data.detectors.measure import Measure, measure_all, precision_recall
from data.detectors.model import EntailmentModel, SentimentModel, TextModel
from data.detectors.sentiment import sentiment
from data.detectors.topics import fit_topics


@pytest.fixture(scope="module")
def measures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measure]:
    settings: Settings = load_settings(home=tmp_path_factory.mktemp("home"))[0]
    return {measure.name: measure for measure in measure_all(settings)}


@pytest.mark.parametrize(
    "name",
    ["similar query", "ungrounded", "refusal", "toxicity", "sentiment", "topic", "residual personal data"],
)
def test_each_detector_reaches_its_bar_on_held_out_cases(name: str, measures: dict[str, Measure]) -> None:
    print(measures[name])
    assert measures[name].met, str(measures[name])


@pytest.mark.parametrize("name", ["refusal", "toxicity"])
def test_held_out_cases_are_not_among_those_trained_on(name: str) -> None:
    trained = {case.text.casefold() for case in cases(name, "train")}
    held_out = [case.text.casefold() for case in cases(name, "held_out")]
    assert len(held_out) >= 60 and not trained & set(held_out)


def test_a_text_is_as_toxic_as_its_worst_sentence() -> None:
    detector = shipped("toxicity")
    calm, insult = "Your parcel arrives on Tuesday.", "You are a worthless idiot, shut up!"
    alone, among, harmless = detector([Item(insult), Item(f"{calm} {calm} {insult} {calm}"), Item(calm)])
    assert alone is not None and among is not None and harmless is not None
    assert among == pytest.approx(max(alone, harmless)) and alone > 0.5 > harmless


def test_a_judgement_does_not_depend_on_its_neighbours() -> None:
    detector = shipped("refusal", 3)
    texts = [case.text for case in cases("refusal", "held_out")][:12]
    together = detector([Item(text) for text in texts])
    assert together == [detector([Item(text)])[0] for text in texts]


def test_a_model_that_stutters_is_not_toxic() -> None:
    """What a small model says when it gets stuck: letters that are a little suspicious, thirty times."""
    stuttered = (
        "owner" * 30,
        "ticket" + "owner" * 24 + "payments",
        '"}' + "owner" * 20 + '"',
        "page" * 3 + "owner" * 12,
    )
    assert max(shipped("toxicity")([Item(text) for text in stuttered])) < 0.5


def test_nothing_said_is_not_judged() -> None:
    detector = LinearDetector(shipped("toxicity").weights, 0.0)
    assert detector([Item(""), Item(" ... "), Item("hello")])[:2] == [None, None]
    assert detector([]) == []


def test_only_the_beginning_counts_for_a_refusal() -> None:
    text = "The shop opens at nine. Bring the receipt. It is on the left. I'm sorry, but I cannot help with that."
    early, whole = shipped("refusal", 3)([Item(text)])[0], shipped("refusal", 4)([Item(text)])[0]
    assert early is not None and whole is not None and early < 0.5 < whole


def test_support_needs_the_numbers_and_most_of_the_words() -> None:
    passage = ["The pump weighs 11 kg and delivers 40 litres a minute."]
    assert ungrounded_share("The pump delivers 40 litres.", passage, 0.6) == 0
    assert ungrounded_share("The pump delivers 50 litres.", passage, 0.6) == 1
    assert ungrounded_share("The pump weighs 11 kg. Its colour is a bright orange.", passage, 0.6) == 0.5
    assert ungrounded_share("Anything.", [], 0.6) is None


def test_sentiment_has_three_values() -> None:
    said = [sentiment(t) for t in ("Great, thank you!", "This is awful.", "It is on the table.")]
    assert said == ["positive", "negative", "neutral"]


def test_a_topic_is_named_by_its_terms_and_holds_for_new_texts() -> None:
    texts = [f"parcel delivery courier {n}" for n in range(30)] + [f"bread dough oven {n}" for n in range(30)]
    model = fit_topics(texts, 2)
    one, two, three = model.assign(["where is the courier with my parcel", "bake the dough", "oven and bread"])
    assert one != two == three
    assert "dough" in model.names[two] and "parcel" in model.names[one]
    assert model.assign([]) == []


def test_precision_and_recall_by_hand() -> None:
    said, true = [True, True, False, False], [True, False, True, False]
    assert precision_recall(said, true) == {"precision": 0.5, "recall": 0.5}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier of random weights with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("classifier")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "pump", "weighs", "kg", "bad", "good"]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    labels = {0: "entailment", 1: "toxic"}
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=labels, label2id={name: number for number, name in labels.items()},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_model_judges_behind_the_same_interface(classifier: Path) -> None:
    found = TextModel(str(classifier), "toxic")([Item("the bad pump"), Item(" "), Item("a good pump")])
    assert found[1] is None
    assert all(value is not None and 0 < value < 1 for value in (found[0], found[2]))
    shares = EntailmentModel(str(classifier), "entailment")([Item("a pump. the pump", ["the pump weighs"]), Item("a")])
    assert shares[0] in (0.0, 0.5, 1.0) and shares[1] is None


@pytest.fixture(scope="module")
def feelings(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the labels of a sentiment; its last one is always the likeliest."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("feelings")
    shutil.copytree(classifier, folder, dirs_exist_ok=True)
    labels = {0: "Neutral", 1: "Positive", 2: "Negative"}
    model = AutoModelForSequenceClassification.from_pretrained(
        classifier, num_labels=3, id2label=labels, ignore_mismatched_sizes=True
    )
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 50.0]))
    model.save_pretrained(folder)
    return folder


def test_models_judge_sentiment_likeness_and_topics(classifier: Path, feelings: Path) -> None:
    named = DetectorSettings(
        similarity_model=str(classifier), topic_model=str(classifier), sentiment_model=str(feelings)
    )
    assert sentiment_by(named)("a good pump") == "negative" and sentiment_by(DetectorSettings())("good") == "positive"
    alike = similarity_by(named)
    assert alike("the good pump", "the good pump") == pytest.approx(1, abs=1e-5)
    assert alike("the good pump", "the bad pump") < 1
    assert alike("a pump 5", "a pump 6") == pytest.approx(0.5, abs=1e-5)  # numbers are words it does not know
    texts = ["good good good", "good good", "weighs kg weighs kg", "kg weighs kg weighs"]
    one, two, three, four = topics_of(texts, 2, named).assign(texts)
    assert one == two and three == four and one != three


def test_a_model_that_is_missing_or_lacks_the_label_is_named(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        TextModel(str(tmp_path), "toxic")([Item("a")])
    with pytest.raises(InputError, match="cannot be loaded"):
        Embeddings(str(tmp_path)).transform(["a"])
    with pytest.raises(InputError, match="has no label 'positive', only entailment, toxic"):
        SentimentModel(str(classifier))("a")
    with pytest.raises(InputError, match="has no label 'rude', only entailment, toxic"):
        TextModel(str(classifier), "rude")([Item("a")])
