"""Prompts to be answered while a corpus is collected: built-in ones, and the user's own."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import PromptError

MAX_FILE_BYTES = 512 * 2**20
_PASSAGE_WORDS = 120
_PASSAGE_CHARACTERS = 1200  # of scripts without spaces, or of what is no language at all
_RUBBISH = re.compile("[\x00-\x08\x0e-\x1f\x7f\N{REPLACEMENT CHARACTER}]")
_MOST_RUBBISH = 0.02
_FEWEST_PAIRS = 8  # of neighbouring lines, to tell prose from prompts
_BROKEN_AT = 40  # characters; shorter lines are not broken prose


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the model, or, with `given`, a text it is only to read."""

    text: str
    group: str  # what kind of prompt this is, for reports
    given: bool = False


_TOPICS = (
    """
volcanoes|the water cycle|photosynthesis|black holes|the moon landing|vaccines|earthquakes|the Roman Empire|inflation
electric cars|solar panels|recycling|bees|coral reefs|penguins|wolves|the human heart|sleep|dreams|memory|stress
friendship|job interviews|public speaking|learning a language|time management|saving money|renting a flat|moving house
cooking rice|baking bread|making tea|a vegetable soup|a birthday cake|healthy breakfasts|growing tomatoes|house plants
running|swimming|chess|football|cycling to work|hiking in the mountains|camping|a trip to the sea|museums|night trains
libraries|newspapers|the printing press|jazz|the violin|oil painting|photography|poetry|fairy tales|detective stories
computers|passwords|email|the internet|spreadsheets|Python programming|databases|robots|artificial intelligence|maps
democracy|elections|taxes|the United Nations|human rights|the French Revolution|the Silk Road|ancient Egypt|the Vikings
gravity|magnets|light|sound|batteries|bridges|aeroplanes|sailing ships|clocks|glass|steel|paper|cotton|chocolate|coffee
rain|snow|deserts|rivers|forests|the Amazon|Antarctica|Japan|Kenya|Brazil|Canada|India|Norway|New Zealand|Mexico
dogs|cats|horses|elephants|owls|spiders|whales|dinosaurs|mushrooms|apples|the immune system|bones|teeth|eyes|vitamins
prime numbers|fractions|percentages|triangles|probability|averages|logic puzzles|the number zero|pi|binary numbers
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

_CHAT = (
    """
What is {}?|Explain {} to a ten-year-old child.|Tell me three facts about {}.|Write a short paragraph about {}.
Why does {} matter?|Give me five tips about {}.|Write a short poem about {}.|Write a short story about {}.
What are the advantages and disadvantages of {}?|How would you describe {} to someone who has never heard of it?
List the most important things to know about {}.|Write an email to a friend about {}.
What questions do people often ask about {}?|Summarize the history of {} in a few sentences.
Compare {} with something similar.|Write a dialogue between two people about {}.
I want to learn about {}. Where should I start?|Is {} worth learning about? Give reasons.
Write a product description that has to do with {}.|What would the world be like without {}?
Make a quiz question about {} and answer it.|What is a common mistake people make about {}?
Write a tweet about {}.|Give a one-sentence definition of {}.|Write step-by-step instructions that involve {}.
Describe a photo that shows {}.|Write a diary entry that mentions {}.|Tell me a joke about {}.
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


def builtin_requests(n: int, seed: int = 0) -> list[Request]:
    """`n` different questions and tasks, at most some 3,500; equal seed, equal requests."""
    chosen = random.Random(seed)
    pairs = [(topic, task) for topic in _TOPICS for task in _CHAT]
    chosen.shuffle(pairs)
    return [Request(task.format(topic), "chat") for topic, task in pairs[:n]]


def read_requests(path: Path) -> list[Request]:
    """The user's prompts or texts, each once, in the order of the file.

    A `.jsonl` file holds objects with "prompt" (to be answered) or "text" (to be read). Any other file is text: one
    prompt per line; but lines longer than a prompt is likely to be, and prose broken into lines of like length, are
    passages to be read.
    Raises PromptError if it cannot be read, is no text, or is empty.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PromptError(f"{path} is {size / 2**20:.0f} MiB large, more than is ever used", "give a part of it")
        raw = path.read_text("utf-8-sig", "replace")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}", "give a file of prompts or texts") from error
    if "\0" in raw or len(_RUBBISH.findall(raw)) > _MOST_RUBBISH * len(raw):
        raise PromptError(
            f"{path} is no text in UTF-8",
            "convert it, for example with `iconv -f latin1 -t utf-8`; give no binary file",
        )
    # not splitlines(): JSON strings may hold its other line ends
    lines = raw.split("\n")
    requests = list(_objects(path, lines) if path.suffix in (".jsonl", ".ndjson") else _lines(lines))
    if not requests:
        raise PromptError(f"{path} holds no text", "give one prompt per line, or a .jsonl file")
    return list(dict.fromkeys(requests))


def _objects(path: Path, lines: Sequence[str]) -> Iterator[Request]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            given = "prompt" not in entry
            text = entry["text" if given else "prompt"]
        except (ValueError, TypeError, KeyError, RecursionError):
            text, given = None, False
        if not isinstance(text, str):
            raise PromptError(
                f"line {number} of {path} is no prompt", 'give objects with "prompt" or "text", one per line'
            )
        text = text.encode("utf-8", "replace").decode()  # JSON can write half a character
        if text.strip():
            yield from _passages(text) if given else [Request(text.strip(), "user")]


def _lines(lines: Sequence[str]) -> Iterator[Request]:
    if _is_broken_prose(lines):
        for paragraph in "\n".join(line.strip() for line in lines).split("\n\n"):
            yield from _passages(paragraph)
        return
    for line in lines:
        if len(line.split()) > _PASSAGE_WORDS or len(line) > _PASSAGE_CHARACTERS:
            yield from _passages(line)
        elif line.strip():
            yield Request(line.strip(), "user")


def _is_broken_prose(lines: Sequence[str]) -> bool:
    """Whether lines are parts of longer paragraphs: full ones are of like length, and sentences go on in the next."""
    stripped = [line.strip() for line in lines]
    pairs = [(line, after) for line, after in zip(stripped, stripped[1:], strict=False) if line and after]
    if len(pairs) < _FEWEST_PAIRS:
        return False
    longest = sorted(len(line) for line, _ in pairs)[-1 - len(pairs) // 50]
    full = sum(len(line) >= 0.75 * longest for line, _ in pairs)
    going_on = sum(after[0].islower() for _, after in pairs)
    return longest >= _BROKEN_AT and full > 0.8 * len(pairs) and going_on > 0.4 * len(pairs)


def _passages(text: str) -> Iterator[Request]:
    passage: list[str] = []
    n_characters = 0
    for word in _words(text):
        if passage and (len(passage) == _PASSAGE_WORDS or n_characters + len(word) > _PASSAGE_CHARACTERS):
            yield Request(" ".join(passage), "text", given=True)
            passage, n_characters = [], 0
        passage.append(word)
        n_characters += len(word) + 1
    if passage:
        yield Request(" ".join(passage), "text", given=True)


def _words(text: str) -> Iterator[str]:
    for word in text.split():
        for start in range(0, len(word), _PASSAGE_CHARACTERS):
            yield word[start : start + _PASSAGE_CHARACTERS]
