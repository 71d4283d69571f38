"""Three small tasks for tiny language models: arithmetic, ASCII-art words, short narratives.

Every example is a prompt and the answer that continues it. Whether an example is held out is
decided by a checksum of its *key* (the sum asked for, the word with its font and indentation,
the cast of the story). The key can be read off the prompt, so no held-out prompt is ever trained
on. All draws come from a seed.

The tokenizer works on bytes: any text can be given to the models.
"""

from __future__ import annotations

import functools
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: One example in so many is held out.
HELD_OUT_SHARE = 8
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCABULARY = 3 + 256

LEADS = ("What is", "Compute", "How much is")
QUESTIONS = 5
LARGEST = 50

FONTS = ("mini", "small", "smslant")
INDENTS = range(8)
WORDS = (
    *("ant", "bee", "boat", "book", "cake", "cat", "cloud", "coin", "corn", "cow", "deer", "dog"),
    *("door", "duck", "egg", "fish", "fox", "frog", "gate", "goat", "hand", "hat", "hill", "horse"),
    *("jar", "key", "king", "lake", "lamp", "leaf", "lion", "moon", "mouse", "nest", "owl", "pear"),
    *("rain", "ring", "river", "road", "rose", "ship", "snow", "star", "sun", "tree", "wind"),
    "wolf",
)

NAMES = (
    *(("Ada", "she"), ("Bo", "he"), ("Cleo", "she"), ("Dan", "he"), ("Eve", "she")),
    *(("Finn", "he"), ("Gia", "she"), ("Hugo", "he"), ("Iris", "she"), ("Jack", "he")),
)
ANIMALS = ("badger", "crow", "donkey", "fox", "goose", "hare", "mole", "otter", "robin", "toad")
PLACES = (
    *("by the old mill", "near the sea", "under a bridge", "in a quiet wood"),
    *("on a steep hill", "behind the church", "at the edge of town", "in a tall tower"),
)
THINGS = (
    *("basket", "button", "candle", "drum", "kite"),
    *("lantern", "map", "mirror", "ribbon", "whistle"),
)
MOODS = ("brave", "clever", "gentle", "hungry", "lazy", "lonely", "merry", "proud")
TIMES = ("One morning", "One night", "After the rain", "Late in autumn", "On a market day")
FINDS = ("found", "lost", "was given", "broke", "borrowed")
REACTIONS = {
    "found": ("laughed with joy", "ran home to show it"),
    "lost": ("looked for it everywhere", "wept for an hour"),
    "was given": ("said thank you twice", "could not believe it"),
    "broke": ("tried to mend it", "told nobody"),
    "borrowed": ("promised to bring it back", "forgot whose it was"),
}
ENDINGS = {
    "found": "kept the {thing} safe",
    "lost": "had the {thing} again",
    "was given": "gave the {thing} to a friend",
    "broke": "made a better {thing}",
    "borrowed": "brought the {thing} back",
}


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that continues it; `keys` decide where it belongs."""

    task: str
    prompt: str
    answer: str
    keys: tuple[str, ...]

    @property
    def text(self) -> str:
        """What a model reads when it is trained."""
        return self.prompt + self.answer


def is_held_out(key: str) -> bool:
    """Whether an example of this key is kept from training."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def _arithmetic(rng: random.Random, belongs: Callable[[str], bool]) -> Example:
    """Some sums and differences in a row; the answer is the last result."""
    keys, text, result = [], "", ""
    while len(keys) < QUESTIONS:
        sign = rng.choice("+-")
        a, b = rng.randrange(LARGEST), rng.randrange(LARGEST)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        if not belongs(key := f"{a} {sign} {b}"):
            continue
        keys.append(key)
        text += f"{result}\n" if result else ""
        text += f"{rng.choice(LEADS)} {key}?"
        result = f" {a + b if sign == '+' else a - b}"
    return Example("arithmetic", text, result, tuple(keys))


@functools.cache
def draw(word: str, font: str) -> tuple[str, ...]:
    """The rows of a word drawn by pyfiglet, without empty rows and trailing spaces."""
    from pyfiglet import Figlet

    rows = [row.rstrip() for row in Figlet(font=font, width=120).renderText(word).splitlines()]
    return tuple(row for row in rows if row)


def _ascii_word(rng: random.Random, belongs: Callable[[str], bool]) -> Example:
    """A word drawn in characters; the answer is the word."""
    while True:
        word, font, indent = rng.choice(WORDS), rng.choice(FONTS), rng.choice(INDENTS)
        if belongs(key := f"{word} {font} {indent}"):
            break
    drawing = "\n".join(" " * indent + row for row in draw(word, font))
    return Example("ascii-word", f"{drawing}\nThe word is", f" {word}", (key,))


def _narrative(rng: random.Random, belongs: Callable[[str], bool]) -> Example:
    """Four sentences about an animal and a thing; the answer is the last two."""
    while True:
        (name, they), animal = rng.choice(NAMES), rng.choice(ANIMALS)
        place, thing, what = rng.choice(PLACES), rng.choice(THINGS), rng.choice(FINDS)
        if belongs(key := f"{name} {animal} {place} {thing} {what}"):
            break
    prompt = (
        f"{name} the {rng.choice(MOODS)} {animal} lived {place}. "
        f"{rng.choice(TIMES)} {they} {what} a {thing}."
    )
    answer = (
        f" The {animal} {rng.choice(REACTIONS[what])}."
        f" In the end {name} {ENDINGS[what].format(thing=thing)} {place}."
    )
    return Example("narrative", prompt, answer, (key,))


_MAKERS = {"arithmetic": _arithmetic, "ascii-word": _ascii_word, "narrative": _narrative}
TASKS = tuple(_MAKERS)


def examples(task: str, *, held_out: bool, seed: int = 0) -> Iterator[Example]:
    """Examples of one task without end, all trained on or all held out; the seed decides."""
    rng = random.Random(f"{task} {held_out} {seed}")
    while True:
        yield _MAKERS[task](rng, lambda key: is_held_out(key) is held_out)


def distinct(task: str, number: int, *, held_out: bool, seed: int = 0) -> list[Example]:
    """The first examples of the stream that differ in their prompt."""
    found: dict[str, Example] = {}
    for example in examples(task, held_out=held_out, seed=seed):
        found.setdefault(example.prompt, example)
        if len(found) == number:
            break
    return list(found.values())


def write_prompts(path: Path, number: int) -> None:
    """Write held-out prompts of every task, one JSON object a line."""
    lines = [
        json.dumps({"prompt": example.prompt, "task": task})
        for task in TASKS
        for example in distinct(task, number, held_out=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """One token a byte, after a token that begins the text; padded on the left to generate."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
